"""What a run will do, before it does anything: sites, sizes, memory, disk, time."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from quantkit import costs
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
        schemes: module name → scheme.
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
        notes: what the user should know, one sentence each.
    """

    model_type: str
    architecture: str | None
    blocks: int
    shapes: Mapping[str, tuple[int, int]]
    schemes: Mapping[str, QuantScheme]
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
    notes: tuple[str, ...] = ()

    @property
    def quantized_parameters(self) -> int:
        """Number of weights that are quantized."""
        return sum(rows * columns for rows, columns in self.shapes.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per quantized weight, scales and zero points included."""
        bits = sum(
            rows * columns * self.schemes[name].bits_per_weight(columns)
            for name, (rows, columns) in self.shapes.items()
        )
        return bits / self.quantized_parameters


def make_plan(skeleton: Skeleton, recipe: Recipe, device: torch.device) -> Plan:
    """Return the plan of a run; no weight is read.

    Raises:
        UsageError: a group size that does not divide a width, a glob that matches nothing, nothing left to quantize, a
            sequence longer than the model's context.
    """
    linears = _block_linears(skeleton)
    schemes = _assign_schemes(linears, recipe)
    shapes = {name: _shape(linears[name]) for name in schemes}
    work = _workload(skeleton, recipe, device)
    parameters = _count(skeleton.model.parameters())
    classes = tuple(sorted({type(linears[name]).__name__ for name in schemes}))
    return Plan(
        model_type=skeleton.config.model_type,
        architecture=skeleton.architecture.name if skeleton.architecture else None,
        blocks=work.blocks,
        shapes=shapes,
        schemes=schemes,
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
        output_bytes=_output_bytes(shapes, schemes, parameters, work.stored_bytes),
        memory_bytes=costs.host_memory(work),
        device_bytes=costs.device_memory(work),
        seconds=costs.duration(work),
        notes=(
            *_family_notes(skeleton, schemes),
            *_attention_notes(skeleton, schemes),
            *CompressedTensors().notices(schemes, classes),
        ),
    )


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
                recipe.scheme.groups(_shape(module)[1])
            except UsageError as error:
                raise UsageError(f"{name}: {error}") from None
            schemes[name] = recipe.scheme
    if not schemes:
        raise UsageError("--ignore excludes every linear, so nothing is left to quantize")
    return schemes


def _attention_notes(skeleton: Skeleton, schemes: Mapping[str, QuantScheme]) -> Iterator[str]:
    """Tell of blocks whose queries, keys and values should be quantized but are out of reach."""
    if any(scheme.key_value_bits != UNQUANTIZED for scheme in schemes.values()):
        blind = sum(not attentions(block) for block in skeleton.blocks)
        if blind:
            yield (
                f"in {blind} of {len(skeleton.blocks)} blocks of {skeleton.config.model_type} the attention is out of "
                "reach, so its queries, keys and values will not be quantized, during calibration either"
            )


def _family_notes(skeleton: Skeleton, schemes: Mapping[str, QuantScheme]) -> Iterator[str]:
    family = skeleton.architecture
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


def _workload(skeleton: Skeleton, recipe: Recipe, device: torch.device) -> costs.Workload:
    passes = recipe.build_passes().values()
    text_config = skeleton.config.get_text_config()
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
        seqlen=_sequence_length(skeleton, recipe),
        batch_size=recipe.calibration.batch_size,
        streams=2 + any(getattr(step, "aug_loss", False) for step in passes),
        updates=sum(step.updates_per_batch for step in passes),
        device=device,
    )


def _sequence_length(skeleton: Skeleton, recipe: Recipe) -> int:
    text_config = skeleton.config.get_text_config()
    context = int(getattr(text_config, "max_position_embeddings", None) or DEFAULT_SEQLEN)
    wanted = recipe.calibration.seqlen
    if wanted is not None and wanted > context:
        raise UsageError(f"--seqlen {wanted} is longer than the model's context of {context}")
    learns = any(step.learns for step in recipe.build_passes().values())
    return wanted or min(DEFAULT_SEQLEN if learns else SEQLEN_TO_CHECK, context)


def _output_bytes(
    shapes: Mapping[str, tuple[int, int]], schemes: Mapping[str, QuantScheme], parameters: int, stored_bytes: int
) -> int:
    packed = quantized = 0
    for name, shape in shapes.items():
        quantized += shape[0] * shape[1]
        for kind, size in CompressedTensors().layout(shape, schemes[name], "F16").values():
            packed += BYTES[kind] * torch.Size(size).numel()
    return packed + (parameters - quantized) * stored_bytes


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _shape(module: nn.Module) -> tuple[int, int]:
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    return rows, columns
