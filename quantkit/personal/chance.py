"""Random numbers that nobody can guess without the key, and that everybody with the key has again.

SHAKE-256 of the key and of what the numbers are for, read as 64-bit words. The generators of PyTorch are no choice for
privacy: that of CPUs keeps 32 bits of its seed, so that noise could be found by trying all seeds. Normal numbers are
half the sum of four, each by Box and Muller in float64, so that the bits of a sum do not tell what noise is in it
(Holohan and Braghin, "Secure Random Sampling in Differential Privacy", 2021).
"""

import math
import secrets
from collections.abc import Sequence
from hashlib import shake_256

import torch
from jaxtyping import Float
from torch import Tensor

SUMMED = 4  # normal numbers in each that is returned


def secret_key() -> bytes:
    """Return 256 bits of the operating system's that were never used before."""
    return secrets.token_bytes(32)


def fixed_key(seed: int) -> bytes:
    """Return the key of a seed: everybody who knows the seed knows it, so nothing that is made with it is private."""
    return f"seed {seed}".encode()


def uniform(key: bytes, purpose: str, count: int) -> Float[Tensor, " count"]:
    """Return `count` numbers in [0, 1), multiples of 2^-53, the same ones for the same key and purpose."""
    stream = shake_256(len(key).to_bytes(8, "little") + key + purpose.encode()).digest(8 * count)
    words = torch.frombuffer(bytearray(stream), dtype=torch.int64) if count else torch.zeros(0, dtype=torch.int64)
    return ((words >> 11) & (2**53 - 1)).to(torch.float64) * 2.0**-53


def normal(key: bytes, purpose: str, shape: Sequence[int]) -> Tensor:
    """Return standard normal numbers of a shape, float64, the same ones for the same key and purpose."""
    count = math.prod(shape)
    drawn = uniform(key, purpose, 2 * SUMMED * count).view(2, SUMMED, count)
    radius = torch.sqrt(-2 * torch.log1p(-drawn[0]))  # of 1 - u, which is never 0
    return ((radius * torch.cos(2 * math.pi * drawn[1])).sum(0) / math.sqrt(SUMMED)).view(torch.Size(shape))
