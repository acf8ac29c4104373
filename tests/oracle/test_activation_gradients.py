"""Gradients of quantized activations against a naive twin that plain autograd differentiates, in float64.

The twin is the formula of arXiv 2308.13137 as the official code computes it: rounding x / h passes gradients straight
through, the clamp stops them, z is rounded without and so is a constant, and h hands its gradient to the extremes.
"""

import pytest
import torch

from quantkit.core.activation import fake_quantize_tokens

CASES = pytest.mark.parametrize(("bits", "symmetric"), [(b, s) for b in (2, 3, 4, 8) for s in (False, True)], ids=str)


def straight_through_round(value):
    return value + (value.round() - value).detach()


def naive(values, bits, symmetric):
    if symmetric:
        largest = 2 ** (bits - 1) - 1
        h = (values.abs().amax(-1, keepdim=True) / largest).clamp(1e-5, 1e4)
        return straight_through_round(values / h).clamp(-largest - 1, largest) * h
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    h = ((high - low) / (2**bits - 1)).clamp(1e-5, 1e4)
    z = (-low / h).clamp(-1e4, 1e4).round().detach()
    return ((straight_through_round(values / h) + z).clamp(0, 2**bits - 1) - z) * h


def library(values, bits, symmetric):
    return fake_quantize_tokens(values, bits, symmetric=symmetric)


def tokens(seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(3, 40, 12, generator=generator, dtype=torch.float64) * scale
    values[0] += 2.0  # tokens that lie on one side of zero
    return values.requires_grad_()


def gradient(function, values, bits, symmetric):
    output = function(values, bits, symmetric)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return output, torch.autograd.grad(output, values, upstream)[0]


@CASES
def test_output_and_gradient_are_the_twins(bits, symmetric):
    values = tokens()
    output, found = gradient(library, values, bits, symmetric)
    expected_output, expected = gradient(naive, values, bits, symmetric)
    torch.testing.assert_close(output, expected_output, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    straight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert (found - straight).abs().max() > 0.01  # not merely straight through


@CASES
@pytest.mark.parametrize("scale", [1e-7, 1e8], ids=["below the smallest step", "above the largest"])
def test_a_clamped_step_carries_no_gradient(bits, symmetric, scale):
    values = tokens(scale=scale)
    _, found = gradient(library, values, bits, symmetric)
    _, expected = gradient(naive, values, bits, symmetric)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("symmetric", [False, True])
def test_values_that_share_an_extreme_share_its_gradient(symmetric):
    values = torch.tensor([[-1.0, 0.33, 2.0, 2.0, 0.7, -1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    _, found = gradient(library, values, 3, symmetric)
    _, expected = gradient(naive, values, 3, symmetric)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_the_zero_point_carries_no_gradient():
    """Shifting a token shifts nothing but z: the gradient of the sum is what passes straight through."""
    values = torch.tensor([-0.9, 0.2, 0.45, 1.4], dtype=torch.float64)
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    fake_quantize_tokens(values + shift, 3, symmetric=False).sum().backward()
    assert shift.grad.item() == pytest.approx(4.0, abs=1e-12)


def test_only_the_input_is_saved():
    saved = []
    values = tokens()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        fake_quantize_tokens(values, 4, symmetric=False)
    assert [tensor.data_ptr() for tensor in saved] == [values.data_ptr()]


def test_gradients_of_half_precision_have_its_dtype():
    values = tokens().detach().bfloat16().requires_grad_()
    (found,) = torch.autograd.grad(fake_quantize_tokens(values, 4, symmetric=False).float().square().sum(), values)
    assert found.dtype == torch.bfloat16
    assert found.isfinite().all()
    assert found.abs().max() > 0
