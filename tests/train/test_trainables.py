"""Where the clipping of a weight starts."""

import pytest
import torch

from quantkit.core.affine import group_bounds, round_to_nearest
from quantkit.core.scheme import QuantScheme
from quantkit.train.trainables import WeightQuantizer

WEIGHT = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))


def quantizer(bits):
    return WeightQuantizer(WEIGHT, QuantScheme(bits=bits, group_size=32), torch.float16, clip=True)


@pytest.mark.parametrize("bits", [6, 8])
def test_a_start_at_the_whole_range_is_hardly_worse_than_rounding(bits):
    clipping = quantizer(bits)
    usual = (clipping() - WEIGHT).norm()
    clipping.clip_to(*group_bounds(WEIGHT, clipping.scheme))
    rounding = (round_to_nearest(WEIGHT, clipping.scheme, torch.float16).dequantize() - WEIGHT).norm()
    assert (clipping() - WEIGHT).norm() < min(1.15 * rounding, usual)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_with_few_bits_the_widest_start_is_the_papers(bits):
    clipping = quantizer(bits)
    clipping.clip_to(*group_bounds(WEIGHT, clipping.scheme))
    assert torch.equal(clipping.gamma, torch.full_like(clipping.gamma, 4.0))


def test_shares_that_are_found_are_kept():
    clipping = quantizer(3)
    low, high = group_bounds(WEIGHT, clipping.scheme)
    clipping.clip_to(0.7 * low, 0.7 * high)
    torch.testing.assert_close(clipping.bounds(), (0.7 * low, 0.7 * high))
