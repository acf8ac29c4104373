"""AWQ's two searches against brute force over the tokens themselves."""

import pytest
import torch
from torch import nn

from quantkit.core.affine import group_bounds, quantize
from quantkit.core.scheme import QuantScheme
from quantkit.model.block import Site
from quantkit.model.equivalence import Pair
from quantkit.quantizers.awq import clipped_bounds, output_error, searched_scale

SCHEME, DTYPE = QuantScheme(bits=3, group_size=8), torch.float16
WIDTH, TRIALS = 16, 20


@pytest.fixture
def tokens():
    """Inputs (tokens, in), two channels of which are large."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, WIDTH, generator=generator)
    inputs[:, [3, 12]] *= 20
    return inputs


@pytest.fixture
def weight():
    return torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(1))


def rounded(weight, low, high):
    return quantize(weight, low, high, SCHEME, DTYPE).dequantize().float()


def site(weight, name):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    return Site(name=name, local_name=name, linear=linear, group="", scheme=SCHEME, scale_dtype=DTYPE)


def test_the_error_of_a_difference_is_that_of_the_outputs(tokens, weight):
    found = output_error(weight, tokens.T @ tokens / len(tokens))
    torch.testing.assert_close(found, (tokens @ weight.T).square().sum(dim=1).mean())


@pytest.mark.parametrize("tied", [None, torch.arange(8).view(-1, 4).repeat_interleave(2, 0).flatten()], ids=str)
def test_the_scale_is_the_best_of_all_powers(tokens, weight, tied):
    sites = [site(weight, "a"), site(weight.flip(0) ** 3, "b")]
    size = WIDTH if tied is None else 8
    pair = Pair(name="p", kind="value", source="s", targets=("a", "b"), size=size, of_target=tied)
    magnitude = tokens.abs().mean(0)
    means = magnitude if tied is None else torch.stack([magnitude[tied == i].mean() for i in range(size)])
    errors, scales = [], []
    for trial in range(TRIALS):
        scale = means ** (trial / TRIALS)
        scale = scale / (scale.max() * scale.min()) ** 0.5
        columns = scale if tied is None else scale[tied]
        difference = 0.0
        for one in sites:
            scaled = one.weight * columns
            outputs = (tokens / columns) @ rounded(scaled, *group_bounds(scaled, SCHEME)).T
            difference += (outputs - tokens @ one.weight.T).square().sum().item()
        errors.append(difference)
        scales.append(scale)
    best = min(range(TRIALS), key=errors.__getitem__)
    assert best > 0
    alpha, found = searched_scale(pair, sites, tokens.T @ tokens / len(tokens), magnitude)
    assert alpha == best / TRIALS
    torch.testing.assert_close(found, scales[best])


@torch.no_grad()
def test_bounds_are_the_best_shares_of_every_group(tokens, weight):
    weight[0, 0] = 9.0  # an outlier that is worth clipping or not, as its inputs are
    low, high = clipped_bounds(weight, tokens.T @ tokens / len(tokens), SCHEME, DTYPE)
    shares = set()
    for row, group in torch.cartesian_prod(torch.arange(12), torch.arange(2)).tolist():
        columns = slice(8 * group, 8 * group + 8)
        part, inputs = weight[row : row + 1, columns], tokens[:, columns]
        limits = [part.abs().max() * (1 - 0.05 * trial) for trial in range(10)]
        bounds = [tuple(x[:, None] for x in (part.min(1)[0].clamp(-a, 0), part.max(1)[0].clamp(0, a))) for a in limits]
        errors = [(inputs @ (rounded(part, *pair) - part).T).square().sum().item() for pair in bounds]
        best = min(range(10), key=errors.__getitem__)
        shares.add(best)
        torch.testing.assert_close((low[row, group], high[row, group]), tuple(x[0, 0] for x in bounds[best]))
    assert len(shares) > 2
