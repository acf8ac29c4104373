"""The injector: how many bits it hits, which, that it puts them back, and what one bit is worth."""

import math
import subprocess
import sys

import pytest
import torch

from quantkit.core.packing import pack, unpack
from quantkit.errors import UsageError
from quantkit.resilience.flips import Bits, Fault, draw, draw_exactly, generator, pass_faults, strike


def chi_square(observed, expected):
    return sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))


def critical(degrees, z=3.09):
    """The 99.9 % quantile of χ², by Wilson and Hilferty's approximation."""
    return degrees * (1 - 2 / (9 * degrees) + z * math.sqrt(2 / (9 * degrees))) ** 3


def test_positions_are_uniform_by_chi_square():
    total, bins = 16 * 640, 64
    hits = torch.cat([draw(total, 0.02, generator(0, trial, "w")) for trial in range(150)])
    observed = torch.bincount(hits // (total // bins), minlength=bins).tolist()
    bits = torch.bincount(hits % 16, minlength=16).tolist()
    assert chi_square(observed, [len(hits) / bins] * bins) < critical(bins - 1)
    assert chi_square(bits, [len(hits) / 16] * 16) < critical(15)


@pytest.mark.parametrize(("total", "rate"), [(20, 0.1), (400, 0.02), (10_000_000, 1e-6)])
def test_counts_are_binomial_by_chi_square(total, rate):
    trials = 1500
    counts = [len(draw(total, rate, generator(1, trial, "w"))) for trial in range(trials)]
    edges = range(round(total * rate * 2.5))  # the last bin holds all that is larger
    share = [math.comb(total, k) * rate**k * (1 - rate) ** (total - k) for k in edges]
    expected = [*share, 1 - sum(share)]
    observed = [sum(c == k for c in counts) for k in edges] + [sum(c >= len(share) for c in counts)]
    assert chi_square(observed, [trials * p for p in expected]) < critical(len(expected) - 1)


@pytest.mark.parametrize("count", [0, 3, 60, 100])
def test_positions_differ_and_are_as_many_as_asked_for(count):
    found = draw_exactly(100, count, generator(2))
    assert len(found.unique()) == count
    assert not count or 0 <= found.min() <= found.max() < 100


def test_a_rate_of_one_hits_every_bit_and_zero_none():
    assert draw(77, 1.0, generator(0)).tolist() == list(range(77))
    assert not len(draw(77, 0.0, generator(0)))


@pytest.mark.parametrize("rate", [-0.1, 1.5, math.nan])
def test_a_rate_that_is_no_probability_is_refused(rate):
    with pytest.raises(UsageError, match="from 0 to 1"):
        draw(10, rate, generator(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.int8, torch.uint8])
@pytest.mark.parametrize("kind", ["flip", "stuck0", "stuck1", "burst"])
def test_what_was_hit_comes_back_bit_for_bit(dtype, kind):
    values = (torch.randn(40, 9, generator=generator(3)) * 50).to(dtype)
    before, bits = values.clone(), Bits(tensor=values, width=8 * values.element_size())
    damage = strike(bits, draw(bits.total, 0.1, generator(4)), Fault(kind=kind, length=3))
    assert damage.flips > 0
    assert not torch.equal(values.view(torch.uint8), before.view(torch.uint8))
    damage.apply(values)
    assert torch.equal(values.view(torch.uint8), before.view(torch.uint8))


def test_every_bit_of_a_tensor_is_reached_once():
    values = torch.zeros(3, 2, dtype=torch.int32)
    damage = strike(Bits(tensor=values, width=32), torch.arange(192), Fault())
    assert damage.flips == 192
    assert (values == -1).all()


@pytest.mark.parametrize(("kind", "value"), [("stuck0", 0), ("stuck1", -1)])
def test_bits_that_are_stuck_read_the_same_whatever_was_there(kind, value):
    values = torch.randint(-100, 100, (50,), dtype=torch.int16, generator=generator(5))
    strike(Bits(tensor=values, width=16), torch.arange(800), Fault(kind=kind))
    assert (values == value).all()


def test_a_burst_is_adjacent_bits_and_ends_with_the_tensor():
    values = torch.zeros(2, dtype=torch.int16)
    strike(Bits(tensor=values, width=16), torch.tensor([3, 30]), Fault(kind="burst", length=4))
    assert values.tolist() == [0b1111000, -(1 << 14)]  # bits 3 to 6, and the two that are left


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bits_of_packed_codes_are_bits_of_codes_and_never_padding(bits):
    codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (5, 37), generator=generator(6)).to(torch.int8)
    packed = pack(codes, bits)
    stream = Bits(tensor=packed, width=bits, valid=37 * bits)
    assert stream.total == codes.numel() * bits
    strike(stream, torch.arange(stream.total), Fault())
    assert torch.equal(unpack(packed, bits, 37), ~codes)  # every bit of every code
    assert torch.equal(packed, pack(~codes, bits))  # and none besides


def test_bits_of_zero_points_are_packed_along_the_other_axis():
    zeros = torch.randint(-8, 8, (3, 13), generator=generator(7)).to(torch.int8)
    packed = pack(zeros, 4).T.contiguous()  # (words, groups), as zero points of compressed-tensors
    stream = Bits(tensor=packed, width=4, valid=13 * 4, axis=0)
    strike(stream, torch.tensor([0, 13 * 4 + 4 * 12]), Fault())  # the lowest bits of the first and of the 26th
    changed = (unpack(packed.T.contiguous(), 4, 13) != zeros).nonzero().tolist()
    assert changed == [[0, 0], [1, 12]]


@pytest.mark.parametrize(("bit", "factor"), [(14, 65536.0), (13, 256.0), (12, 16.0), (11, 4.0), (10, 2.0)])
def test_an_exponent_bit_of_a_small_scale_multiplies_it_by_its_power(bit, factor):
    scale = torch.tensor([2.0**-14 * 1.5], dtype=torch.float16)  # exponent 1: bits 11 to 14 are 0, bit 10 is 1
    if bit == 10:
        factor, scale = 2.0, torch.tensor([2.0**-13 * 1.5], dtype=torch.float16)
    before = float(scale)
    strike(Bits(tensor=scale, width=16), torch.tensor([bit]), Fault())
    assert float(scale) == before * factor


def test_the_same_trial_is_the_same_in_another_process():
    code = (
        "import torch; from quantkit.resilience.flips import draw, generator;"
        "print(draw(10**7, 1e-5, generator(3, 41, 'model.layers.0.mlp.up_proj.weight_scale')).tolist())"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout
    assert shown.strip() == str(draw(10**7, 1e-5, generator(3, 41, "model.layers.0.mlp.up_proj.weight_scale")).tolist())


def test_other_trials_and_tensors_are_hit_elsewhere():
    drawn = [
        draw(10**6, 1e-4, generator(*key)).tolist() for key in [(0, 1, "a"), (0, 2, "a"), (0, 1, "b"), (1, 1, "a")]
    ]
    assert len({tuple(found) for found in drawn}) == 4


def test_values_that_pass_are_hit_as_16_bits_and_others_are_not_rounded():
    values = torch.rand(3, 50, generator=generator(8)) + 0.1
    passed = pass_faults(values, 0.01, Fault(), torch.float16, generator(9))
    hit = draw(16 * values.numel(), 0.01, generator(9))
    assert set((passed != values).flatten().nonzero().flatten().tolist()) <= set((hit // 16).tolist())
    first = int(hit[0] // 16)
    bits = sum(1 << int(number % 16) for number in hit if number // 16 == first)
    expected = values.flatten()[first].half().view(torch.int16) ^ (bits if bits < 1 << 15 else bits - (1 << 16))
    assert passed.flatten()[first].half().view(torch.int16) == expected


def test_where_nothing_is_hit_values_pass_as_they_are():
    values = torch.rand(4, generator=generator(10))
    assert pass_faults(values, 0.0, Fault(), torch.float16, generator(0)) is values
