"""What leaves a bound, whatever enters it."""

import math

import pytest
import torch

from quantkit.errors import UsageError
from quantkit.resilience.bounds import (
    FORMS,
    Bound,
    BoundedGELU,
    BoundedReLU,
    BoundedReLU6,
    BoundedSiLU,
    clamp,
    smooth,
    to_zero,
)

INF, NAN = math.inf, math.nan
TWO = torch.tensor(2.0)
# x → what the three forms make of it at a threshold of 2; the smooth one as x / (1 + e^(20 (|x| - 2)))
VALUES = [
    (1.0, 1.0, 1.0, 1.0),
    (2.0, 2.0, 2.0, 1.0),
    (2.5, 2.0, 0.0, 2.5 / (1 + math.exp(10))),
    (-1.0, -1.0, -1.0, -1.0),
    (-2.5, -2.0, 0.0, -2.5 / (1 + math.exp(10))),
    (1e4, 2.0, 0.0, 0.0),
    (3e38, 2.0, 0.0, 0.0),
    (INF, 0.0, 0.0, 0.0),
    (-INF, 0.0, 0.0, 0.0),
    (NAN, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("x", "clamped", "dropped", "gated"), VALUES)
def test_the_three_forms_at_known_values(x, clamped, dropped, gated):
    found = [float(form(torch.tensor(x), TWO)) for form in (clamp, to_zero, smooth)]
    assert found == pytest.approx([clamped, dropped, gated], abs=1e-7)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_bit_pattern_leaves_finite_and_bounded(form, dtype):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    values = patterns.view(dtype) if dtype.itemsize == 2 else patterns.int().mul_(2**16).view(torch.float32)
    result = Bound(TWO, form)(values)
    assert result.dtype == dtype
    assert result.isfinite().all()
    assert result.abs().max() <= 2.0


@pytest.mark.parametrize("form", FORMS)
def test_a_vector_bounds_each_neuron_at_its_own_threshold(form):
    thresholds = torch.tensor([0.5, 1.0, 4.0])
    result = Bound(thresholds, form)(torch.full((2, 5, 3), 2.0))
    alone = torch.stack([Bound(t, form)(torch.tensor(2.0)) for t in thresholds])
    assert torch.equal(result, alone.expand(2, 5, 3))


@pytest.mark.parametrize(
    ("made", "lowest"),
    [(BoundedReLU, 0.0), (BoundedReLU6, 0.0), (BoundedSiLU, -0.278465), (BoundedGELU, -0.169971)],
)
def test_bounded_activations_keep_their_own_lower_bound(made, lowest):
    # a two-sided bound of 0.1 would cut the negative part of SiLU and GELU
    x = torch.linspace(-30, 30, 60001)
    for form in ("clamp", "zero"):
        result = made(0.1, form)(x)
        assert float(result.min()) == pytest.approx(lowest, abs=1e-6)
        assert float(result.max()) <= 0.1 + 1e-7
    assert made(1.0)(torch.tensor([NAN, INF])).tolist() == pytest.approx([0.0, 1.0 if made is BoundedReLU6 else 0.0])


def test_where_a_clamp_binds_its_threshold_gets_the_gradient():
    threshold = torch.tensor(2.0, requires_grad=True)
    clamp(torch.tensor([1.0, 5.0, -5.0, NAN, INF]), threshold).dot(
        torch.tensor([1.0, 10.0, 100.0, 1e3, 1e4])
    ).backward()
    assert float(threshold.grad) == 10.0 - 100.0


def test_gradients_of_the_smooth_form_agree_with_differences():
    x = torch.tensor([0.3, 1.9, 2.1, -2.05, -0.2], dtype=torch.float64, requires_grad=True)
    threshold = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(smooth, (x, threshold))


@pytest.mark.parametrize("form", FORMS)
def test_no_gradient_is_nan_where_inputs_are_not_finite(form):
    x = torch.tensor([NAN, INF, -INF, 3e38, -3e38, 1.0], requires_grad=True)
    bound = Bound(TWO, form)
    bound(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("threshold", [0.0, -1.0, NAN, INF])
def test_a_threshold_that_bounds_nothing_is_refused(threshold):
    with pytest.raises(UsageError, match="positive and finite"):
        Bound(torch.tensor([1.0, threshold]))


def test_an_unknown_form_is_refused_by_name():
    with pytest.raises(UsageError, match=r"unknown form 'clip'"):
        Bound(TWO, "clip")


def test_one_flipped_sign_bit_of_a_fixed_point_weight_stays_below_the_threshold():
    # Q1.15.16: the most significant bit of a weight is worth 2^15 of its inputs
    weight, x = 0.5, torch.tensor(0.25)
    flipped = weight + 2**15
    assert float(flipped * x) == pytest.approx(2**15 * 0.25, rel=1e-4)
    for form, expected in (("clamp", 0.75), ("zero", 0.0)):
        assert float(BoundedReLU(0.75, form)(flipped * x)) == expected
