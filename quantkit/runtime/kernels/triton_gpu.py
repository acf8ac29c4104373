"""Packed inference on NVIDIA GPUs: kernels in Triton that decode the codes in registers.

The layout. A code is cut along the binary digits of `bits` into *planes*, 3 = 2 + 1 and 7 = 4 + 2 + 1; the first
plane holds its low bits. A *word* is 32 bits of the first plane, with the 16, 8 or 4 codes that fill it and none that
straddles it; the other planes have one narrower word beside it, with the rest of the same codes:

    bits           2     3    4     5     6        7    8
    codes a word  16    16    8     8     8        8    4
    bits a word   32 32+16   32  32+8 32+16 32+16+8   32

`lanes` words lie side by side and share out lanes · codes consecutive input features, a *span*, which never leaves
its group: code j of word `lane` is feature j · lanes + lane. So what neighbouring threads multiply with their code j
are neighbours among the activations, and all codes of a word have one scale.

Decoding. A byte of the first plane holds the codes that one shift brings into the mantissa of a float32, and the
other planes are ordered so that neighbours there are as far apart. Masked, and with the exponent of its place, a code
is the float 2^exponent + code, exactly: no integer is converted. The excess and the zero point are taken off, and the
scale is multiplied, once for a few words.

Three ways, by tokens. One or two, and float32: multiply-add in registers; a program reads whole rows, and every packed
byte is read once. Up to 64: decoded weights go into tensor cores; the width is divided so that the GPU is full.
More: a part of the rows is made dense, small enough for the second-level cache, and multiplied by torch; so are
transposed weights and every group size that is no multiple of the codes of a word.

The kernels themselves are in `_triton_code.py`, which is imported when it is needed: only that imports Triton.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from quantkit.core.qtensor import QuantizedTensor
from quantkit.runtime.kernel import Layout

MANTISSA_BITS = 23
LANES = 32  # at most; a span of 4-bit codes has then 256 features
OLDEST = (8, 0)  # compute capability; older GPUs have no bfloat16
ONE = 0x3F800000  # the bits of float32 1
SUM_TOKENS = 2  # up to so many tokens multiply-add costs less than tensor cores, which have 8 columns or more
CORE_TOKENS = 64  # up to so many, tensor cores read packed weights
EXACT_TOKENS = 4  # up to so many in float32, which tensor cores would round, are for multiply-add
CHUNK = 2**24  # weights that are dense at once: 32 MiB of bfloat16
PROGRAMS, WARPS = 264, 2048  # fill a GPU: two and fifteen for each of the 132 multiprocessors of an H100 or H200
WARP_WORDS = 128  # of a row that a warp reads at once, 16 bytes a thread
WHOLE_ROW = 2**30  # spans in a group that is the row
_CONTAINERS = {8: torch.int8, 16: torch.int16, 32: torch.int32}


def planes(bits: int) -> tuple[int, ...]:
    """Return the bits of each plane, the largest first: the binary digits of `bits`."""
    return tuple(plane for plane in (8, 4, 2, 1) if bits & plane)


def codes_per_word(bits: int) -> int:
    """Return how many codes a word holds: as many as 32 bits of the first plane do."""
    return 32 // planes(bits)[0]


def position(bits: int, plane: int, code: int) -> int:
    """Return the lowest bit of code number `code` in a word of plane number `plane`.

    Codes whose places in the first plane's byte are neighbours, `first` bits apart, are as far apart in every plane.
    """
    first, own = planes(bits)[0], planes(bits)[plane]
    byte, place = divmod(code, 8 // first)
    return 8 * (byte * own // first) + first * place + own * (byte % (first // own))


def target(bits: int, code: int) -> int:
    """Return the lowest bit of code number `code` in the mantissa, after the shift that it shares with its byte."""
    first = planes(bits)[0]
    return MANTISSA_BITS - bits - first * (8 // first - 1 - code % (8 // first))


def base(bits: int, plane: int) -> int:
    """Return which bit of a code is the lowest that plane number `plane` holds."""
    return sum(planes(bits)[:plane])


def lanes(layout: Layout) -> int:
    """Return how many words a span has: the largest power of two up to 32 that keeps a span inside a group, or 1."""
    codes = codes_per_word(layout.scheme.bits)
    return max(1, math.gcd(layout.group_size, LANES * codes) // codes)


def words(layout: Layout) -> int:
    """Return how many words a row has."""
    return -(-layout.width // codes_per_word(layout.scheme.bits))


def shares_scale(layout: Layout) -> bool:
    """Return whether all codes of a word are in one group."""
    return layout.groups == 1 or layout.group_size % codes_per_word(layout.scheme.bits) == 0


class TritonGpu:
    """The kernel of CUDA devices; see the module's text for what it packs."""

    def obstacle(self, device: torch.device, layout: Layout) -> str | None:
        """Return why it cannot compute `layout` on `device`, in a phrase, or None if it can."""
        if device.type != "cuda":
            return f"{device.type} is no CUDA device"
        if torch.version.cuda is None:
            return "this build of torch has no CUDA"
        if find_spec("triton") is None:
            return "triton is not installed"
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST:
            return f"compute capability {capability[0]}.{capability[1]} is below {OLDEST[0]}.{OLDEST[1]}"
        if layout.out * words(layout) >= 2**31:
            return f"{layout.out} × {layout.width} weights have too many words for 32-bit offsets"
        return _trouble(device)

    def pack(self, weight: QuantizedTensor) -> dict[str, Tensor]:
        """Return the planes `codes…`, `scale`, and `zero_point` of asymmetric schemes, on the device of `weight`.

        plane of p bits: signed integers of p · codes bits, (out, words); zero_point: uint8, plus 2^(bits-1).
        """
        layout = _layout(weight)
        # a piece at a time, for what is computed takes 8 bytes a code
        pieces = [_pack(rows, layout) for rows in weight.codes.split(_rows_at_once(layout.width))]
        packed = {name: torch.cat([piece[number] for piece in pieces]) for number, name in enumerate(_names(layout))}
        packed["scale"] = weight.scale.contiguous()
        if weight.zero_point is not None:
            packed["zero_point"] = (weight.zero_point.to(torch.int16) - layout.scheme.smallest_code).to(torch.uint8)
        return packed

    def unpack(self, packed: Mapping[str, Tensor], layout: Layout) -> QuantizedTensor:
        """Return what `pack` was given; exact."""
        rows = zip(*(packed[name].split(_rows_at_once(layout.width)) for name in _names(layout)), strict=True)
        zero_point = packed.get("zero_point")
        if zero_point is not None:
            zero_point = (zero_point.to(torch.int16) + layout.scheme.smallest_code).to(torch.int8)
        return QuantizedTensor(
            codes=torch.cat([_unpack(planes_of_rows, layout) for planes_of_rows in rows]),
            scale=packed["scale"],
            zero_point=zero_point,
            scheme=layout.scheme,
        )

    def linear(self, inputs: Tensor, packed: Mapping[str, Tensor], layout: Layout) -> Tensor:
        """See `Kernel.linear`."""
        if not len(inputs):
            return inputs.new_empty(0, layout.width if layout.transposed else layout.out)
        with torch.no_grad(), torch.cuda.device_of(inputs):
            return _way(inputs, layout)(inputs, _arguments(packed, layout), layout)

    def dense_rows(self, packed: Mapping[str, Tensor], layout: Layout) -> Iterator[Tensor]:
        """See `Kernel.dense_rows`."""
        rows = min(layout.out, max(1, CHUNK // layout.width))
        dense = packed["scale"].new_empty(rows, layout.width, dtype=torch.float32)
        for start in range(0, layout.out, rows):
            with torch.cuda.device_of(dense):
                part = _dequantize(_arguments(packed, layout), start, dense[: layout.out - start], layout)
            yield part


def _arguments(packed: Mapping[str, Tensor], layout: Layout) -> list[Tensor]:
    """Return the tensors in the order in which the compiled functions take them."""
    codes = [packed[name] for name in _names(layout)]
    unused = [codes[0]] * (3 - len(codes))
    return [*codes, *unused, packed["scale"], packed.get("zero_point", packed["scale"])]


@cache
def _trouble(device: torch.device) -> str | None:
    """Return why Triton cannot add one and one on `device`: it wants a C compiler, headers of Python, a driver."""
    ones, sum_ = torch.ones(2, 1, device=device), torch.zeros(1, device=device)
    try:
        with torch.cuda.device_of(ones):
            _kernels().add_parts[(1,)](ones, sum_, 2, 1, block=1024)
    except Exception as error:  # noqa: BLE001  whatever it raises, another kernel can do the work
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"Triton cannot compile a kernel: {lines[0]}"
    return None if sum_.item() == 2 else "Triton's kernels return wrong sums"


def _way(inputs: Tensor, layout: Layout) -> Callable[[Tensor, list[Tensor], Layout], Tensor]:
    tokens, precise = len(inputs), inputs.dtype == torch.float32
    if layout.transposed or not shares_scale(layout) or tokens > (EXACT_TOKENS if precise else CORE_TOKENS):
        return _by_chunks
    return _by_multiply_add if precise or tokens <= SUM_TOKENS else _by_tensor_cores


def _kernels() -> ModuleType:
    from quantkit.runtime.kernels import _triton_code

    return _triton_code


def _by_multiply_add(x: Tensor, weight: list[Tensor], layout: Layout) -> Tensor:
    tokens, count, side = len(x), words(layout), lanes(layout)
    columns = _power_of_two(tokens)
    rows, warps = _rows_and_warps(layout, columns)
    spans = max(1, warps * WARP_WORDS // side)
    y = x.new_empty(tokens, layout.out)
    _kernels().multiply_add[(_blocks(layout.out, rows),)](
        *(ONE, x, *weight, y, tokens, layout.out, layout.width, count, layout.groups),
        **_constants(layout),
        even=_divides(spans * side, layout),
        exact=x.dtype == torch.float32,
        spans_per_group=_spans_per_group(layout),
        vector=min(4, side),
        block_tokens=columns,
        block_rows=rows,
        block_spans=spans,
        num_warps=warps,
        maxnreg=128 if columns == 1 else 168,  # so that 16 or 12 warps fit a multiprocessor
    )
    return y


@cache
def _rows_and_warps(layout: Layout, columns: int) -> tuple[int, int]:
    """Return the outputs and the warps of a program: many outputs share activations, but the GPU should be full."""
    rows = max(1, 8 // (len(planes(layout.scheme.bits)) * max(1, columns // 2)))
    while rows > 1 and layout.out < PROGRAMS * rows:
        rows //= 2
    warps = min(4, max(1, _power_of_two(words(layout) // WARP_WORDS + 1) // 2))
    while warps > 1 and _blocks(layout.out, rows) * warps >= 2 * WARPS:
        warps //= 2  # for longer loops, which spend less on the sum over threads at their end
    return rows, warps


def _by_tensor_cores(x: Tensor, weight: list[Tensor], layout: Layout) -> Tensor:
    tokens, count, block, rows = len(x), words(layout), 32, 64
    blocks = _blocks(count, block)
    parts = min(blocks, _blocks(PROGRAMS, _blocks(layout.out, rows)))
    words_per_part = _blocks(blocks, parts) * block
    parts = _blocks(count, words_per_part)
    partial = x.new_empty(parts, tokens, layout.out, dtype=torch.float32)
    _kernels().tensor_cores[(_blocks(layout.out, rows), parts)](
        *(x, *weight, partial, tokens, layout.out, layout.width, count, layout.groups, words_per_part),
        **_constants(layout),
        even=_divides(block, layout),
        spans_per_group=_spans_per_group(layout),
        block_tokens=max(8, _power_of_two(tokens)),
        block_rows=rows,
        block_words=block,
        stages=3,
        num_warps=4,
    )
    y = x.new_empty(tokens, layout.out)
    _kernels().add_parts[(_blocks(y.numel(), 1024),)](partial, y, parts, y.numel(), block=1024)
    return y


def _by_chunks(x: Tensor, weight: list[Tensor], layout: Layout) -> Tensor:
    rows = min(layout.out, max(1, CHUNK // layout.width))
    dense = x.new_empty(rows, layout.width)
    if layout.transposed:
        total = x.new_zeros(len(x), layout.width, dtype=torch.float32)
        for start in range(0, layout.out, rows):
            part = x[:, start : start + rows]
            total += part @ _dequantize(weight, start, dense[: part.shape[1]], layout)
        return total.to(x.dtype)
    y = x.new_empty(len(x), layout.out)
    for start in range(0, layout.out, rows):
        part = y[:, start : start + rows]
        torch.mm(x, _dequantize(weight, start, dense[: part.shape[1]], layout).T, out=part)
    return y


def _dequantize(weight: list[Tensor], start: int, dense: Tensor, layout: Layout) -> Tensor:
    """Fill and return `dense` (rows, width) with the weights of the rows from `start` on."""
    stop = start + len(dense)
    _kernels().dequantize[(_blocks(len(dense), 4), _blocks(words(layout), 128))](
        *(*weight, dense, start, stop, layout.width, words(layout), layout.groups, layout.group_size),
        **_constants(layout),
        even=_divides(128, layout),
        shared=shares_scale(layout),
        block_rows=4,
        block_words=128,
        num_warps=4,
    )
    return dense


@cache
def _constants(layout: Layout) -> dict[str, object]:
    """Return the constants of all kernels: how to decode, the zero code of symmetric schemes, the lanes."""
    bits = layout.scheme.bits
    fields = [(plane, code) for plane in range(len(planes(bits))) for code in range(codes_per_word(bits))]
    places = [target(bits, code) + base(bits, plane) for plane, code in fields]
    return {
        "shifts": tuple(place - position(bits, *field) for place, field in zip(places, fields, strict=True)),
        "masks": tuple(
            ((1 << planes(bits)[plane]) - 1) << place for place, (plane, _) in zip(places, fields, strict=True)
        ),
        "exponents": tuple(MANTISSA_BITS - target(bits, code) for code in range(codes_per_word(bits))),
        "middle": float(-layout.scheme.smallest_code) if layout.scheme.symmetric else None,
        "lanes": lanes(layout),
    }


def _spans_per_group(layout: Layout) -> int:
    span = lanes(layout) * codes_per_word(layout.scheme.bits)
    return WHOLE_ROW if layout.groups == 1 else layout.group_size // span


def _divides(block: int, layout: Layout) -> bool:
    """Return whether blocks of so many words fill rows without a rest."""
    return layout.width % (block * codes_per_word(layout.scheme.bits)) == 0


def _blocks(count: int, size: int) -> int:
    return -(-count // size)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _layout(weight: QuantizedTensor) -> Layout:
    out, width = weight.codes.shape
    return Layout(out=out, width=width, scheme=weight.scheme)


def _names(layout: Layout) -> list[str]:
    return [f"codes{plane}" for plane in planes(layout.scheme.bits)]


def _rows_at_once(width: int) -> int:
    return max(1, 2**22 // max(1, width))


def _pack(codes: Tensor, layout: Layout) -> list[Tensor]:
    """Return the planes of some rows: (rows, words) each."""
    bits, side = layout.scheme.bits, lanes(layout)
    count = codes_per_word(bits)
    unsigned = codes.to(torch.int64) - layout.scheme.smallest_code
    unsigned = torch.nn.functional.pad(unsigned, (0, words(layout) * count - layout.width))
    unsigned = unsigned.view(len(codes), -1, count, side).transpose(2, 3).reshape(len(codes), -1, count)
    packed = []
    for number, plane in enumerate(planes(bits)):
        digits = (unsigned >> base(bits, number)) & ((1 << plane) - 1)
        word = (digits << _positions(layout, number, codes.device)).sum(-1)
        sign = 1 << (plane * count - 1)
        packed.append(((word ^ sign) - sign).to(_CONTAINERS[plane * count]))
    return packed


def _unpack(packed: tuple[Tensor, ...], layout: Layout) -> Tensor:
    """Return the codes of some rows, (rows, width), from their planes."""
    bits, side, rows = layout.scheme.bits, lanes(layout), len(packed[0])
    codes = torch.full((1,), layout.scheme.smallest_code, device=packed[0].device)
    for number, (plane, word) in enumerate(zip(planes(bits), packed, strict=True)):
        digits = word.to(torch.int64).unsqueeze(-1) >> _positions(layout, number, word.device)
        codes = codes + ((digits & ((1 << plane) - 1)) << base(bits, number))
    codes = codes.view(rows, -1, side, codes_per_word(bits)).transpose(2, 3).reshape(rows, -1)
    return codes[:, : layout.width].to(torch.int8)


def _positions(layout: Layout, plane: int, device: torch.device) -> Tensor:
    bits = layout.scheme.bits
    return torch.tensor([position(bits, plane, code) for code in range(codes_per_word(bits))], device=device)


KERNEL = TritonGpu()
