"""Directions to try: standard normal numbers that anybody has again who knows four small things about them.

Master seed, step, direction and the name of a tensor are hashed to a key of Philox-4x64-10 (Salmon et al., "Parallel
Random Numbers: As Easy as 1, 2, 3", 2011), a generator whose n-th number is a function of key and n. Its 64-bit words
become normal numbers by Box and Muller in float64. Logarithm, sine and cosine are series of sums, products and
quotients, which IEEE 754 rounds in one way only: the numbers are the same in every process, on every machine and under
every version of numpy or PyTorch. They are no secret, and no protection: the noise of privacy is in `chance.py`.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALGORITHM = "sha256/philox4x64-10/box-muller-series/1"  # the last number changes with the numbers
CHUNK = 2**16  # pairs of numbers in float64 at a time

Reals = NDArray[np.float64]


def normal(seed: int, step: int, direction: int, name: str, shape: Sequence[int]) -> Tensor:
    """Return standard normal numbers of `shape`, float32 on the CPU; the first ones are the same for every shape."""
    words = np.random.Philox(key=_key(seed, step, direction, name))
    count = math.prod(shape)
    made = np.empty((-(-count // 2), 2), dtype=np.float32)
    for start in range(0, len(made), CHUNK):
        part = made[start : start + CHUNK]
        part[:] = _pairs(words.random_raw(2 * len(part)).reshape(-1, 2))
    return torch.from_numpy(made.reshape(-1)[:count].reshape(tuple(shape)))


def _key(seed: int, step: int, direction: int, name: str) -> int:
    told = f"{seed} {step} {direction} {name}".encode()
    return int.from_bytes(hashlib.sha256(told).digest()[:16], "little")


def _pairs(words: NDArray[np.uint64]) -> Reals:
    """Return independent normal numbers (n, 2) from words (n, 2): sqrt(-2 ln u) times cosine and sine of an angle."""
    units = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # strictly between 0 and 1
    radius = np.sqrt(-2.0 * _logarithm(units[:, 0]))
    return np.stack(_circle(units[:, 1]), axis=1) * radius[:, None]


def _logarithm(value: Reals) -> Reals:
    """Return ln: with value = m 2^e and s = (m - 1) / (m + 1) it is e ln 2 + 2 (s + s^3/3 + s^5/5 + ...)."""
    mantissa, exponent = np.frexp(value)
    small = mantissa < math.sqrt(0.5)
    mantissa, exponent = np.where(small, 2.0 * mantissa, mantissa), exponent - small
    ratio = (mantissa - 1.0) / (mantissa + 1.0)  # at most 0.172 in size, so 12 terms are all that float64 can tell
    return exponent * math.log(2.0) + 2.0 * ratio * _series(ratio * ratio, [1 / (2 * k + 1) for k in range(12)])


def _circle(turns: Reals) -> tuple[Reals, Reals]:
    """Return cosine and sine of so many turns, by Taylor's series within an eighth of a turn."""
    quarter = np.rint(4.0 * turns)
    angle = (turns - 0.25 * quarter) * (2.0 * math.pi)
    square, quarter = -angle * angle, quarter.astype(np.int64) % 4
    cosine = _series(square, [1 / math.factorial(2 * k) for k in range(10)])
    sine = angle * _series(square, [1 / math.factorial(2 * k + 1) for k in range(10)])
    swapped = quarter % 2 == 1
    return (
        np.where(swapped, sine, cosine) * np.where((quarter == 1) | (quarter == 2), -1.0, 1.0),
        np.where(swapped, cosine, sine) * np.where(quarter >= 2, -1.0, 1.0),
    )


def _series(x: Reals, coefficients: Sequence[float]) -> Reals:
    """Return the sum of coefficients[k] x^k, by Horner's rule."""
    total = np.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + coefficient
    return total
