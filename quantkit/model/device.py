"""Which device a run uses."""

import torch

from quantkit.errors import UsageError


def pick_device(name: str | None) -> torch.device:
    """Return the device that `name` means; None is a GPU if there is one.

    Raises:
        UsageError: no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}; use cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"the device {name!r} is not supported; use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"there is no {name} on this machine; leave out --device to use what there is")
    return device


def native_bfloat16(device: torch.device) -> bool:
    """Return whether matrix products in bfloat16 are faster there than in float32: GPUs, and CPUs with AVX512-BF16."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return device.type == "cuda" or (supported is not None and bool(supported()))
