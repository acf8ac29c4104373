"""What a kernel is: the product of activations with a packed weight, on one kind of device."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import QuantScheme


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What is packed: a weight of `out` rows and `width` input features, quantized by `scheme`.

    `scheme.group_size` divides `width`; None means one group that is the whole row. Where `transposed`, as GPT-2's
    Conv1D, rows are input features and groups run along the `width` output features: y = x W.
    """

    out: int
    width: int
    scheme: QuantScheme
    transposed: bool = False

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return self.scheme.groups(self.width)

    @property
    def group_size(self) -> int:
        """Input features of a group."""
        return self.width // self.groups


class Kernel(Protocol):
    """One way to compute y = x Wᵀ, where W is never dense as a whole; a file of `kernels/` ends with `KERNEL`.

    The packed tensors are a kernel's own: it decides their layout, and they take at most 1.1 times the bits that
    `QuantScheme.bits_per_weight` states. All lie on one device, and moving each of them there moves the weight.
    """

    def obstacle(self, device: torch.device, layout: Layout) -> str | None:
        """Return why it cannot compute `layout` on `device`, in a phrase, or None if it can."""

    def pack(self, weight: QuantizedTensor) -> dict[str, Tensor]:
        """Return the packed tensors by name, on the device of `weight`."""

    def unpack(self, packed: Mapping[str, Tensor], layout: Layout) -> QuantizedTensor:
        """Return what `pack` was given; exact."""

    def linear(self, inputs: Tensor, packed: Mapping[str, Tensor], layout: Layout) -> Tensor:
        """Return `inputs` (tokens, width) times the transposed weight: (tokens, out), of the inputs' dtype.

        The inputs are float32, bfloat16 or float16 and contiguous; sums are in float32.
        """

    def dense_rows(self, packed: Mapping[str, Tensor], layout: Layout) -> Iterator[Tensor]:
        """Yield the weight in float32, some rows at a time, in order: (rows, width), valid until the next are asked."""
