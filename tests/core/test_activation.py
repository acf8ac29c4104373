"""The sheet's conventions of dynamic activation quantization, value by value."""

import pytest
import torch

from quantkit.core.activation import fake_quantize_tokens

GENERATOR = torch.Generator().manual_seed(0)
VALUES = torch.randn(2, 5, 24, generator=GENERATOR)
EVERY = pytest.mark.parametrize("bits", [2, 4, 6, 8])
BOTH = pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])


def quantize(values, bits, symmetric=False):
    return fake_quantize_tokens(torch.tensor(values), bits, symmetric=symmetric).tolist()


def test_golden_values_of_the_weight_quantizer_hold_for_a_token_too():
    """h = 3/7, z = 2, q = 0 1 2 3 4 7: the sheet's test T1."""
    found = quantize([-1.0, -0.3, 0.1, 0.25, 0.8, 2.0], 3)
    assert found == pytest.approx([-0.857143, -0.428571, 0, 0.428571, 0.857143, 2.142857], abs=1e-6)


def test_symmetric_values_by_hand():
    """h = 2.1 / 7 = 0.3 for 4 bits, no zero point."""
    assert quantize([-2.1, -0.4, 0.1, 1.0, 2.0], 4, symmetric=True) == pytest.approx([-2.1, -0.3, 0, 0.9, 2.1])


def test_a_token_of_one_sign_keeps_its_range():
    """z leaves the N-bit grid, as in the paper: h = 1, z = -10."""
    assert quantize([10.0, 11.2, 12.0, 13.0], 2) == pytest.approx([10, 11, 12, 13])


def test_the_largest_code_is_clamped_where_both_roundings_go_up():
    """-min/h = 1.5 and max/h = 1.5 round to 2 and 2, one more than the grid has."""
    assert quantize([-1.5, 1.5], 2) == pytest.approx([-2.0, 1.0])


@BOTH
def test_a_token_of_zeros_stays(symmetric):
    assert quantize([[0.0] * 6], 4, symmetric) == [[0.0] * 6]


def test_steps_are_clamped_at_both_ends():
    tiny, huge = torch.tensor([[-1e-6, 1e-6]]), torch.tensor([[-1e9, 1e9]])
    assert fake_quantize_tokens(tiny, 4, symmetric=False).tolist() == [[0, 0]]  # h = 1e-5
    assert fake_quantize_tokens(huge, 4, symmetric=True).tolist() == [[-8e4, 7e4]]  # h = 1e4


@BOTH
@EVERY
def test_every_token_has_at_most_two_to_the_bits_values(bits, symmetric):
    values = torch.rand(3, 8192, generator=torch.Generator().manual_seed(1)) - 0.4
    for token in fake_quantize_tokens(values, bits, symmetric=symmetric):
        assert (0.75 if symmetric else 1) * 2**bits - 2 <= len(token.unique()) <= 2**bits


@BOTH
@EVERY
def test_each_token_is_quantized_by_itself(bits, symmetric):
    together = fake_quantize_tokens(VALUES, bits, symmetric=symmetric)
    for batch, token in [(0, 0), (1, 4)]:
        alone = fake_quantize_tokens(VALUES[batch, token], bits, symmetric=symmetric)
        assert torch.equal(together[batch, token], alone)


@BOTH
@EVERY
def test_no_value_moves_further_than_a_step(bits, symmetric):
    error = (fake_quantize_tokens(VALUES, bits, symmetric=symmetric) - VALUES).abs().amax(-1)
    low, high = VALUES.aminmax(dim=-1)
    step = torch.maximum(-low, high) / (2 ** (bits - 1) - 1) if symmetric else (high - low) / (2**bits - 1)
    assert (error <= step * (0.5001 if symmetric else 1.0001)).all()


@BOTH
def test_more_bits_are_closer(symmetric):
    errors = [(fake_quantize_tokens(VALUES, bits, symmetric=symmetric) - VALUES).norm() for bits in (2, 3, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 30 * errors[-1] > 0


@BOTH
def test_half_precision_is_computed_in_float32(symmetric):
    half = VALUES.bfloat16()
    found = fake_quantize_tokens(half, 8, symmetric=symmetric)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, fake_quantize_tokens(half.float(), 8, symmetric=symmetric).bfloat16())


@BOTH
def test_a_nan_is_not_hidden(symmetric):
    values = torch.tensor([[1.0, float("nan"), 2.0], [1.0, 0.5, 2.0]])
    found = fake_quantize_tokens(values, 4, symmetric=symmetric)
    assert found[0].isnan().all()
    assert found[1].isfinite().all()


def test_the_input_is_left_alone():
    before = VALUES.clone()
    fake_quantize_tokens(VALUES, 4, symmetric=False)
    assert torch.equal(VALUES, before)
