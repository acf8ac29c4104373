"""Faults of memory in tensors: which bits they hit, hitting them in place, and putting them back.

Of N bits each is hit with probability p, independently: their number is binomial, their places are uniform and differ.
Everything is drawn from a seed and names alone, so that any process makes the same faults.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from quantkit.errors import UsageError, nearest

Kind = Literal["flip", "stuck0", "stuck1", "burst"]
KINDS: tuple[str, ...] = get_args(Kind)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to a bit that is hit.

    Attributes:
        kind: `flip`; `stuck0` and `stuck1`: it reads as 0 or 1; `burst`: it and those behind it flip.
        length: bits of a burst.
    """

    kind: Kind = "flip"
    length: int = 2

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"unknown fault {self.kind!r}{nearest(self.kind, KINDS)}")
        if self.length < 1:
            raise UsageError(f"a burst has at least 1 bit, not {self.length}")


@dataclass(frozen=True, kw_only=True)
class Bits:
    """The bits of a contiguous tensor that mean something, numbered; padding has no number.

    Attributes:
        tensor: any dtype.
        width: bits of one value, so that bit i is bit `i % width` of a value.
        valid: for dense streams of bits along `axis` of a matrix: how many of each stream are used; None: all bits of
            the tensor, element after element.
        axis: along which the words of one stream lie.
    """

    tensor: Tensor
    width: int
    valid: int | None = None
    axis: int = 1

    @property
    def total(self) -> int:
        """How many bits there are."""
        if self.valid is None:
            return self.tensor.numel() * self._word
        return self.tensor.shape[1 - self.axis] * self.valid

    @property
    def _word(self) -> int:
        return 8 * self.tensor.element_size()

    def locate(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Return the element, counted in memory, and the bit of it of each numbered bit."""
        if self.valid is None:
            return numbers // self._word, numbers % self._word
        stream, bit = numbers // self.valid, numbers % self.valid
        word, columns = bit // self._word, self.tensor.shape[1]
        element = stream * columns + word if self.axis == 1 else word * columns + stream
        return element, bit % self._word


@dataclass(frozen=True, kw_only=True)
class Damage:
    """What was changed: `elements` of a tensor, each in the bits of its mask. Applied again, it is undone."""

    elements: Tensor
    masks: Tensor

    @property
    def flips(self) -> int:
        """How many bits changed."""
        masks = self.masks
        return sum(int((masks >> bit & 1).sum()) for bit in range(8 * masks.element_size()))

    def apply(self, tensor: Tensor) -> None:
        """Flip the bits, in place."""
        flat = tensor.view(-1).view(self.masks.dtype)
        flat[self.elements] ^= self.masks


def generator(*key: object) -> torch.Generator:
    """Return a generator whose seed is made of all parts of `key`."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def refuse_rate(rate: float) -> None:
    """Raise UsageError unless `rate` is a probability."""
    if not 0 <= rate <= 1:  # NaN too
        raise UsageError(f"a rate is a probability from 0 to 1, not {rate:g}")


def draw(total: int, rate: float, random: torch.Generator) -> Tensor:
    """Return which of `total` bits are hit with probability `rate` each: int64, ascending, each once."""
    refuse_rate(rate)
    mean = torch.tensor(float(total), dtype=torch.float64), torch.tensor(rate, dtype=torch.float64)
    return draw_exactly(total, int(torch.binomial(*mean, generator=random)), random)


def draw_exactly(total: int, count: int, random: torch.Generator) -> Tensor:
    """Return `count` different numbers below `total`, uniform: int64, ascending."""
    if 2 * count > total:
        return torch.randperm(total, generator=random)[:count].sort().values
    found = torch.zeros(0, dtype=torch.int64)
    while len(found) < count:  # of what is drawn twice, the second is drawn again
        more = torch.randint(total, (count - len(found),), generator=random)
        found = torch.cat([found, more]).unique()
    return found


def strike(bits: Bits, numbers: Tensor, fault: Fault) -> Damage:
    """Let `fault` happen to the numbered bits, in place; return what changed."""
    element, bit = bits.locate(_spread(numbers, fault, bits.total))
    elements, which = element.unique(return_inverse=True)
    masks = torch.zeros(len(elements), dtype=torch.int64).index_add_(0, which, torch.ones_like(bit) << bit)
    integers = _INTEGERS[bits.tensor.element_size()]
    flat = bits.tensor.view(-1).view(integers)
    masks = _narrow(masks, integers)
    if fault.kind == "stuck0":
        masks = masks & flat[elements]
    if fault.kind == "stuck1":
        masks = masks & ~flat[elements]
    damage = Damage(elements=elements[masks != 0], masks=masks[masks != 0])
    damage.apply(bits.tensor)
    return damage


def pass_faults(values: Tensor, rate: float, fault: Fault, dtype: torch.dtype, random: torch.Generator) -> Tensor:
    """Return `values` as they come out of a memory of 16-bit `dtype` of which `fault` hits each bit with `rate`.

    What is not hit is not rounded either.
    """
    total = 16 * values.numel()
    numbers = _spread(draw(total, rate, random), fault, total)
    if not len(numbers):
        return values
    elements, which = (numbers // 16).unique(return_inverse=True)
    result = values.clone(memory_format=torch.contiguous_format)
    flat = result.view(-1)
    hit = flat[elements.to(values.device)].to(dtype).cpu()
    once = fault if fault.kind != "burst" else Fault()  # already spread
    strike(Bits(tensor=hit, width=16), 16 * which + numbers % 16, once)
    flat[elements.to(values.device)] = hit.to(flat)
    return result


def _spread(numbers: Tensor, fault: Fault, total: int) -> Tensor:
    """Return the bits that are hit where faults begin at `numbers`."""
    if fault.kind != "burst":
        return numbers
    spread: Tensor = (numbers[:, None] + torch.arange(fault.length)).flatten().unique()
    return spread[spread < total]


def _narrow(masks: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the low bits of int64 masks as integers of `dtype`, whose top bit may be a sign."""
    width = torch.iinfo(dtype).bits
    if dtype in (torch.uint8, torch.int64):
        return masks.to(dtype)
    return torch.where(masks >= 1 << (width - 1), masks - (1 << width), masks).to(dtype)
