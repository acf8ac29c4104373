"""Directions: Philox from its definition, normal numbers from the C library, and their distribution."""

import hashlib
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from quantkit.personal import noise

MASK = 2**64 - 1
DIGEST = "94d9d701aa6f07d2c33133adce935a3fa308f0e87d1e75bc0f6b3279d0451c2f"


def philox(counter, key):
    """Return four words of Philox-4x64-10, with Python's integers (Salmon et al., 2011, section 3.3)."""
    a, b = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (second >> 64) ^ c1 ^ a, second & MASK, (first >> 64) ^ c3 ^ b, first & MASK
        a, b = (a + 0x9E3779B97F4A7C15) & MASK, (b + 0xBB67AE8584CAA73B) & MASK
    return c0, c1, c2, c3


def expected(seed, step, direction, name, count):
    key = hashlib.sha256(f"{seed} {step} {direction} {name}".encode()).digest()
    key = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:16], "little")
    made = []
    for block in range(1, 1 + -(-count // 4)):
        units = [((word >> 11) + 0.5) / 2**53 for word in philox((block, 0, 0, 0), key)]
        for u, turn in (units[:2], units[2:]):
            radius = math.sqrt(-2 * math.log(u))
            made += [radius * math.cos(2 * math.pi * turn), radius * math.sin(2 * math.pi * turn)]
    return torch.tensor(made[:count], dtype=torch.float64)


def test_the_reference_gives_the_published_words():
    known = 0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B  # kat_vectors of Random123
    assert philox((0, 0, 0, 0), (0, 0)) == known


@pytest.mark.parametrize("count", [1, 2, 7, 401])
def test_numbers_are_those_of_the_definition(count):
    found = noise.normal(42, 3, 1, "model.layers.0.bias", (count,))
    wanted = expected(42, 3, 1, "model.layers.0.bias", count)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted.float()) or (found - wanted).abs().max() < 2e-7


def test_chunks_change_nothing(monkeypatch):
    whole = noise.normal(0, 0, 0, "a", (30, 7))
    monkeypatch.setattr(noise, "CHUNK", 16)
    assert torch.equal(noise.normal(0, 0, 0, "a", (30, 7)), whole)
    assert torch.equal(noise.normal(0, 0, 0, "a", (5,)), whole.flatten()[:5])


def test_the_numbers_of_this_version():
    """If this fails the numbers have changed: journals that name the algorithm cannot be followed any more."""
    found = noise.normal(2**63 - 1, 10**6, 2, "bias", (1000,)).numpy().tobytes()
    assert noise.ALGORITHM.endswith("/1")
    assert hashlib.sha256(found).hexdigest() == DIGEST


def test_another_process_draws_the_same():
    code = "from quantkit.personal.noise import normal; print(normal(7, 8, 9, 'x', (3,)).tolist())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert told.stdout.strip() == str(noise.normal(7, 8, 9, "x", (3,)).tolist())


@pytest.mark.parametrize("other", [(1, 0, 0, "a"), (0, 1, 0, "a"), (0, 0, 1, "a"), (0, 0, 0, "b")])
def test_every_part_of_the_name_matters(other):
    first, second = noise.normal(0, 0, 0, "a", (4000,)), noise.normal(*other, (4000,))
    assert abs(float((first * second).mean())) < 4 / math.sqrt(4000)


def test_numbers_are_standard_normal():
    values = np.sort(noise.normal(0, 0, 0, "a", (200_000,)).double().numpy())
    normal = torch.special.ndtr(torch.from_numpy(values)).numpy()
    steps = np.arange(1, len(values) + 1) / len(values)
    assert np.abs(normal - steps).max() < 1.63 / math.sqrt(len(values))  # Kolmogorov-Smirnov, 1 %


def test_series_are_what_the_c_library_has():
    values = np.random.default_rng(0).random(20_000)
    values[:3] = 2.0**-54, 1 - 2.0**-54, 0.5
    assert np.allclose(noise._logarithm(values), np.log(values), rtol=1e-15, atol=1e-16)
    cosine, sine = noise._circle(values)
    assert np.allclose(cosine, np.cos(2 * np.pi * values), rtol=0, atol=1e-15)
    assert np.allclose(sine, np.sin(2 * np.pi * values), rtol=0, atol=1e-15)
