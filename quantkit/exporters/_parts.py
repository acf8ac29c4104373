"""What the tensors of one linear must look like before they are unpacked: damage is named, not decoded."""

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from quantkit.errors import ModelError

Layout: TypeAlias = dict[str, tuple[str, tuple[int, ...]]]  # end of the name → safetensors dtype name, shape

_INTEGERS = {"I8": torch.int8, "I32": torch.int32, "I64": torch.int64}


def refuse_misshapen(tensors: Mapping[str, Tensor], layout: Layout) -> None:
    """Raise ModelError unless every tensor of `layout` is there, in its shape and as integers where it says so."""
    for end, (kind, shape) in layout.items():
        tensor = tensors.get(end)
        if tensor is None:
            raise ModelError(f"the tensor {end} of a packed linear is missing; the checkpoint is incomplete")
        wanted = _INTEGERS.get(kind)
        if tuple(tensor.shape) != shape or (tensor.dtype != wanted if wanted else not tensor.is_floating_point()):
            raise ModelError(
                f"{end} of a packed linear is {tensor.dtype} {tuple(tensor.shape)}, not {wanted or 'a float'} {shape}; "
                "the checkpoint is damaged, or its config.json is another model's"
            )
