"""What a run will do, before it does anything: sites, sizes, memory, disk, time."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import psutil
import torch
from torch import Tensor, nn

from quantkit.calibrate.engine import CHECK_SEQUENCES, CHECK_TOKENS
from quantkit.calibrate.passes import Pass
from quantkit.core.scheme import QuantScheme
from quantkit.errors import UsageError
from quantkit.export.compressed_tensors import CompressedTensors
from quantkit.model.checkpoint import BYTES
from quantkit.model.skeleton import LINEARS, Skeleton
from quantkit.recipe import Recipe

DEFAULT_SEQLEN = 2048


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The predicted run.

    Attributes:
        model_type: the family.
        architecture: name of the file that describes it, None if no file does.
        blocks: number of decoder layers.
        shapes: module name → shape of every weight that will be quantized, in order.
        schemes: module name → scheme.
        dense: module names of linears that stay dense.
        parameters: all parameters of the model.
        samples, seqlen: calibration sequences and their length.
        scale_dtype: dtype of the stored scales.
        device: where blocks are computed.
        output_bytes: predicted size of the written weights.
        memory_bytes: predicted peak of resident host memory.
        device_bytes: predicted peak of GPU memory, 0 on the CPU.
        seconds: predicted duration, from operations timed on this machine.
    """

    model_type: str
    architecture: str | None
    blocks: int
    shapes: Mapping[str, tuple[int, int]]
    schemes: Mapping[str, QuantScheme]
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
    linears = _linears(skeleton)
    schemes = _assign_schemes(linears, recipe)
    seqlen = _sequence_length(skeleton, recipe)
    scale = scale_dtype(skeleton)
    cost = _Cost(skeleton, recipe, schemes, linears, seqlen, device)
    return Plan(
        model_type=skeleton.config.model_type,
        architecture=skeleton.architecture.name if skeleton.architecture else None,
        blocks=len(skeleton.blocks),
        shapes={name: _shape(linears[name]) for name in schemes},
        schemes=schemes,
        dense=_dense_linears(skeleton, schemes),
        parameters=cost.parameters,
        samples=recipe.calibration.samples,
        seqlen=seqlen,
        scale_dtype=scale,
        device=device,
        output_bytes=cost.output_bytes(scale),
        memory_bytes=cost.memory_bytes(),
        device_bytes=cost.device_bytes(),
        seconds=cost.seconds(recipe.build_passes()),
    )


def scale_dtype(skeleton: Skeleton) -> torch.dtype:
    """Return the 16-bit dtype in which scales are stored: the model's own, float16 for a float32 model."""
    return torch.bfloat16 if skeleton.config.dtype == torch.bfloat16 else torch.float16


def _linears(skeleton: Skeleton) -> dict[str, nn.Module]:
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


def _sequence_length(skeleton: Skeleton, recipe: Recipe) -> int:
    text_config = skeleton.config.get_text_config()
    context = getattr(text_config, "max_position_embeddings", None) or DEFAULT_SEQLEN
    wanted = recipe.calibration.seqlen
    if wanted is not None and wanted > context:
        raise UsageError(f"--seqlen {wanted} is longer than the model's context of {context}")
    return wanted or min(DEFAULT_SEQLEN, context)


def _dense_linears(skeleton: Skeleton, schemes: Mapping[str, QuantScheme]) -> tuple[str, ...]:
    return tuple(
        name
        for name, module in skeleton.model.named_modules()
        if isinstance(module, LINEARS) and name not in schemes
    )


def _shape(module: nn.Module) -> tuple[int, int]:
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    return rows, columns


class _Cost:
    """Predicted sizes and times of a run.

    Memory counts what lives at the same time: everything outside the blocks while the inputs are recorded; later the
    two streams, one block in float32, its rounded copies, and the activations that one training update saves.
    """

    COPIES_ROUNDED = 2.6  # float32 copy and codes of a block rounded for comparison, and temporaries of one weight
    LIBRARIES = 75e6  # what torch, tokenizers and safetensors allocate when they are first used, measured
    COPIES_TRAINED = 2.1  # fake-quantized weights and their gradients during an update

    def __init__(
        self,
        skeleton: Skeleton,
        recipe: Recipe,
        schemes: Mapping[str, QuantScheme],
        linears: Mapping[str, nn.Module],
        seqlen: int,
        device: torch.device,
    ) -> None:
        self.schemes, self.linears, self.device = schemes, linears, device
        self.passes = recipe.build_passes()
        self.blocks = len(skeleton.blocks)
        self.block = max(sum(p.numel() for p in block.parameters()) for block in skeleton.blocks)
        self.outer = sum(p.numel() for p in _unique(skeleton.outer_parameters().values()))
        self.parameters = self.outer + sum(p.numel() for p in skeleton.blocks.parameters())
        self.samples, self.seqlen = recipe.calibration.samples, seqlen
        self.batch_tokens = recipe.calibration.batch_size * seqlen
        text_config = skeleton.config.get_text_config()
        self.width = text_config.hidden_size
        self.vocabulary = text_config.vocab_size
        self.dense_bytes = (skeleton.config.dtype or torch.float32).itemsize
        first = skeleton.block_linears(0).values()
        self.block_features = sum(sum(_shape(module)) for module in first)  # inputs and outputs of its linears

    def output_bytes(self, scale: torch.dtype) -> int:
        dtype = "BF16" if scale == torch.bfloat16 else "F16"
        exporter = CompressedTensors()
        packed = quantized = 0
        for name, scheme in self.schemes.items():
            shape = _shape(self.linears[name])
            quantized += shape[0] * shape[1]
            for kind, size in exporter.layout(shape, scheme, dtype).values():
                packed += BYTES[kind] * torch.Size(size).numel()
        return packed + (self.parameters - quantized) * self.dense_bytes

    def streams(self) -> float:
        kept = 3 if any(getattr(step, "aug_loss", False) for step in self.passes.values()) else 2
        item = 2 if self.device.type == "cuda" else 4
        return kept * item * self.samples * self.seqlen * self.width

    def block_peak(self) -> float:
        learns = any(step.learns for step in self.passes.values())
        weights = self.block * 4 * (1 + self.COPIES_ROUNDED + (self.COPIES_TRAINED if learns else 0))
        # an update saves the inputs and outputs of the linears and about as much again between them
        activations = self.batch_tokens * self.block_features * 4 * (2 if learns else 1)
        return weights + activations

    def outer_peak(self) -> float:
        return self.outer * (4 + self.dense_bytes) + 4 * self.batch_tokens * self.width

    def memory_bytes(self) -> int:
        base = psutil.Process().memory_info().rss
        logits = CHECK_SEQUENCES * CHECK_TOKENS * self.vocabulary * 4 * 2
        written = 2 * self.block * self.dense_bytes  # a shard, and the bytes that safetensors makes of it
        on_host = self.device.type == "cpu"
        working = max(self.outer_peak() + logits, self.block_peak()) if on_host else self.outer_peak() + logits
        return int(base + self.LIBRARIES + self.streams() + working + written)

    def device_bytes(self) -> int:
        return int(max(self.outer_peak(), self.block_peak())) if self.device.type == "cuda" else 0

    def seconds(self, passes: Mapping[str, Pass]) -> float:
        rate, sweep = _machine_speed(self.device)
        tokens = self.samples * self.seqlen
        forward = 2 * self.block * tokens / rate
        updates = sum(step.updates_per_batch for step in passes.values())
        rounding = 14 * self.block * sweep * self.samples * self.seqlen / self.batch_tokens
        checks = 3 + any(step.learns for step in passes.values())
        return self.blocks * (forward * (checks + 3 * updates) + rounding * updates) * 1.3


def _unique(parameters: object) -> list[Tensor]:
    return list({id(p): p for p in parameters}.values())  # type: ignore[attr-defined]


def _machine_speed(device: torch.device) -> tuple[float, float]:
    """Return (floating-point operations per second of a matrix product, seconds of one elementwise operation), timed now."""
    size = 4096 if device.type == "cuda" else 768
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    product = _fastest(lambda: matrix @ matrix, device)
    sweep = _fastest(lambda: matrix * 2.0, device)
    return 2 * size**3 / product, sweep / size**2


def _fastest(work: object, device: torch.device) -> float:
    times = []
    for _ in range(4):
        start = time.perf_counter()
        work()  # type: ignore[operator]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)
