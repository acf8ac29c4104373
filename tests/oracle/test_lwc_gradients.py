"""Gradients of the clipped quantizer against a naive twin that plain autograd differentiates, in float64.

The twin is the formula of arXiv 2308.13137, eq. 2, line by line: rounding passes gradients straight through,
the clamp stops them outside the grid, and the zero point is a constant.
"""

import itertools
import math

import pytest
import torch

from quantkit.core.affine import fake_quantize, group_bounds
from quantkit.core.scheme import QuantScheme
from quantkit.train.trainables import WeightQuantizer

SCHEMES = [
    QuantScheme(bits=bits, group_size=size, symmetric=symmetric)
    for bits, size, symmetric in itertools.product((2, 3, 4), (None, 8), (False, True))
]
EACH = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


def straight_through_round(value):
    return value + (value.round() - value).detach()


def naive(weight, gamma, beta, scheme):
    """Return the quantized weight; every step is an ordinary differentiable operation."""
    grouped = weight.reshape(weight.shape[0], -1, scheme.group_size or weight.shape[1])
    high = gamma.sigmoid() * grouped.detach().amax(-1).clamp(min=0)
    low = beta.sigmoid() * grouped.detach().amin(-1).clamp(max=0)
    smallest, largest = 0, 2**scheme.bits - 1
    h = (high - low) / (2**scheme.bits - 1)
    z = torch.round(-low / h).detach()
    if scheme.symmetric:
        smallest, largest = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
        h = torch.maximum(-low, high) / largest
        z = torch.zeros_like(h)
    h, z = h[..., None], z[..., None]
    q = torch.clamp(straight_through_round(grouped / h) + z, smallest, largest)
    return ((q - z) * h).reshape(weight.shape)


def library(weight, gamma, beta, scheme):
    low, high = group_bounds(weight.detach(), scheme)
    return fake_quantize(weight, low * beta.sigmoid(), high * gamma.sigmoid(), scheme)


def inputs(scheme, seed=0):
    """Return weight, gamma and beta; the logits are so low that many weights are clipped."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 16, generator=generator, dtype=torch.float64)
    shape = 6, scheme.groups(16)
    logits = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    return [value.requires_grad_() for value in (weight, *logits)]


def gradients(function, scheme):
    values = inputs(scheme)
    output = function(*values, scheme)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return output, torch.autograd.grad(output, values, upstream)


@EACH
def test_output_is_the_twins(scheme):
    torch.testing.assert_close(library(*inputs(scheme), scheme), naive(*inputs(scheme), scheme), rtol=0, atol=1e-12)


@pytest.mark.parametrize("place", range(3), ids=["weight", "gamma", "beta"])
@EACH
def test_gradient_is_the_twins(scheme, place):
    _, found = gradients(library, scheme)
    _, expected = gradients(naive, scheme)
    torch.testing.assert_close(found[place], expected[place], rtol=0, atol=1e-12)
    assert expected[place].abs().max() > 0.01


@EACH
def test_the_clamp_stops_the_weights_gradient_outside_the_grid(scheme):
    weight, gamma, beta = inputs(scheme)
    output = library(weight, gamma, beta, scheme)
    (slope,) = torch.autograd.grad(output.sum(), weight)
    assert set(slope.unique().tolist()) == {0.0, 1.0}
    error = (output - weight).abs()
    assert error[slope == 0].mean() > error[slope == 1].mean()


def test_closed_form_of_one_weight_inside_and_one_outside():
    scheme = QuantScheme(bits=3)
    weight, low, high = (
        torch.tensor(values, dtype=torch.float64, requires_grad=True) for values in ([[0.7, 3.0]], [[-1.0]], [[1.1]])
    )
    fake_quantize(weight, low, high, scheme).sum().backward()
    step, zero = 2.1 / 7, 3  # 0.7 / 0.3 rounds to 2, 3.0 / 0.3 = 10 is clamped to 7 - z = 4
    by_step = (2 - 0.7 / step) + (7 - zero)
    assert weight.grad.tolist() == [[1.0, 0.0]]
    assert high.grad.item() == pytest.approx(by_step / 7, abs=1e-12)
    assert low.grad.item() == pytest.approx(-by_step / 7, abs=1e-12)


def test_the_zero_point_carries_no_gradient():
    """Raising both bounds by the same amount leaves h alone: only z could feel it."""
    weight = torch.tensor([[-0.9, 0.2, 1.4]], dtype=torch.float64)
    shift = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    fake_quantize(weight, shift - 1.0, shift + 2.0, QuantScheme(bits=3)).sum().backward()
    assert shift.grad.abs().item() < 1e-12


def test_a_small_change_of_gamma_moves_the_output_as_its_gradient_says():
    """Where all weights are clipped the output is linear in h, and finite differences are exact."""
    scheme = QuantScheme(bits=2)
    weight = torch.tensor([[-5.0, 7.0, 9.0]], dtype=torch.float64)  # every weight is outside the grid
    low, high = torch.tensor([[-1.0]]).double(), torch.tensor([[2.0]]).double().requires_grad_()
    (slope,) = torch.autograd.grad(fake_quantize(weight, low, high, scheme).sum(), high)
    with torch.no_grad():
        outputs = [fake_quantize(weight, low, high + change, scheme).sum() for change in (1e-6, -1e-6)]
    assert slope.item() == pytest.approx((outputs[0] - outputs[1]).item() / 2e-6, rel=1e-6)


@EACH
def test_clipping_starts_at_the_papers_share_of_the_range(scheme):
    weight = inputs(scheme)[0].detach().float()
    quantizer = WeightQuantizer(weight, scheme, torch.bfloat16)
    low, high = group_bounds(weight, scheme)
    share = torch.tensor(4.0).sigmoid()
    assert share.item() == pytest.approx(0.982014, abs=1e-6)
    assert torch.equal(torch.stack(quantizer.bounds()), torch.stack((low * share, high * share)))


def test_gamma_clips_the_largest_weight_and_beta_the_smallest():
    quantizer = WeightQuantizer(torch.tensor([[-1.0, 2.0]]), QuantScheme(bits=3), torch.bfloat16)
    torch.nn.init.constant_(quantizer.gamma, 0.0)
    torch.nn.init.constant_(quantizer.beta, math.log(3))
    assert [bound.item() for bound in quantizer.bounds()] == pytest.approx([-0.75, 1.0])
