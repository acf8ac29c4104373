"""What a run will do, before it does anything: sites, sizes, memory, disk, time."""

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from quantkit import conversion, costs, sparsities
from quantkit.allocation import Allocation, Budget, Losses, describe
from quantkit.core.masks import Sparsity
from quantkit.core.scheme import UNQUANTIZED, QuantScheme
from quantkit.errors import UsageError
from quantkit.evaluation.manifest import DENSE
from quantkit.limits import Limits
from quantkit.model.activations import attentions
from quantkit.model.equivalence import find_pairs
from quantkit.model.skeleton import LINEARS, Skeleton
from quantkit.recipe import SAMPLES_TO_CHECK, Calibration, Recipe, with_changes
from quantkit.sizes import bits_per_weight, most_bytes, packed_bytes, sizes_of
from quantkit.workload import Workload, count, shape, workload

LEARNED = ("fast", "balanced", "best")  # the presets among which a user chooses, from the cheapest


@dataclass(frozen=True, kw_only=True)
class PresetCost:
    """What a preset is predicted to take for the same model, scheme and text.

    Attributes:
        name: the preset.
        memory_bytes: peak of resident host memory.
        device_bytes: peak of GPU memory.
        seconds: duration.
        fits: whether so much memory is free.
        chosen: whether it is what the run does.
    """

    name: str
    memory_bytes: int
    device_bytes: int
    seconds: float
    fits: bool
    chosen: bool


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
        formats: further formats, each about as large.
        kept_bytes: predicted size of what is kept on the disk to go on from.
        stream_bytes: how much of the hidden states between blocks may stay in memory.
        spilled_bytes: how much more of them there is predicted to be, which goes to the disk.
        memory_bytes: predicted peak of resident host memory.
        memory_limit: the most that it may be.
        device_bytes: predicted peak of GPU memory, 0 on the CPU.
        seconds: predicted duration of the calibration.
        budget: what `--target-bpw` asks for, None without it.
        allocation: how the budget was spent, None before that.
        sparsity: module name → how much of it is pruned.
        rounds: whether what is not pruned is quantized; otherwise all weights keep their dtype.
        presets: what the presets would take.
        refusal: why the run will be refused, None if it will not.
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
    kept_bytes: int
    stream_bytes: int
    spilled_bytes: int
    memory_bytes: int
    memory_limit: int
    device_bytes: int
    seconds: float
    budget: Budget | None = None
    allocation: Allocation | None = None
    sparsity: Mapping[str, Sparsity] = field(default_factory=dict)
    rounds: bool = True
    presets: tuple[PresetCost, ...] = ()
    refusal: str | None = None
    formats: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def calibration_bytes(self) -> int:
        """What the disk has to hold during calibration: weights, what is kept to go on from, what is spilled."""
        return self.output_bytes + self.kept_bytes + self.spilled_bytes

    @property
    def disk_bytes(self) -> int:
        """What the disk has to hold at the peak: further formats take the place of what was spilled."""
        return max(self.calibration_bytes, self.output_bytes * (1 + len(self.formats)) + self.kept_bytes)

    @property
    def quantized_parameters(self) -> int:
        """Number of weights that are quantized."""
        return sum(rows * columns for rows, columns in self.shapes.values()) if self.rounds else 0

    @property
    def pruned(self) -> str:
        """Say what is pruned, '' if nothing is."""
        kinds = "/".join(dict.fromkeys(map(str, self.sparsity.values()))) if len(self.sparsity) else ""
        return f"{kinds} of {len(self.sparsity)} linears" if kinds else ""

    def spend(self, losses: Losses) -> "Plan":
        """Return the plan with the budget spent by measured losses."""
        assert self.budget is not None, "there is no budget to spend"
        allocation = self.budget.spend(losses)
        schemes = {name: allocation.schemes[name] for name in self.schemes}
        bits = bits_per_weight(self.shapes, schemes)
        return replace(
            self,
            schemes=schemes,
            scheme=describe(schemes, bits),
            bits_per_weight=bits,
            output_bytes=self.output_bytes - most_bytes(self.budget) + packed_bytes(self.shapes, schemes),
            allocation=allocation,
        )


def make_plan(skeleton: Skeleton, recipe: Recipe, device: torch.device, memory: int | None = None) -> Plan:
    """Return the plan of a run that may take `memory` bytes, a share of what is free for None; no weight is read.

    Raises:
        UsageError: a group size that does not divide a width, a glob that matches nothing, nothing left to quantize, a
            sequence longer than the model's context, a model that shall write its own text and is too large for that.
    """
    linears = _block_linears(skeleton)
    schemes = _assign_schemes(linears, recipe)
    shapes = {name: shape(linears[name]) for name in schemes}
    step = sparsities.pruner_of(recipe.build_passes())
    budget = _budget(skeleton, recipe, {name: linears[name] for name in schemes})
    work = _workload(skeleton, recipe, budget, device)
    packed, bits = sizes_of(recipe, shapes, schemes, budget, work)
    speed = costs.machine_speed(device)
    _refuse_too_large_to_write(work)
    parameters = count(skeleton.model.parameters()) + (_tied_head(skeleton) if recipe.rotate else 0)
    quantized = sum(rows * columns for rows, columns in shapes.values())
    limits = Limits.of(device, memory)
    others = _presets(skeleton, recipe, work, budget)
    presets = tuple(_preset_cost(name, other, work, speed, limits) for name, other in others.items())
    classes = tuple(sorted({type(linears[name]).__name__ for name in schemes}))
    return Plan(
        model_type=skeleton.config.model_type,
        architecture=skeleton.architecture.name if skeleton.architecture else None,
        blocks=work.blocks,
        shapes=shapes,
        schemes=schemes,
        scheme=DENSE if recipe.dense else describe(_distinct(budget) if budget else schemes, bits),
        bits_per_weight=bits,
        classes=classes,
        dense=_dense(skeleton, schemes),
        parameters=parameters,
        samples=work.samples,
        seqlen=work.seqlen,
        scale_dtype=scale_dtype(skeleton),
        device=device,
        output_bytes=packed + (parameters - quantized) * work.stored_bytes,
        kept_bytes=costs.kept_bytes(work, packed),
        stream_bytes=limits.held(work),
        spilled_bytes=limits.spilled(work),
        memory_bytes=limits.memory_of(work),
        memory_limit=limits.memory,
        device_bytes=costs.device_memory(work),
        seconds=costs.duration(work, speed),
        budget=budget,
        sparsity=sparsities.assign({name: linears[name] for name in schemes}, step) if step else {},
        rounds=not recipe.dense,
        presets=presets,
        refusal=limits.refusal(
            work, [(name, others[name]) for name in LEARNED[::-1] if others.get(name, work) is not work]
        ),
        formats=tuple(conversion.further(recipe.formats)),
        notes=(
            *_family_notes(skeleton, schemes, budget),
            *_attention_notes(skeleton, schemes),
            *_method_notes(skeleton, recipe),
            *(() if recipe.dense else conversion.notices(recipe.formats, schemes, classes)),
        ),
    )


def _dense(skeleton: Skeleton, schemes: Container[str]) -> tuple[str, ...]:
    """Return the names of the linears that no scheme is for."""
    named = skeleton.model.named_modules()
    return tuple(name for name, module in named if isinstance(module, LINEARS) and name not in schemes)


def _distinct(budget: Budget) -> dict[str, QuantScheme]:
    return {str(each): each for each in budget.schemes}


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
                recipe.nominal_scheme.groups(shape(module)[1])
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
    shapes = {name: shape(module) for name, module in linears.items()}
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


def _method_notes(skeleton: Skeleton, recipe: Recipe) -> Iterator[str]:
    """Tell what of the methods' settings the model does not let them do."""
    for name, step in recipe.build_passes().items():
        if step.blocks_at_once > len(skeleton.blocks):
            yield f"{name} gets windows of {len(skeleton.blocks)} blocks, all that there are, not {step.blocks_at_once}"
        if getattr(step, "let", False):
            yield from _skipped_pairs(skeleton, let_down=getattr(step, "let_down", False))


def _skipped_pairs(skeleton: Skeleton, *, let_down: bool) -> Iterator[str]:
    """Tell which equivalent transforms are impossible, and in how many blocks."""
    blocks: dict[str, int] = {}
    for block in skeleton.blocks:
        _, skipped = find_pairs(block, skeleton.architecture, skeleton.config, let_down=let_down)
        for reason in skipped:
            blocks[reason] = blocks.get(reason, 0) + 1
    for reason, number in blocks.items():
        where = "" if number == len(skeleton.blocks) else f" (in {number} of {len(skeleton.blocks)} blocks)"
        yield f"equivalent transforms skip {reason}{where}"


def _workload(skeleton: Skeleton, recipe: Recipe, budget: Budget | None, device: torch.device) -> Workload:
    ties, widths = (len(budget.ties), len(budget.schemes)) if budget else (0, 0)
    return workload(skeleton, recipe, device, ties=ties, widths=widths)


def _presets(skeleton: Skeleton, recipe: Recipe, chosen: Workload, budget: Budget | None) -> dict[str, Workload]:
    """Return what the presets would do in the place of the recipe's passes; `chosen` itself where that is the same.

    In the place of a method that learns nothing, and was given just text to check, they get as much as they learn from.
    """
    if recipe.dense:
        return {}
    found, passes = {}, recipe.build_passes()
    learns = any(step.learns for step in passes.values())
    few = not learns and recipe.calibration.samples == SAMPLES_TO_CHECK
    for name in LEARNED:
        other = with_changes(recipe, {"samples": Calibration().samples} if few else {}, preset=name)
        same = other.build_passes() == passes
        found[name] = chosen if same else _workload(skeleton, other, budget, chosen.device)
    return found


def _preset_cost(name: str, work: Workload, chosen: Workload, speed: costs.Speed, limits: Limits) -> PresetCost:
    return PresetCost(
        name=name,
        memory_bytes=limits.memory_of(work),
        device_bytes=costs.device_memory(work),
        seconds=costs.duration(work, speed),
        fits=limits.fits(work),
        chosen=work is chosen,
    )


def _refuse_too_large_to_write(work: Workload) -> None:
    needed, free = costs.writing_memory(work), costs.free_memory(work.device)
    if needed > free:
        raise UsageError(
            f"--calibration self needs the whole model in memory, {needed / 1e9:.1f} GB on {work.device} where "
            f"{free / 1e9:.1f} GB are free; use --calibration embedded or a text file, or a smaller --seqlen"
        )
