"""Loading a packed checkpoint as a transformers model that computes from its packed weights.

The model is built empty. Linears that are stored packed become `PackedLinear`; every other tensor is read as it is. On
a CPU activations are float32, and embeddings and the head stay in the 16 bits in which they are stored.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from torch import nn
from transformers import PreTrainedModel

from quantkit.calibrate.memory import release_freed
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import QuantScheme
from quantkit.errors import ModelError, UsageError
from quantkit.exporters.compressed_tensors import OWN
from quantkit.model.activations import quantize_activations
from quantkit.model.checkpoint import Checkpoint
from quantkit.model.device import pick_device
from quantkit.model.skeleton import LINEARS, Skeleton, read_config, read_generation_config
from quantkit.resilience import side_file
from quantkit.resilience.places import attach
from quantkit.resilience.scale_file import guarded
from quantkit.runtime.fused import fuse
from quantkit.runtime.kernel import Kernel
from quantkit.runtime.linear import PackedLinear, narrow_modules
from quantkit.runtime.reading import Reader, reader


def load(
    directory: Path,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    kernel: Kernel | None = None,
    bounds: bool = True,
) -> PreTrainedModel:
    """Return the model in `directory`, its weights packed, its activations bounded; see `quantkit.load`.

    Raises:
        ModelError: no packed checkpoint, one that cannot be run packed, incomplete or damaged.
        UsageError: a device that does not exist, or a device and a device map.
    """
    if device and device_map:
        raise UsageError("give a device or a device map, not both")
    place = pick_device(device)
    config = read_config(directory)
    quantization = getattr(config, "quantization_config", None)
    if not isinstance(quantization, dict):
        raise ModelError(f"{directory} is not quantized; load it with transformers, or with --runtime dense")
    how, checkpoint = reader(quantization), guarded(directory)
    own_bounds = side_file.read(directory, checkpoint) if bounds else None
    skeleton = Skeleton(directory, packed=True)
    schemes = _put_packed_linears(skeleton, checkpoint, how, place, kernel)
    _fill(skeleton, checkpoint, place, dtype)
    model = skeleton.model
    model.config.use_cache = getattr(config.get_text_config(), "use_cache", True)
    model.generation_config = read_generation_config(directory) or model.generation_config
    model.name_or_path = str(directory)
    model.save_pretrained = _refuse_to_save  # type: ignore[method-assign]
    if device_map is None:
        _place(model, place)
    else:
        _dispatch(model, device_map)
    if own_bounds is not None:
        attach(model, own_bounds)
    if not _quantize_activations(model, schemes, heads=OWN in quantization):
        fuse(list(skeleton.blocks))
    model.eval().requires_grad_(False)
    release_freed()  # packing leaves several times the weights behind
    return model


def _refuse_to_save(*_: Any, **__: Any) -> None:  # noqa: ANN401
    raise UsageError("a packed model is not saved again; copy the checkpoint's directory, or use quantkit export")


def _put_packed_linears(
    skeleton: Skeleton, checkpoint: Checkpoint, how: Reader, device: torch.device, kernel: Kernel | None
) -> dict[str, QuantScheme]:
    """Put a `PackedLinear` on `device` in the place of every linear that is stored packed; return their schemes."""
    schemes = {}
    for name, module in list(skeleton.model.named_modules()):
        stored = stored_packed(name, skeleton, checkpoint, how) if isinstance(module, LINEARS) else None
        if stored is None:
            continue
        scheme = how.scheme_of(name, tuple(base.__name__ for base in type(module).__mro__))
        if scheme is None:
            raise ModelError(
                f"{stored} is stored packed but config.json says that it is dense; the checkpoint is damaged"
            )
        weight, order = how.read(checkpoint, stored, scheme, tuple(module.weight.shape))
        packed = PackedLinear(
            on(weight, device),
            module.bias,
            order=None if order is None else order.to(device),
            transposed=not isinstance(module, nn.Linear),
            kernel=kernel,
        )
        owner, _, attribute = name.rpartition(".")
        setattr(skeleton.model.get_submodule(owner), attribute, packed)
        schemes[name] = weight.scheme
    if not schemes:
        raise ModelError(f"{checkpoint.directory} has no packed linear, though config.json says so; it is incomplete")
    return schemes


def stored_packed(name: str, skeleton: Skeleton, checkpoint: Checkpoint, how: Reader) -> str | None:
    """Return the name under which the linear `name` is stored packed, None if it is stored dense."""
    for end in how.ends:
        stored = skeleton.stored_name(f"{name}.{end}", checkpoint)
        # a dense weight has the same name as one that is stored as integers
        if stored and (end != "weight" or checkpoint.tensors[stored].dtype == "I8"):
            return stored.removesuffix(f".{end}")
    return None


def on(weight: QuantizedTensor, device: torch.device) -> QuantizedTensor:
    """Return `weight` with its tensors on `device`."""
    zero = weight.zero_point
    return replace(
        weight,
        codes=weight.codes.to(device),
        scale=weight.scale.to(device),
        zero_point=None if zero is None else zero.to(device),
    )


def _fill(skeleton: Skeleton, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None) -> None:
    """Read what is not packed: as it is stored on a GPU, for a CPU in float32, unless `dtype` says otherwise.

    Under float32, dense linears and embeddings stay in the 16 bits in which they are stored.
    """
    model = skeleton.model
    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    narrow = {f"{name}.weight" for name in narrow_modules(model)} if dtype == torch.float32 else set[str]()
    skeleton.fill(checkpoint, lambda name: None if name in narrow else dtype)
    for name, module in (narrow_modules(model) if narrow else {}).items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, module)


def _place(model: nn.Module, device: torch.device) -> None:
    try:
        model.to(device)
    except torch.cuda.OutOfMemoryError as error:
        raise ModelError(f"the model does not fit into the memory of {device}; use device_map='auto'") from error


def _dispatch(model: PreTrainedModel, device_map: str | Mapping[str, Any]) -> None:
    """Spread the model over devices as accelerate does; no block is divided.

    Raises:
        UsageError: a map that does not name every part, or asks for a device that does not exist.
    """
    try:
        if isinstance(device_map, str):
            device_map = infer_auto_device_map(model, no_split_module_classes=list(model._no_split_modules or ()))
        dispatch_model(model, device_map=device_map)
    except (ValueError, KeyError, RuntimeError) as error:
        raise UsageError(f"the device map cannot be used: {error}") from error


def _quantize_activations(model: PreTrainedModel, schemes: Mapping[str, QuantScheme], *, heads: bool) -> bool:
    """Quantize activations as the checkpoint says: inputs of linears, and Q, K and V in an output of quantkit.

    Return whether it says so.
    """
    kinds = {(scheme.activation_bits, scheme.activation_symmetric): scheme for scheme in schemes.values()}
    if len(kinds) > 1:
        raise ModelError("its linears quantize their inputs in different ways, which cannot be run packed")
    scheme = next(iter(schemes.values()))
    if scheme.quantizes_activations:
        quantize_activations(model, schemes, scheme, heads=heads)
    return scheme.quantizes_activations
