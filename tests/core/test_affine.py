"""Quantization between bounds: golden values, formulas written out in the test, and what it promises."""

import itertools
import math

import pytest
import torch

from quantkit.core.affine import (
    LARGEST_STEP,
    SMALLEST_STEP,
    fake_quantize,
    group_bounds,
    quantize,
    round_to_nearest,
    step_size,
    zero_code,
)
from quantkit.core.scheme import QuantScheme

BITS = range(2, 9)
S4 = 0.982014  # sigmoid(4)
GOLDEN_WEIGHT = torch.tensor([[-1.0, -0.3, 0.1, 0.25, 0.8, 2.0]])
# share of the smallest and of the largest weight, then h, z, codes and weights at 3 bits, all found by hand
FIRST, LAST = [0, 1, 2, 3, 4, 7], [0, 2, 3, 4, 6, 7]
GOLDEN = {
    "whole range": (1, 1, 0.4285714, 2, FIRST, [-0.857143, -0.428571, 0, 0.428571, 0.857143, 2.142857]),
    "sigmoid(4)": (S4, S4, 0.4208631, 2, FIRST, [-0.841726, -0.420863, 0, 0.420863, 0.841726, 2.104315]),
    "0.9 and 0.6": (0.9, 0.6, 0.3, 3, LAST, [-0.9, -0.3, 0, 0.3, 0.9, 1.2]),
}
SCHEMES = [
    QuantScheme(bits=bits, group_size=size, symmetric=symmetric)
    for bits, size, symmetric in itertools.product(BITS, (None, 8), (False, True))
]
OUTLIER = torch.tensor([3])
WEIGHTS = {
    "normal": lambda noise: noise,
    "one outlier": lambda noise: noise.index_fill(1, OUTLIER, 40.0),
    "all positive": lambda noise: noise.abs() + 3,
    "all negative": lambda noise: -noise.abs() - 3,
    "tiny": lambda noise: noise * 1e-3,
    "half zero": lambda noise: noise.clamp(min=0),
}


def per_weight(groups, width):
    """Return the value of each weight's group."""
    return groups.repeat_interleave(width // groups.shape[1], dim=1)


def random_weight(kind, scheme):
    generator = torch.Generator().manual_seed(scheme.bits + 10 * scheme.symmetric)
    return WEIGHTS[kind](torch.randn(5, 24, generator=generator))


@pytest.mark.parametrize(("below", "above", "step", "zero", "codes", "dense"), GOLDEN.values(), ids=GOLDEN)
def test_golden_values(below, above, step, zero, codes, dense):
    low, high = group_bounds(GOLDEN_WEIGHT, QuantScheme(bits=3))
    found = quantize(GOLDEN_WEIGHT, low * below, high * above, QuantScheme(bits=3), torch.float32)
    assert found.scale.item() == pytest.approx(step, rel=1e-6)
    assert found.zero_point.item() + 4 == zero  # stored minus 2^(bits - 1)
    assert (found.codes[0] + 4).tolist() == codes
    assert found.dequantize()[0].tolist() == pytest.approx(dense, abs=2e-6)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_weight_on_the_grid_is_kept_exactly(scheme, dtype):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(scheme.smallest_code, scheme.largest_code + 1, (4, 24), generator=generator)
    codes[:, ::8], codes[:, 1::8] = scheme.smallest_code + scheme.symmetric, scheme.largest_code
    weight = codes.clamp(min=scheme.smallest_code + scheme.symmetric) * 0.25
    assert torch.equal(round_to_nearest(weight, scheme, dtype).dequantize().float(), weight)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_and_zero_points_are_in_range(scheme, kind):
    quantized = round_to_nearest(random_weight(kind, scheme), scheme, torch.float16)
    for stored in (quantized.codes, quantized.zero_point):
        if stored is not None:
            assert scheme.smallest_code <= stored.min()
            assert stored.max() <= scheme.largest_code


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_no_weight_inside_its_grid_moves_by_more_than_half_a_step(scheme, kind):
    weight = random_weight(kind, scheme)
    quantized = round_to_nearest(weight, scheme, torch.float32)
    step, zero = per_weight(quantized.scale, 24), torch.zeros(5, 24)
    if quantized.zero_point is not None:
        zero = per_weight(quantized.zero_point.float(), 24)
    low, high = (scheme.smallest_code - zero - 0.5) * step, (scheme.largest_code - zero + 0.5) * step
    inside = (weight >= low) & (weight <= high)
    error = (quantized.dequantize() - weight).abs()
    assert (error[inside] <= step[inside] / 2 * (1 + 1e-4)).all()
    assert (error <= step * (1 + 1e-4)).all()  # rounding z shifts the grid, by half a step at most
    assert inside.float().mean() > 0.8


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_zero_stays_zero(scheme, kind):
    weight = random_weight(kind, scheme)
    weight[:, ::5] = 0
    dense = round_to_nearest(weight, scheme, torch.bfloat16).dequantize()
    assert dense[:, ::5].abs().max() == 0


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_zeros_alone_stay_zero_with_a_usable_scale(scheme):
    for dtype in (torch.float16, torch.bfloat16):
        quantized = round_to_nearest(torch.zeros(3, 24), scheme, dtype)
        assert (quantized.scale.float() > 0).all()
        assert quantized.dequantize().abs().max() == 0


@pytest.mark.parametrize(("low", "high"), [(3.0, 4.0), (-4.0, -3.0)], ids=["positive", "negative"])
def test_bounds_of_weights_of_one_sign_include_zero(low, high):
    found = group_bounds(torch.tensor([[low, high]]), QuantScheme(bits=4))
    assert [bound.item() for bound in found] == [min(low, 0), max(high, 0)]


def test_bounds_are_per_group():
    low, high = group_bounds(torch.tensor([[-1.0, 2.0, -3.0, 4.0]]), QuantScheme(group_size=2))
    assert (low.tolist(), high.tolist()) == ([[-1.0, -3.0]], [[2.0, 4.0]])


@pytest.mark.parametrize("bits", BITS)
def test_symmetric_codes_are_the_formulas(bits):
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(bits))
    quantized = round_to_nearest(weight, QuantScheme(bits=bits, symmetric=True), torch.float32)
    for row, codes, scale in zip(weight.tolist(), quantized.codes.tolist(), quantized.scale.tolist(), strict=True):
        step = max(abs(value) for value in row) / (2 ** (bits - 1) - 1)
        assert scale[0] == pytest.approx(step, rel=1e-6)
        assert codes == [round(value / step) for value in row]
    assert quantized.zero_point is None


@pytest.mark.parametrize("bits", BITS)
def test_asymmetric_codes_are_the_formulas(bits):
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(bits))
    quantized = round_to_nearest(weight, QuantScheme(bits=bits), torch.float32)
    for row, codes, zero in zip(weight.tolist(), quantized.codes.tolist(), quantized.zero_point.tolist(), strict=True):
        step = (max(row) - min(row)) / (2**bits - 1)
        shift = round(-min(row) / step)
        assert zero[0] + 2 ** (bits - 1) == shift
        expected = [min(max(round(value / step) + shift, 0), 2**bits - 1) for value in row]
        assert [code + 2 ** (bits - 1) for code in codes] == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_codes_are_the_best_for_the_scale_that_is_stored(dtype):
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)) / 50
    scheme = QuantScheme(bits=8, group_size=32)
    quantized = round_to_nearest(weight, scheme, dtype)
    assert quantized.scale.dtype == dtype
    step, zero = (per_weight(part.float(), 64) for part in (quantized.scale, quantized.zero_point))
    best = ((weight / step).round() + zero).clamp(-128, 127)
    assert torch.equal(quantized.codes.float(), best)


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize(("size", "step"), [(1e-9, SMALLEST_STEP), (1e9, LARGEST_STEP)], ids=["tiny", "huge"])
def test_the_step_stays_where_sixteen_bits_can_hold_it(size, step, symmetric):
    scheme = QuantScheme(bits=4, symmetric=symmetric)
    bounds = torch.tensor([[-size]]), torch.tensor([[size]])
    assert step_size(*bounds, scheme).item() == pytest.approx(step)
    stored = torch.tensor(step).half()
    assert math.isfinite(stored)
    assert stored > 0


@pytest.mark.parametrize("scale", [1e-9, 1e9], ids=["tiny", "huge"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_extreme_weights_give_finite_results(scheme, scale):
    weight = scale * torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    quantized = round_to_nearest(weight, scheme, torch.bfloat16)
    assert torch.isfinite(quantized.dequantize()).all()
    assert scheme.smallest_code <= quantized.codes.min() <= quantized.codes.max() <= scheme.largest_code


def test_a_weight_between_two_levels_is_rounded_before_the_zero_point_is_added():
    scheme, low, high = QuantScheme(bits=3), torch.tensor([[-1.0]]), torch.tensor([[6.0]])  # h = 1 and z = 1
    weight = torch.tensor([[-0.5, 0.5, 1.5, 2.5]])
    assert quantize(weight, low, high, scheme, torch.float16).dequantize().tolist() == [[0, 0, 2, 2]]
    assert fake_quantize(weight, low, high, scheme).tolist() == [[0, 0, 2, 2]]


def test_the_zero_point_has_no_gradient():
    low = torch.tensor([[-1.0]], requires_grad=True)
    step = torch.tensor([[0.3]], requires_grad=True)
    assert not zero_code(low, step, QuantScheme(bits=3)).requires_grad
