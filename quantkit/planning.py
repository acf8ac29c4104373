"""What a run will do, before it does anything: sites, sizes, memory, disk, time."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from quantkit import costs
from quantkit.allocation import Allocation, Budget, Losses, describe
from quantkit.calibrate.passes import Pass
from quantkit.calibrate.self_text import cache_elements, sequences_at_once
from quantkit.calibrate.text import SELF
from quantkit.core.scheme import UNQUANTIZED, QuantScheme
from quantkit.errors import UsageError
from quantkit.exporters.compressed_tensors import CompressedTensors
from quantkit.model.activations import attentions
from quantkit.model.checkpoint import BYTES
from quantkit.model.skeleton import LINEARS, Skeleton
from quantkit.recipe import Recipe

DEFAULT_SEQLEN = 2048
SEQLEN_TO_CHECK = 512  # for methods that do not learn: enough to measure block errors


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The predicted run.

    Attributes:
        model_type: the family.
        architecture: name of the file that describes it, None if no file does.
        blocks: number of decoder layers.
        shapes: module name → shape of every weight that will be quantized, in order.
        schemes: module name → scheme; with a budget that is not spent yet, the one that
            methods take their defaults from.
        scheme: what the linears become, in words.
        bits_per_weight: stored bits per quantized weight, scales and zero points included; the target of a budget that
            is not spent yet.
        classes: names of the module classes that are quantized.
        dense: module names of linears that stay dense.
        parameters: all parameters of the model.
        samples: calibration sequences.
        seqlen: tokens in one.
        scale_dtype: dtype of the stored scales.
        device: where blocks are computed.
        output_bytes: predicted size of the written weights.
        memory_bytes: predicted peak of resident host memory.
        device_bytes: predicted peak of GPU memory, 0 on the CPU.
        seconds: predicted duration of the calibration.
        budget: what `--target-bpw` asks for, None without it.
        allocation: how the budget was spent, None before that.
        notes: what the user should know, one sentence each.
    """

    model_type: str
    architecture: str | None
    blocks: int
    shapes: Mapping[str, tuple[int, int]]
    schemes: Mapping[str, QuantScheme]
    scheme: str
    bits_per_weight: float
    classes: tuple[str, ...]
    dense: tuple[str, ...]
    parameters: int
    samples: int
    seqlen: int
    scale_dtype: torch.dtype
    device: torch.device
    output_bytes: int
    memory_bytes: int
    device_bytes: int
    seconds: float
    budget: Budget | None = None
    allocation: Allocation | None = None
    notes: tuple[str, ...] = ()

    @property
    def quantized_parameters(self) -> int:
        """Number of weights that are quantized."""
        return sum(rows * columns for rows, columns in self.shapes.values())

    def spend(self, losses: Losses) -> "Plan":
        """Return the plan with the budget spent by measured losses."""
        assert self.budget is not None, "there is no budget to spend"
        allocation = self.budget.spend(losses)
        schemes = {name: allocation.schemes[name] for name in self.schemes}
        bits = _bits_per_weight(self.shapes, schemes)
        return replace(
            self,
            schemes=schemes,
            scheme=describe(schemes, bits),
            bits_per_weight=bits,
            output_bytes=self.output_bytes - _most_bytes(self.budget) + _packed_bytes(self.shapes, schemes),
            allocation=allocation,
        )


def make_plan(skeleton: Skeleton, recipe: Recipe, device: torch.device) -> Plan:
    """Return the plan of a run; no weight is read.

    Raises:
        UsageError: a group size that does not divide a width, a glob that matches nothing, nothing left to quantize, a
            sequence longer than the model's context, a model that shall write its own text and is too large for that.
    """
    linears = _block_linears(skeleton)
    schemes = _assign_schemes(linears, recipe)
    shapes = {name: _shape(linears[name]) for name in schemes}
    budget = _budget(skeleton, recipe, {name: linears[name] for name in schemes})
    packed = _most_bytes(budget) if budget else _packed_bytes(shapes, schemes)
    bits = budget.target if budget else _bits_per_weight(shapes, schemes)
    work = _workload(skeleton, recipe, budget, device)
    _refuse_too_large_to_write(work)
    parameters = _count(skeleton.model.parameters()) + (_tied_head(skeleton) if recipe.rotate else 0)
    quantized = sum(rows * columns for rows, columns in shapes.values())
    classes = tuple(sorted({type(linears[name]).__name__ for name in schemes}))
    return Plan(
        model_type=skeleton.config.model_type,
        architecture=skeleton.architecture.name if skeleton.architecture else None,
        blocks=work.blocks,
        shapes=shapes,
        schemes=schemes,
        scheme=describe({str(each): each for each in budget.schemes} if budget else schemes, bits),
        bits_per_weight=bits,
        classes=classes,
        dense=tuple(
            name
            for name, module in skeleton.model.named_modules()
            if isinstance(module, LINEARS) and name not in schemes
        ),
        parameters=parameters,
        samples=work.samples,
        seqlen=work.seqlen,
        scale_dtype=scale_dtype(skeleton),
        device=device,
        output_bytes=packed + (parameters - quantized) * work.stored_bytes,
        memory_bytes=costs.host_memory(work),
        device_bytes=costs.device_memory(work),
        seconds=costs.duration(work),
        budget=budget,
        notes=(
            *_family_notes(skeleton, schemes, budget),
            *_attention_notes(skeleton, schemes),
            *CompressedTensors().notices(schemes, classes),
        ),
    )


def _tied_head(skeleton: Skeleton) -> int:
    """Return the size of a head that shares the embedding's weight; a rotation gives it a weight of its own."""
    head, embedding = skeleton.model.get_output_embeddings(), skeleton.model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return 0
    return int(head.weight.shape.numel()) if isinstance(head.weight, Tensor) else 0


def scale_dtype(skeleton: Skeleton) -> torch.dtype:
    """Return the 16-bit dtype in which scales are stored: the model's own, float16 for a float32 model."""
    return torch.bfloat16 if skeleton.config.dtype == torch.bfloat16 else torch.float16


def _block_linears(skeleton: Skeleton) -> dict[str, nn.Module]:
    return {
        skeleton.module_name(index, name): module
        for index in range(len(skeleton.blocks))
        for name, module in skeleton.block_linears(index).items()
    }


def _assign_schemes(linears: Mapping[str, nn.Module], recipe: Recipe) -> dict[str, QuantScheme]:
    """Return the scheme of every linear that no glob excludes, checking each width."""
    for glob in recipe.ignore:
        if not any(fnmatchcase(name, glob) for name in linears):
            example = next(iter(linears))
            raise UsageError(f"--ignore {glob!r} matches no linear of a block; names look like {example}")
    schemes = {}
    for name, module in linears.items():
        if not any(fnmatchcase(name, glob) for glob in recipe.ignore):
            try:
                recipe.nominal_scheme.groups(_shape(module)[1])
            except UsageError as error:
                raise UsageError(f"{name}: {error}") from None
            schemes[name] = recipe.nominal_scheme
    if not schemes:
        raise UsageError("--ignore excludes every linear, so nothing is left to quantize")
    return schemes


def _budget(skeleton: Skeleton, recipe: Recipe, linears: Mapping[str, nn.Module]) -> Budget | None:
    """Return what the recipe's target means for its linears, None without a target."""
    if recipe.target_bpw is None:
        return None
    for name, module in linears.items():
        if type(module) is not nn.Linear:
            raise UsageError(
                f"--target-bpw writes several widths, which transformers loads into plain linears only, but {name} "
                f"is a {type(module).__name__}; use --wbits"
            )
    shapes = {name: _shape(module) for name, module in linears.items()}
    return Budget.of(recipe.target_bpw, recipe.nominal_scheme, skeleton, shapes)


def _attention_notes(skeleton: Skeleton, schemes: Mapping[str, QuantScheme]) -> Iterator[str]:
    """Tell of blocks whose queries, keys and values should be quantized but are out of reach."""
    if any(scheme.key_value_bits != UNQUANTIZED for scheme in schemes.values()):
        blind = sum(not attentions(block) for block in skeleton.blocks)
        if blind:
            yield (
                f"in {blind} of {len(skeleton.blocks)} blocks of {skeleton.config.model_type} the attention is out of "
                "reach, so its queries, keys and values will not be quantized, during calibration either"
            )


def _family_notes(skeleton: Skeleton, schemes: Mapping[str, QuantScheme], budget: Budget | None) -> Iterator[str]:
    family = skeleton.architecture
    if budget:
        widths = ", ".join(str(scheme.bits) for scheme in budget.schemes)
        yield (
            f"each of {len(budget.ties)} groups of linears gets the bits that its measured loss asks for ({widths}), "
            f"at most {budget.limit:,} in all; without zero points, since transformers loads several widths only so"
        )
    if family is None:
        yield (
            f"no architecture file describes {skeleton.config.model_type}, so its blocks were found by themselves "
            "and each linear is its own group"
        )
        return
    partial: dict[str, str] = {}
    for index in range(len(skeleton.blocks)):
        for group in family.groups:
            names = [skeleton.module_name(index, linear) for linear in group.linears]
            chosen = [name for name in names if name in schemes]
            if chosen and len(chosen) < len(names):
                partial.setdefault(group.name, next(name for name in names if name not in schemes))
    for group_name, name in partial.items():
        yield (
            f"{name} stays dense but others of the group {group_name} do not; "
            "vLLM fuses such a group and cannot load a part of it"
        )


def _workload(skeleton: Skeleton, recipe: Recipe, budget: Budget | None, device: torch.device) -> costs.Workload:
    passes = recipe.build_passes().values()
    text_config = skeleton.config.get_text_config()
    seqlen, writes = _sequence_length(skeleton, recipe), recipe.calibration.text == SELF
    dtype = skeleton.config.dtype
    return costs.Workload(
        blocks=len(skeleton.blocks),
        block_parameters=max(_count(block.parameters()) for block in skeleton.blocks),
        block_linears=len(skeleton.block_linears(0)),
        block_features=sum(sum(_shape(module)) for module in skeleton.block_linears(0).values()),
        outer_parameters=_count(skeleton.outer_parameters().values()),
        width=text_config.hidden_size,
        vocabulary=text_config.vocab_size,
        stored_bytes=dtype.itemsize if isinstance(dtype, torch.dtype) else torch.float32.itemsize,
        samples=recipe.calibration.samples,
        seqlen=seqlen,
        batch_size=recipe.calibration.batch_size,
        streams=2 + any(getattr(step, "aug_loss", False) for step in passes),
        updates=_updates_per_block(len(skeleton.blocks), passes),
        forwards=sum(getattr(step, "forwards_per_window", 0) for step in passes),
        hessian=_widest_hessian(skeleton, passes),
        ties=len(budget.ties) // len(skeleton.blocks) if budget else 0,
        widths=len(budget.schemes) if budget else 0,
        device=device,
        at_once=min(recipe.calibration.samples, writing_batch(skeleton, seqlen)) if writes else 0,
        cache=cache_elements(skeleton.config, seqlen) if writes else 0,
    )


def _updates_per_block(blocks: int, passes: Iterable[Pass]) -> float:
    """Return the updates that each block takes part in, on average: windows of several blocks overlap."""
    total = 0
    for step in passes:
        span = min(blocks, step.blocks_at_once or blocks)
        total += step.updates_per_window * span * (blocks - span + 1)
    return total / blocks


def writing_batch(skeleton: Skeleton, seqlen: int) -> int:
    """Return how many sequences the model writes side by side where it writes its own calibration text."""
    return sequences_at_once(_count(skeleton.model.parameters()), skeleton.config, seqlen)


def _refuse_too_large_to_write(work: costs.Workload) -> None:
    needed, free = costs.writing_memory(work), costs.free_memory(work.device)
    if needed > free:
        raise UsageError(
            f"--calibration self needs the whole model in memory, {needed / 1e9:.1f} GB on {work.device} where "
            f"{free / 1e9:.1f} GB are free; use --calibration embedded or a text file, or a smaller --seqlen"
        )


def _widest_hessian(skeleton: Skeleton, passes: Iterable[Pass]) -> int:
    """Return the input features of the widest linear if a pass holds Hessians, otherwise 0."""
    if not any(getattr(step, "second_order", False) for step in passes):
        return 0
    return max(_shape(module)[isinstance(module, nn.Linear)] for module in skeleton.block_linears(0).values())


def _sequence_length(skeleton: Skeleton, recipe: Recipe) -> int:
    text_config = skeleton.config.get_text_config()
    context = int(getattr(text_config, "max_position_embeddings", None) or DEFAULT_SEQLEN)
    wanted = recipe.calibration.seqlen
    if wanted is not None and wanted > context:
        raise UsageError(f"--seqlen {wanted} is longer than the model's context of {context}")
    learns = any(step.learns for step in recipe.build_passes().values())
    return wanted or min(DEFAULT_SEQLEN if learns else SEQLEN_TO_CHECK, context)


def _packed_bytes(shapes: Mapping[str, tuple[int, int]], schemes: Mapping[str, QuantScheme]) -> int:
    return sum(
        BYTES[kind] * torch.Size(size).numel()
        for name, shape in shapes.items()
        for kind, size in CompressedTensors().layout(shape, schemes[name], "F16").values()
    )


def _most_bytes(budget: Budget) -> int:
    """Return the most bytes that the packed linears may take: the budget, and the shape that is stored with each."""
    return -(-budget.limit // 8) + 2 * BYTES["I64"] * len(budget.shapes)


def _bits_per_weight(shapes: Mapping[str, tuple[int, int]], schemes: Mapping[str, QuantScheme]) -> float:
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    bits = sum(size * schemes[name].bits_per_weight(shapes[name][1]) for name, size in sizes.items())
    return bits / sum(sizes.values())


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _shape(module: nn.Module) -> tuple[int, int]:
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    return rows, columns
