"""The kernels that `inference.py` compares: each multiplies activations by one layer's weight.

Every one holds several copies of its weight and goes round them, so that each product reads the weight from memory and
not from a cache.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from quantkit.core.affine import round_to_nearest
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import QuantScheme
from quantkit.runtime.kernel import Kernel, Layout
from quantkit.runtime.kernels import native, reference

COLD = 2**27  # bytes of all copies of a weight; several times the largest cache of the processor

Multiply = Callable[[Tensor, Sequence[Tensor]], Tensor]


@dataclass
class Candidate:
    """A kernel with a weight: `multiply(inputs, parts)`, where `parts` are the tensors of one copy.

    Where there is none, `absent` says why.
    """

    name: str
    parts: Sequence[Tensor] = ()
    multiply: Multiply | None = None
    expected: Tensor | None = None
    dtype: torch.dtype = torch.float32
    absent: str = ""
    copies: Iterator[Sequence[Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.rounds = 1 if self.absent else max(2, -(-COLD // self.size))
        self.copies = itertools.cycle([[part.clone() for part in self.parts] for _ in range(self.rounds)])

    @property
    def size(self) -> int:
        """Bytes that one product reads of the weight."""
        return sum(part.numel() * part.element_size() for part in self.parts)

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return `inputs` (tokens, width) times the next copy of the weight."""
        assert self.multiply is not None
        return self.multiply(inputs.to(self.dtype), next(self.copies))

    def error(self, inputs: Tensor) -> float:
        """Return the largest difference from the product in float64, over the spread of the outputs."""
        assert self.expected is not None
        exact = inputs.to(self.dtype).double() @ self.expected.double().T
        return float((self(inputs).double() - exact).abs().max() / exact.std())


def candidates(out: int, width: int, group_size: int, threads: int) -> list[Candidate]:
    """Return every kernel, with a weight (out, width) of random values."""
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(0)) * width**-0.5
    quantized = {bits: _quantized(weight, bits, group_size) for bits in (2, 3, 4, 8)}
    four = quantized[4]
    return [
        dense(weight, torch.float32),
        dense(weight, torch.bfloat16),
        torch_int4(four, torch.bfloat16),
        torch_int4(four, torch.float32),
        numba_int4(four, threads),
        packed("ours, torch alone, W4", reference.KERNEL, four),
        *(packed(f"ours, C++, W{bits}", native.KERNEL, each) for bits, each in quantized.items()),
    ]


def dense(weight: Tensor, dtype: torch.dtype) -> Candidate:
    """Return torch's product with a dense weight."""
    weight = weight.to(dtype)
    name = f"dense {str(dtype).removeprefix('torch.')}"
    return Candidate(name, [weight], lambda x, parts: linear(x, parts[0]), weight, dtype)


def packed(name: str, kernel: Kernel, weight: QuantizedTensor) -> Candidate:
    """Return one of ours."""
    rows, width = weight.codes.shape
    layout = Layout(out=rows, width=width, scheme=weight.scheme)
    if obstacle := kernel.obstacle(torch.device("cpu"), layout):
        return Candidate(name, absent=obstacle)
    tensors = kernel.pack(weight)
    names = tuple(tensors)

    def multiply(x: Tensor, parts: Sequence[Tensor]) -> Tensor:
        return kernel.linear(x, dict(zip(names, parts, strict=True)), layout)

    return Candidate(name, list(tensors.values()), multiply, _exact(weight))


def torch_int4(weight: QuantizedTensor, dtype: torch.dtype) -> Candidate:
    """Return torch's operator for 4 bits: W = (code − 8) · scale + zero, codes 0 to 15, scale and zero of `dtype`."""
    name = f"torch int4, {str(dtype).removeprefix('torch.')}"
    group_size = weight.scheme.group_size
    scale, zero_point = weight.scale.float(), weight.zero_point
    zero = torch.zeros_like(scale) if zero_point is None else -zero_point * scale
    both = torch.stack([scale.T, zero.T], dim=2).to(dtype).contiguous()  # (groups, out, 2)
    try:
        codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.int() + 8, 1)
    except (AttributeError, RuntimeError) as error:
        return Candidate(name, absent=str(error).splitlines()[0])

    def multiply(x: Tensor, parts: Sequence[Tensor]) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, parts[0], group_size, parts[1])

    scale, zero = (part.float().T.repeat_interleave(group_size, 1) for part in both.unbind(2))
    return Candidate(name, [codes, both], multiply, weight.codes * scale + zero, dtype)


def numba_int4(weight: QuantizedTensor, threads: int) -> Candidate:
    """Return a kernel in numba, row by row: code j of a group in the low bits of byte j, code j + half in the high."""
    name = "numba, W4"
    try:
        import numba
    except ImportError:
        return Candidate(name, absent="numba is not installed")

    @numba.njit(parallel=True, fastmath=True)
    def product(x, sums, codes, scale, zero, y):  # noqa: ANN001, ANN202  numba infers them
        groups, half = codes.shape[1], codes.shape[2]
        for row in numba.prange(codes.shape[0]):
            total = numba.float32(0)
            for group in range(groups):
                inner = numba.float32(0)
                for j in range(half):
                    both = codes[row, group, j]
                    inner += numba.float32(both & 15) * x[group, j] + numba.float32(both >> 4) * x[group, half + j]
                total += scale[row, group] * (inner - numba.float32(zero[row, group]) * sums[group])
            y[row] = total

    size = weight.scheme.group_size or weight.codes.shape[1]
    codes = (weight.codes.int() + 8).to(torch.uint8).unflatten(1, (-1, 2, size // 2))
    zero_point = torch.zeros_like(weight.scale) if weight.zero_point is None else weight.zero_point
    parts = [codes[:, :, 0] | codes[:, :, 1] << 4, weight.scale.float(), (zero_point.int() + 8).to(torch.uint8)]

    def multiply(x: Tensor, parts: Sequence[Tensor]) -> Tensor:
        result, groups = torch.empty(len(x), len(parts[0])), x.unflatten(1, (-1, size))
        arrays = [part.numpy() for part in parts]
        for token, sums, row in zip(groups, groups.sum(2), result, strict=True):
            product(token.numpy(), sums.numpy(), *arrays, row.numpy())
        return result

    numba.set_num_threads(threads)
    multiply(torch.zeros(1, weight.codes.shape[1]), parts)
    torch.set_num_threads(threads)  # numba's first product starts its threads, and sets OpenMP's number for all
    return Candidate(name, parts, multiply, _exact(weight))


def _quantized(weight: Tensor, bits: int, group_size: int) -> QuantizedTensor:
    return round_to_nearest(weight, QuantScheme(bits=bits, group_size=group_size), torch.bfloat16)


def _exact(weight: QuantizedTensor) -> Tensor:
    """Return (codes − zero point) · scale in float32, where a dense checkpoint has it rounded to 16 bits."""
    wide = replace(weight, scale=weight.scale.float())
    return wide.dequantize()
