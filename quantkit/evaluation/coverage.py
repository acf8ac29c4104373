"""The share of a model that is really quantized: recomputed from its configuration, not from its report."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quantkit.core.scheme import QuantScheme
from quantkit.errors import UsageError
from quantkit.evaluation.documents import Quantization, Report, at_most
from quantkit.exporters.compressed_tensors import CompressedTensors
from quantkit.model.checkpoint import BYTES, Checkpoint
from quantkit.model.skeleton import LINEARS, Skeleton

_SCALES = ("F16", "BF16")
_PACKED = (".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape")


@dataclass
class Coverage:
    """What of a model is stored packed.

    Attributes:
        parameters: all parameters of the model.
        quantized: parameters of the linears that are stored packed.
        sites: module names of those linears.
        stored_bits: bits of their codes, scales and zero points.
        faults: where that is not what the configuration says.
    """

    parameters: int = 0
    quantized: int = 0
    sites: list[str] = field(default_factory=list)
    stored_bits: int = 0
    faults: list[str] = field(default_factory=list)


def coverage(skeleton: Skeleton, checkpoint: Checkpoint, quantization: Quantization) -> Coverage:
    """Return what of a model is stored packed, and where that is not what its configuration says.

    Raises:
        ModelError: a shard cannot be read.
    """
    found = Coverage(parameters=sum(parameter.numel() for parameter in skeleton.model.parameters()))
    faults: list[str] = []
    for name, module in skeleton.model.named_modules():
        if isinstance(module, LINEARS):
            faults += _linear(skeleton, checkpoint, quantization, name, module, found)
    found.faults = at_most(faults)
    return found


def report_faults(found: Coverage, report: Report) -> Iterator[str]:
    """Yield where the report claims another share."""
    if missing := sorted(set(report.sites) - set(found.sites)):
        yield f"the report says that {missing[0]} is quantized, but it is not stored packed"
    if extra := sorted(set(found.sites) - set(report.sites)):
        yield f"{extra[0]} is stored packed, but the report does not say that it is quantized"
    if found.quantized != report.quantized_parameters:
        yield f"{found.quantized} parameters are quantized, but the report says {report.quantized_parameters}"
    if found.parameters != report.parameters:
        yield f"the model has {found.parameters} parameters, but the report says {report.parameters}"


def size_faults(skeleton: Skeleton, checkpoint: Checkpoint, report: Report) -> Iterator[str]:
    """Yield where the size was not the predicted one, unless the source's own tensors explain the difference.

    A prediction is made before any weight is read: it counts every dense parameter in the model's dtype. A
    source may store some in another dtype, or tensors that are no parameters; both are copied as they are.
    """
    dtype = skeleton.config.dtype
    width = dtype.itemsize if isinstance(dtype, torch.dtype) else torch.float32.itemsize
    counted = {skeleton.stored_name(name, checkpoint) for name, _ in skeleton.model.named_parameters()}
    explained = 0
    for name, info in checkpoint.tensors.items():
        if not name.endswith(_PACKED) and f"{name}_scale" not in checkpoint:
            stored = BYTES.get(info.dtype, width) * info.elements
            explained += stored - (width * info.elements if name in counted else 0)
    predicted = report.predicted_bytes + explained
    if report.output_bytes != predicted:
        yield f"the report measured {report.output_bytes} bytes of tensors but {predicted} were predicted"


def _linear(
    skeleton: Skeleton,
    checkpoint: Checkpoint,
    quantization: Quantization,
    name: str,
    module: nn.Module,
    found: Coverage,
) -> Iterator[str]:
    """Yield what is wrong with how one linear is stored, and count it in `found` if it is packed."""
    packed = skeleton.stored_name(f"{name}.weight_scale", checkpoint)
    if _ignored(name, quantization.ignore):
        if packed:
            yield f"{name} is stored packed, but config.json says that it is dense"
        return
    if packed is None:
        dense = skeleton.stored_name(f"{name}.weight", checkpoint)
        yield f"{name} should be quantized but is {'stored dense' if dense else 'not stored at all'}"
        return
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    prefix = packed.removesuffix("weight_scale")
    scheme = quantization.scheme_of(name)
    if scheme is None:
        yield f"{name} is stored packed, but config.json gives it no scheme"
        return
    yield from _layout(checkpoint, prefix, (rows, columns), scheme)
    found.sites.append(name)
    found.quantized += rows * columns
    for end in ("weight", "weight_packed", "weight_scale", "weight_zero_point"):
        if info := checkpoint.tensors.get(prefix + end):
            found.stored_bits += 8 * BYTES.get(info.dtype, 0) * info.elements


def _layout(checkpoint: Checkpoint, prefix: str, shape: tuple[int, int], scheme: QuantScheme) -> Iterator[str]:
    """Yield where the packed tensors of one linear differ in form from what its shape and scheme ask for."""
    scale = checkpoint.tensors.get(f"{prefix}weight_scale")
    kind = scale.dtype if scale and scale.dtype in _SCALES else _SCALES[0]
    try:
        layout = CompressedTensors().layout(shape, scheme, kind)
    except UsageError as error:
        yield f"{prefix}weight cannot be {scheme}: {error}"
        return
    for end, expected in layout.items():
        info = checkpoint.tensors.get(prefix + end)
        if info is None:
            yield f"the tensor {prefix}{end} is missing"
        elif (info.dtype, info.shape) != expected:
            form = f"{info.dtype} {info.shape}"
            yield f"the tensor {prefix}{end} is {form}, but {scheme} needs {expected[0]} {expected[1]}"
        elif end == "weight_shape" and tuple(checkpoint.load([prefix + end])[prefix + end].tolist()) != shape:
            yield f"the tensor {prefix}{end} does not hold the weight's shape {shape}"
    if scheme.symmetric and f"{prefix}weight_zero_point" in checkpoint:
        yield f"{prefix}weight_zero_point is stored, but {scheme} has no zero points"


def _ignored(name: str, ignore: tuple[str, ...]) -> bool:
    """Return whether an entry of `ignore` is the module's name, or an expression (`re:…`) that matches it."""
    return any(re.match(entry[3:], name) is not None if entry.startswith("re:") else entry == name for entry in ignore)
