"""Torch alone, on every device and for every layout: slow, and right. What other kernels cannot do is done here.

The packed tensors are those of compressed-tensors, but for the zero points, which are a byte each. Some rows at a time
are unpacked, dequantized and multiplied.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from quantkit.core.packing import pack, unpack
from quantkit.core.qtensor import QuantizedTensor
from quantkit.runtime.kernel import Layout

ELEMENTS = 2**20  # of the weight that are dense at a time


class Reference:
    """The kernel; see the module."""

    def obstacle(self, device: torch.device, layout: Layout) -> str | None:  # noqa: ARG002
        """See `Kernel.obstacle`; nothing is."""
        return None

    def pack(self, weight: QuantizedTensor) -> dict[str, Tensor]:
        """See `Kernel.pack`: words int32 (out, words), scale (out, groups), zero int8 (out, groups)."""
        packed = {"words": pack(weight.codes, weight.scheme.bits), "scale": weight.scale}
        return packed if weight.zero_point is None else {**packed, "zero": weight.zero_point}

    def unpack(self, packed: Mapping[str, Tensor], layout: Layout) -> QuantizedTensor:
        """See `Kernel.unpack`."""
        return QuantizedTensor(
            codes=unpack(packed["words"], layout.scheme.bits, layout.width),
            scale=packed["scale"],
            zero_point=packed.get("zero"),
            scheme=layout.scheme,
        )

    def linear(self, inputs: Tensor, packed: Mapping[str, Tensor], layout: Layout) -> Tensor:
        """See `Kernel.linear`."""
        parts = self._dense_rows(packed, layout, torch.float32 if inputs.device.type == "cpu" else inputs.dtype)
        if not layout.transposed:
            return torch.cat([inputs.to(part.dtype) @ part.T for part in parts], dim=1).to(inputs.dtype)
        result, first = inputs.new_zeros(len(inputs), layout.width, dtype=torch.float32), 0
        for part in parts:
            result += inputs[:, first : first + len(part)].to(part.dtype) @ part
            first += len(part)
        return result.to(inputs.dtype)

    def dense_rows(self, packed: Mapping[str, Tensor], layout: Layout) -> Iterator[Tensor]:
        """See `Kernel.dense_rows`."""
        return self._dense_rows(packed, layout, torch.float32)

    def _dense_rows(self, packed: Mapping[str, Tensor], layout: Layout, dtype: torch.dtype) -> Iterator[Tensor]:
        rows = max(1, ELEMENTS // layout.width)
        for first in range(0, layout.out, rows):
            part = {name: tensor[first : first + rows] for name, tensor in packed.items()}
            weight = self.unpack({**part, "scale": part["scale"].float()}, layout)  # or the product would be rounded
            yield weight.dequantize().to(dtype)


KERNEL = Reference()
