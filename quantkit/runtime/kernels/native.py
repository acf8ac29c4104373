"""A C++ kernel for CPUs, compiled on first use: reads each packed byte once and computes in float32.

Few tokens are bound by memory, so the packed weight is read as it is and decoded in registers. Many tokens are bound
by arithmetic: there a part of the weight at a time is made dense and multiplied by torch.

`native.cpp` has the layout of the packed tensors.
"""

import math
from collections.abc import Iterator, Mapping
from ctypes import Array, byref

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantkit.core.qtensor import QuantizedTensor
from quantkit.runtime.kernel import Layout
from quantkit.runtime.kernels.compiler import CompilerError, Weight, library

LANES, CHUNK = 16, 32  # rows of a panel, columns of a chunk
STEP = 8  # a group is whole steps
ANY_BITS = 4  # of the library from which `dense_linear` is taken, in which codes play no part
DENSE_TOKENS = 12  # more of them are faster through dense parts of a weight of 16 bits
DENSE_BYTES = 2**22  # of a dense part: it should stay in the cache until it was multiplied


def planes(bits: int) -> list[int]:
    """Return the planes of a code, widest first: 3 bits are a plane of two bits and one of one bit."""
    return [plane for plane in (8, 4, 2, 1) if bits & plane]


class Native:
    """The kernel; see the module."""

    def obstacle(self, device: torch.device, layout: Layout) -> str | None:
        """See `Kernel.obstacle`."""
        if device.type != "cpu":
            return f"it runs on CPUs, not on {device.type}"
        if layout.transposed:
            return "its rows are input features"
        if layout.groups > 1 and layout.group_size % STEP:
            return f"groups of {layout.group_size} are no multiple of {STEP}"
        try:
            library(layout.scheme.bits)
        except CompilerError as error:
            return str(error)
        return None

    def pack(self, weight: QuantizedTensor) -> dict[str, Tensor]:
        """See `Kernel.pack`: int32 codes, scales of 16 bits and uint8 zero points, by panels."""
        width = weight.codes.shape[1]
        bits, offset = weight.scheme.bits, 1 << (weight.scheme.bits - 1)
        parts = [
            _pack_rows(part, bits, offset) for part in weight.codes.split(LANES * max(1, 2**20 // (LANES * width)))
        ]
        packed = {"codes": torch.cat(parts), "scale": _panels(weight.scale)}
        if weight.zero_point is not None:
            packed["zero"] = _panels((weight.zero_point.to(torch.int16) + offset).to(torch.uint8))
        return packed

    def unpack(self, packed: Mapping[str, Tensor], layout: Layout) -> QuantizedTensor:
        """See `Kernel.unpack`."""
        bits, offset = layout.scheme.bits, 1 << (layout.scheme.bits - 1)
        zero = packed.get("zero")
        codes = [_unpack_panels(part, bits, offset)[:, : layout.width] for part in packed["codes"].split(64)]
        return QuantizedTensor(
            codes=torch.cat(codes)[: layout.out].contiguous(),
            scale=_rows(packed["scale"])[: layout.out].contiguous(),
            zero_point=None
            if zero is None
            else (_rows(zero)[: layout.out].to(torch.int16) - offset).to(torch.int8).contiguous(),
            scheme=layout.scheme,
        )

    def linear(self, inputs: Tensor, packed: Mapping[str, Tensor], layout: Layout) -> Tensor:
        """See `Kernel.linear`."""
        if len(inputs) > _few(inputs.dtype, layout):
            return _through_dense(inputs, packed, layout)
        wide = inputs.float()
        if layout.width % CHUNK:
            wide = pad(wide, (0, -layout.width % CHUNK))
        weights = (Weight * 1)(weight_at(packed, layout))
        return products(wide, weights, layout.out, layout).to(inputs.dtype)

    def dense_rows(self, packed: Mapping[str, Tensor], layout: Layout) -> Iterator[Tensor]:
        """See `Kernel.dense_rows`."""
        for first, part in _dense_parts(packed, layout, torch.float32):
            yield part[:, : layout.out - first].T


KERNEL = Native()


def dense_linear(inputs: Tensor, weight: Tensor) -> Tensor:
    """Return float32 `inputs` (tokens, width) times the transposed 16-bit `weight` (out, width): (tokens, out).

    Raises:
        CompilerError: there is no library.
    """
    (out, width), tokens = weight.shape, len(inputs)
    result = torch.empty(tokens, out)
    half = weight.dtype == torch.float16
    library(ANY_BITS).quantkit_dense(
        weight.data_ptr(), out, width, half, inputs.data_ptr(), tokens, result.data_ptr(), torch.get_num_threads()
    )
    return result


def weight_at(packed: Mapping[str, Tensor], layout: Layout) -> Weight:
    """Return what `packed` is to the compiled functions; its tensors have to outlive it."""
    scale, zero = packed["scale"], packed.get("zero")
    pointers = packed["codes"].data_ptr(), scale.data_ptr(), None if zero is None else zero.data_ptr()
    return Weight(*pointers, layout.out, layout.width, layout.groups, scale.dtype == torch.float16)


def products(inputs: Tensor, weights: "Array[Weight]", out: int, layout: Layout) -> Tensor:
    """Return `inputs` times several transposed weights, side by side: float32 (tokens, out).

    Args:
        inputs: float32 (tokens, columns), contiguous; as many columns as whole chunks have.
        weights: of one width, scheme and group size.
        out: sum of their output features.
        layout: of any of them.
    """
    tokens = len(inputs)
    result = torch.empty(tokens, out)
    step, threads = _step(layout), torch.get_num_threads()
    library(layout.scheme.bits).quantkit_linear(
        weights, len(weights), step, inputs.data_ptr(), tokens, result.data_ptr(), threads
    )
    return result


def _step(layout: Layout) -> int:
    return STEP if layout.groups > 1 and layout.group_size % CHUNK else CHUNK


def _few(dtype: torch.dtype, layout: Layout) -> float:
    """Return up to how many tokens decoding in registers is faster than dense parts; see docs/inference.md."""
    if _step(layout) != CHUNK or not library(layout.scheme.bits).quantkit_multiplies_bytes():
        return 12
    return 128 if dtype == torch.bfloat16 else math.inf


def _through_dense(inputs: Tensor, packed: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """Multiply by some rows at a time, made dense and transposed in a buffer that stays in the cache."""
    inputs = inputs if inputs.dtype == torch.bfloat16 else inputs.float()
    result = inputs.new_empty(len(inputs), len(packed["codes"]) * LANES)
    for first, part in _dense_parts(packed, layout, inputs.dtype):
        torch.mm(inputs, part, out=result[:, first : first + part.shape[1]])
    return result[:, : layout.out].contiguous()


def _dense_parts(packed: Mapping[str, Tensor], layout: Layout, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Yield which row is the first, and some rows: (width, rows), transposed in a buffer, those of padding included."""
    weight, panels = byref(weight_at(packed, layout)), len(packed["codes"])
    at_once = min(panels, max(1, DENSE_BYTES // (LANES * layout.width * dtype.itemsize)))
    dense = torch.empty(at_once * LANES * layout.width, dtype=dtype)
    for first in range(0, panels, at_once):
        last = min(first + at_once, panels)
        part = dense[: (last - first) * LANES * layout.width].view(layout.width, -1)
        library(layout.scheme.bits).quantkit_dequantize(
            weight, first, last, part.data_ptr(), dtype == torch.bfloat16, torch.get_num_threads()
        )
        yield first * LANES, part


def _pack_rows(codes: Tensor, bits: int, offset: int) -> Tensor:
    """Return int8 codes (rows, width) as int32 (panels, chunks, bits, LANES), padded with zeros both ways."""
    rows, width = codes.shape
    unsigned = pad(codes.to(torch.int32) + offset, (0, -width % CHUNK, 0, -rows % LANES))
    chunks = unsigned.view(-1, LANES, unsigned.shape[1] // CHUNK, CHUNK).permute(
        0, 2, 3, 1
    )  # panel, chunk, column, lane
    words, above = [], bits
    for plane in planes(bits):
        above -= plane
        # panel, chunk, word, quad of the word, byte, lane
        part = ((chunks >> above) & ((1 << plane) - 1)).view(*chunks.shape[:2], plane, 8 // plane, 4, LANES)
        # bits do not overlap, so the sum is their union; int32 may wrap into its sign, which is a bit like others
        words.append((part << _shifts(plane, codes.device)).sum((3, 4), dtype=torch.int32))
    return torch.cat(words, dim=2)


def _unpack_panels(words: Tensor, bits: int, offset: int) -> Tensor:
    """Return the int8 codes (rows, columns) of int32 (panels, chunks, bits, LANES), padding included."""
    codes, first, above = words.new_zeros(()), 0, bits
    for plane in planes(bits):
        above -= plane
        part = words[:, :, first : first + plane, None, None] >> _shifts(plane, words.device)
        codes = codes | (part & ((1 << plane) - 1)).flatten(2, 4) << above
        first += plane
    rows = codes.permute(0, 3, 1, 2).reshape(len(words) * LANES, -1)
    return (rows - offset).to(torch.int8)


def _shifts(plane: int, device: torch.device) -> Tensor:
    """Return where the codes of each quad and column lie in a word: int32 (quads, 4, 1)."""
    quads = torch.arange(0, 8, plane, dtype=torch.int32, device=device).view(-1, 1, 1)
    return quads + torch.arange(0, 32, 8, dtype=torch.int32, device=device).view(4, 1)


def _panels(values: Tensor) -> Tensor:
    """Return (rows, groups) as (panels, groups, LANES), padded with zeros."""
    padded: Tensor = pad(values, (0, 0, 0, -len(values) % LANES)).unflatten(0, (-1, LANES))
    return padded.transpose(1, 2).contiguous()


def _rows(panels: Tensor) -> Tensor:
    """Return (panels, groups, LANES) as (rows, groups)."""
    rows: Tensor = panels.transpose(1, 2).flatten(0, 1)
    return rows
