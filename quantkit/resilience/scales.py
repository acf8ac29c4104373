"""Protection of scales: a flipped bit of a code moves one weight by steps, one of a scale a group by up to 65,536.

What is kept beside the scales, per scale of 16 bits, and what it does to those that changed:

    clamp      nothing (12 bytes a tensor)  the sign is dropped, the size clamped to the range that the tensor had
    parity     1 bit                        an odd number of flips is seen; the neighbours' mean takes the place
    secded64   2 bits                       of four scales: one flip is put right, two are seen (see `core.secded`)
    secded     6 bits                       of one scale: the same
    copy       16.5 bits                    a second copy, and a checksum of each 32 scales says which copy is right

Scales are positive and finite, so what is not is damaged, whatever the protection says of it. What is only seen is
replaced by the mean of the two neighbour groups of its row. A duplicate of sign and exponent would take as many bits as
`secded` and put less right.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from quantkit.core import secded
from quantkit.errors import UsageError, nearest
from quantkit.resilience.flips import Bits
from quantkit.resilience.side_file import COPIES, vote

ScaleKind = Literal["clamp", "parity", "secded64", "secded", "copy"]
SCALE_KINDS: tuple[str, ...] = get_args(ScaleKind)
BLOCK, PRIME = 32, 65521  # scales under one checksum; the largest prime of 16 bits
_WORDS = {"secded": 16, "secded64": 64}  # data bits of a code word


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """Scales after a repair.

    Attributes:
        scale: of the shape and dtype that they had.
        corrected: scales that changed back to what they were, as far as the protection can tell.
        replaced: scales in whose place another value was put.
    """

    scale: Tensor
    corrected: int
    replaced: int


def protect_scales(scale: Tensor, kind: str) -> dict[str, Tensor]:
    """Return what `kind` keeps of `scale` (rows, groups), float16 or bfloat16, positive and finite.

    Raises:
        UsageError: an unknown kind, scales of another dtype or that are no scales.
    """
    if kind not in SCALE_KINDS:
        raise UsageError(f"unknown protection of scales {kind!r}{nearest(kind, SCALE_KINDS)}")
    if scale.element_size() != 2:
        raise UsageError(
            f"scales of {str(scale.dtype).removeprefix('torch.')} cannot be protected, those of 16 bits can"
        )
    if bool(_implausible(scale).any()):
        raise UsageError("scales that are not positive and finite cannot be protected; the checkpoint is damaged")
    return _PROTECT[kind](scale.contiguous())


def repair_scales(scale: Tensor, guard: Mapping[str, Tensor], kind: str) -> Repaired:
    """Return `scale` (rows, groups) as it was when `guard` was made of it, as far as that can be told.

    Both may be damaged. The result is positive and finite.
    """
    repaired, bad = _REPAIR[kind](scale.contiguous(), guard)
    bad = bad | _implausible(repaired)
    result = _from_neighbours(repaired, bad)
    changed, replaced = int((~bad & (_integers(repaired) != _integers(scale))).sum()), int(bad.sum())
    if kind == "clamp":  # another value, if a harmless one
        return Repaired(scale=result, corrected=0, replaced=replaced + changed)
    return Repaired(scale=result, corrected=changed, replaced=replaced)


def guard_bits(guard: Tensor, kind: str, scales: int) -> Bits:
    """Return the bits of one part of the guard of so many scales; the last byte may have unused ones."""
    if kind in ("parity", "secded"):
        return Bits(tensor=guard.view(1, -1), width=1, valid=scales * (1 if kind == "parity" else 6))
    return Bits(tensor=guard, width=8 * guard.element_size())


def guard_bytes(guard: Mapping[str, Tensor]) -> int:
    """Return the size of what is kept."""
    return sum(part.numel() * part.element_size() for part in guard.values())


def _implausible(scale: Tensor) -> Tensor:
    return ~(scale.isfinite() & (scale > 0))


def _integers(scale: Tensor) -> Tensor:
    return scale.view(torch.int16)


def _from_neighbours(scale: Tensor, bad: Tensor) -> Tensor:
    """Return `scale` (rows, groups) with the mean of the good neighbours in the row where it is bad.

    Where both are bad: the mean of the row's good ones, else that of all good ones.
    """
    if not bool(bad.any()):
        return scale
    good = torch.where(bad, 0.0, scale.float())
    kept = (~bad).float()
    near, count = (
        torch.nn.functional.pad(part, (1, 1)).unfold(1, 3, 1).select(2, 0)
        + torch.nn.functional.pad(part, (1, 1)).unfold(1, 3, 1).select(2, 2)
        for part in (good, kept)
    )
    rows, row_count = (part.sum(1, keepdim=True).expand_as(good) for part in (good, kept))
    every = good.sum() / kept.sum().clamp(min=1)
    mean = torch.where(count > 0, near / count, torch.where(row_count > 0, rows / row_count, every))
    return torch.where(bad, mean.to(scale.dtype), scale)


def _clamp_guard(scale: Tensor) -> dict[str, Tensor]:
    return {"range": torch.stack([scale.min(), scale.max()]).repeat(COPIES, 1)}


def _clamp(scale: Tensor, guard: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    low, high = vote(list(guard["range"].view(torch.int16))).view(scale.dtype)
    bad = scale.isnan()
    return scale.abs().clamp(low, high).where(~bad, low), torch.zeros_like(bad)


def _parity(scale: Tensor) -> Tensor:
    bits = _integers(scale).flatten().to(torch.int64) & 0xFFFF
    for shift in (8, 4, 2, 1):
        bits = bits ^ (bits >> shift)
    return bits & 1


def _parity_guard(scale: Tensor) -> dict[str, Tensor]:
    return {"parity": _packed(_parity(scale), 1)}


def _parity_check(scale: Tensor, guard: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    stored = _unpacked(guard["parity"], 1, scale.numel())
    return scale, (stored != _parity(scale)).view_as(scale)


def _words(scale: Tensor, width: int) -> Tensor:
    """Return the scales as int64 words of `width` bits, the last one filled up with zeros."""
    values, each = _integers(scale).flatten().to(torch.int64) & 0xFFFF, width // 16
    values = torch.nn.functional.pad(values, (0, -len(values) % each)).view(-1, each)
    return (values << torch.arange(0, width, 16)).sum(1)  # the bits are disjoint, and the top one may be the sign


def _secded_guard(kind: str) -> Callable[[Tensor], dict[str, Tensor]]:
    width = _WORDS[kind]
    return lambda scale: {"checks": _packed(secded.encode(_words(scale, width), width), secded.check_bits(width))}


def _secded_repair(kind: str) -> Callable[[Tensor, Mapping[str, Tensor]], tuple[Tensor, Tensor]]:
    width, each = _WORDS[kind], _WORDS[kind] // 16

    def repair(scale: Tensor, guard: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        words = _words(scale, width)
        words, state = secded.correct(words, _unpacked(guard["checks"], secded.check_bits(width), len(words)), width)
        values = (words[:, None] >> torch.arange(0, width, 16)).flatten()[: scale.numel()] & 0xFFFF
        bad = (state == secded.DETECTED).repeat_interleave(each)[: scale.numel()]
        return _scales(values, scale), bad.view_as(scale)

    return repair


def _scales(values: Tensor, like: Tensor) -> Tensor:
    """Return 16-bit patterns as scales of the shape and dtype of `like`."""
    return torch.where(values > 0x7FFF, values - 0x10000, values).to(torch.int16).view(like.dtype).view_as(like)


def _checksums(scale: Tensor) -> Tensor:
    """Return Σ (i + 1) x_i mod `PRIME` of each block of scales: no change of one scale leaves it as it is."""
    values = torch.nn.functional.pad(_integers(scale).flatten().to(torch.int64) & 0xFFFF, (0, -scale.numel() % BLOCK))
    return (values.view(-1, BLOCK) * torch.arange(1, BLOCK + 1)).sum(1) % PRIME


def _copy_guard(scale: Tensor) -> dict[str, Tensor]:
    sums = _checksums(scale)
    return {"copy": scale.clone(), "sums": torch.where(sums > 0x7FFF, sums - 0x10000, sums).to(torch.int16)}


def _copy_repair(scale: Tensor, guard: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    copy, stored = guard["copy"], guard["sums"].to(torch.int64) & 0xFFFF
    own, other = (
        (_checksums(each) == stored).repeat_interleave(BLOCK)[: scale.numel()].view_as(scale) for each in (scale, copy)
    )
    agree = _integers(scale) == _integers(copy)
    # where a checksum is right, its copy is; where neither is, what both have is
    return torch.where(own | ~other, scale, copy), ~(own | other | agree)


def _packed(values: Tensor, bits: int) -> Tensor:
    """Return int64 values of `bits` bits each as a dense stream of bits in bytes: uint8."""
    stream = (values[:, None] >> torch.arange(bits) & 1).flatten()
    stream = torch.nn.functional.pad(stream, (0, -len(stream) % 8)).view(-1, 8)
    return (stream << torch.arange(8)).sum(1).to(torch.uint8)


def _unpacked(stream: Tensor, bits: int, count: int) -> Tensor:
    """Return the `count` values of a stream; the inverse of `_packed`."""
    found = (stream.to(torch.int64)[:, None] >> torch.arange(8) & 1).flatten()[: count * bits]
    return (found.view(count, bits) << torch.arange(bits)).sum(1)


_PROTECT: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {
    "clamp": _clamp_guard,
    "parity": _parity_guard,
    "secded64": _secded_guard("secded64"),
    "secded": _secded_guard("secded"),
    "copy": _copy_guard,
}
_REPAIR: dict[str, Callable[[Tensor, Mapping[str, Tensor]], tuple[Tensor, Tensor]]] = {
    "clamp": _clamp,
    "parity": _parity_check,
    "secded64": _secded_repair("secded64"),
    "secded": _secded_repair("secded"),
    "copy": _copy_repair,
}
