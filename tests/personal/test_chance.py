"""Random numbers from a key."""

import math

import pytest
import torch

from quantkit.personal.chance import fixed_key, normal, secret_key, uniform


def test_uniform_numbers_are_uniform():
    drawn = uniform(fixed_key(0), "test", 200_000)
    assert drawn.dtype == torch.float64
    assert 0 <= float(drawn.min()) < float(drawn.max()) < 1
    counts = torch.histc(drawn, bins=100, min=0, max=1)
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 99 + 5 * math.sqrt(2 * 99)  # chi squared
    assert len(uniform(fixed_key(0), "test", 0)) == 0


def test_normal_numbers_are_normal():
    drawn = normal(fixed_key(0), "test", (100_000,))
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert float((drawn**power).mean()) == pytest.approx(moment, abs=5 * math.sqrt(spread / 100_000))
    assert normal(fixed_key(0), "test", ()).shape == ()


def test_the_same_key_and_purpose_give_the_same_numbers_and_others_give_others():
    assert torch.equal(uniform(b"k", "a", 9), uniform(b"k", "a", 9))
    assert torch.equal(uniform(b"k", "a", 9)[:4], uniform(b"k", "a", 4))
    others = [uniform(b"k", "b", 9), uniform(b"l", "a", 9), uniform(b"ka", "", 9)]
    assert all(not torch.equal(uniform(b"k", "a", 9), other) for other in others)


def test_secret_keys_have_256_bits_and_are_never_the_same():
    keys = {secret_key() for _ in range(50)}
    assert len(keys) == 50
    assert {len(key) for key in keys} == {32}


def test_uniform_numbers_are_those_of_shake_256():
    from hashlib import shake_256

    stream = shake_256((3).to_bytes(8, "little") + b"key" + b"what for").digest(16)
    words = [int.from_bytes(stream[place : place + 8], "little") >> 11 for place in (0, 8)]
    assert uniform(b"key", "what for", 2).tolist() == [word / 2**53 for word in words]
