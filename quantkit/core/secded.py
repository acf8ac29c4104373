"""Extended Hamming codes: one wrong bit of a word is corrected, two are detected (SECDED).

R. Hamming, "Error Detecting and Error Correcting Codes" (1950), sections 3 and 4. The bits of a code word have the
places 1, 2, 3, …; those at powers of two are checks, each the parity of the places whose number has its bit, and one
more check is the parity of all. The checks that disagree then spell the number of the wrong place. 16 data bits take 6
checks (22, 16), 64 take 8 (72, 64), as in memory modules.
"""

from functools import cache

import torch
from jaxtyping import Int64
from torch import Tensor

FINE, CORRECTED, DETECTED = 0, 1, 2


@cache
def places(data_bits: int) -> tuple[int, ...]:
    """Return the places of the data bits in a code word, lowest first: all but the powers of two."""
    found: list[int] = []
    place = 1
    while len(found) < data_bits:
        place += 1
        if place & (place - 1):
            found.append(place)
    return tuple(found)


def check_bits(data_bits: int) -> int:
    """Return how many check bits a word has."""
    return places(data_bits)[-1].bit_length() + 1


def encode(words: Int64[Tensor, " n"], data_bits: int) -> Int64[Tensor, " n"]:
    """Return the check bits of each word: Hamming's in the low bits, the parity of all on top."""
    hamming = _hamming(words, data_bits)
    return hamming | _parity(words ^ _parity(hamming)) << (check_bits(data_bits) - 1)


def correct(
    words: Int64[Tensor, " n"], checks: Int64[Tensor, " n"], data_bits: int
) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " n"]]:
    """Return the words with single wrong bits put right, and FINE, CORRECTED or DETECTED of each.

    A wrong check bit leaves a word as it is, which is CORRECTED too; what is DETECTED is left as it is.
    """
    top = check_bits(data_bits) - 1
    hamming = checks & ((1 << top) - 1)
    place = hamming ^ _hamming(words, data_bits)
    odd = _parity(words) ^ _parity(hamming) ^ (checks >> top & 1)
    flips = _flip_at(data_bits).to(words.device)[place]
    # an even number of wrong bits that agree in nothing, or a place that no word has
    beyond = (odd == 0) & (place != 0) | (odd == 1) & (place > places(data_bits)[-1])
    state = torch.where(beyond, DETECTED, odd)
    return torch.where(state == CORRECTED, words ^ flips, words), state


@cache
def _masks(data_bits: int) -> tuple[int, ...]:
    """Return, for each Hamming check, the data bits that it covers."""
    covered = enumerate(places(data_bits))
    rows = [(bit, place) for bit, place in covered]
    return tuple(
        _signed(sum(1 << bit for bit, place in rows if place >> check & 1))
        for check in range(check_bits(data_bits) - 1)
    )


def _signed(mask: int) -> int:
    """Return an unsigned mask of 64 bits as the int64 of the same bits."""
    return mask - (1 << 64) if mask >> 63 else mask


def _hamming(words: Tensor, data_bits: int) -> Tensor:
    checks = torch.zeros_like(words)
    for number, mask in enumerate(_masks(data_bits)):
        checks |= _parity(words & mask) << number
    return checks


def _parity(words: Tensor) -> Tensor:
    """Return the parity of the 64 bits of each word; the sign that shifts bring in lies above the bits that count."""
    for shift in (32, 16, 8, 4, 2, 1):
        words = words ^ (words >> shift)
    return words & 1


@cache
def _flip_at(data_bits: int) -> Tensor:
    """Return, for each place, the data bit that is there as a mask, 0 where there is none."""
    table = torch.zeros(1 << (check_bits(data_bits) - 1), dtype=torch.int64)
    for bit, place in enumerate(places(data_bits)):
        table[place] = _signed(1 << bit)
    return table
