"""Bounds found by trial."""

import pytest
import torch

from quantkit.core.affine import fake_quantize, group_bounds
from quantkit.core.scheme import QuantScheme
from quantkit.core.search import searched_bounds

SCHEME = QuantScheme(bits=3, group_size=16)


def heavy_tailed():
    return torch.randn(12, 64, generator=torch.Generator().manual_seed(0)) ** 3


def error(weight, low, high, scheme=SCHEME, exponent=2.4, importance=1.0):
    difference = (fake_quantize(weight, low, high, scheme) - weight).abs() ** exponent
    return (importance * difference).unflatten(1, (low.shape[1], -1)).sum(-1)


@pytest.mark.parametrize("exponent", [2.0, 2.4])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [16, None])
def test_no_trial_is_better_in_any_group(exponent, symmetric, group_size):
    scheme, weight = QuantScheme(bits=3, group_size=group_size, symmetric=symmetric), heavy_tailed()
    found = error(weight, *searched_bounds(weight, scheme, exponent=exponent), scheme, exponent)
    low, high = group_bounds(weight, scheme)
    for share in torch.linspace(1, 0.5, 26).tolist():
        assert (found <= error(weight, share * low, share * high, scheme, exponent)).all()


def test_bounds_are_one_share_of_the_whole_range_and_hold_zero():
    weight = heavy_tailed()
    low, high = searched_bounds(weight, SCHEME)
    widest = group_bounds(weight, SCHEME)
    assert torch.allclose(low / widest[0], high / widest[1])
    assert (low / widest[0]).min() >= 0.5
    assert (low / widest[0]).unique().numel() > 3
    assert (low <= 0).all()
    assert (high >= 0).all()


def test_a_clipped_outlier_pays_at_few_bits_alone():
    weight = heavy_tailed()
    shares = [
        searched_bounds(weight, QuantScheme(bits=bits))[1] / group_bounds(weight, QuantScheme())[1] for bits in (2, 8)
    ]
    assert shares[0].mean() < 0.9
    assert shares[1].mean() > 0.95


def test_the_errors_of_important_columns_count():
    weight = heavy_tailed()
    importance = torch.ones(1, 64)
    importance[:, weight[0].abs().argmax()] = 1e6  # the outlier of the first row
    plain, weighted = searched_bounds(weight, SCHEME), searched_bounds(weight, SCHEME, importance)
    before, after = (error(weight, *bounds, importance=importance).sum() for bounds in (plain, weighted))
    assert after < before
    per_weight = searched_bounds(weight, SCHEME, importance.expand_as(weight))
    assert torch.equal(per_weight[0], weighted[0])


def test_a_row_of_zeros_has_finite_bounds():
    low, high = searched_bounds(torch.zeros(2, 32), SCHEME)
    assert torch.equal(low, torch.zeros(2, 2))
    assert torch.equal(high, torch.zeros(2, 2))


def test_the_scale_as_it_is_stored_is_what_is_tried():
    weight = heavy_tailed()
    low, high = searched_bounds(weight, SCHEME, scale_dtype=torch.bfloat16)

    def rounded(low, high):
        return (fake_quantize(weight, low, high, SCHEME, scale_dtype=torch.bfloat16) - weight).abs().pow(2.4).sum()

    assert rounded(low, high) <= rounded(*searched_bounds(weight, SCHEME))
