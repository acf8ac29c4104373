"""Extremes along the last dimension: PyTorch's own values and gradients, in less time."""

import pytest
import torch

from quantkit.core.extremes import equal, extremes, spread


def values(dtype=torch.float64):
    """Return some that share an extreme with others of their row, one row all of whose values are equal."""
    drawn = torch.randint(-3, 4, (4, 5, 8), generator=torch.Generator().manual_seed(0)).to(dtype)
    drawn[0, 0] = 2.0
    return drawn.requires_grad_()


def test_values_and_gradients_are_those_of_amin_and_amax():
    given, twin = values(), values()
    found, expected = extremes(given), (twin.amin(-1), twin.amax(-1))
    weights = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for results in (found, expected):
        sum((result * weight).sum() for result, weight in zip(results, weights, strict=True)).backward()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(given.grad, twin.grad, rtol=0, atol=1e-12)
    assert len(given.grad.unique()) > 10


def test_one_of_the_two_may_go_unused():
    given, twin = values(), values()
    extremes(given)[1].sum().backward()
    twin.amax(-1).sum().backward()
    torch.testing.assert_close(given.grad, twin.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equality_is_a_number_of_the_values_own_dtype(dtype):
    given = values(dtype).detach()
    found = equal(given, given.amax(-1, keepdim=True))
    assert found.dtype == dtype
    assert torch.equal(found.bool(), given == given.amax(-1, keepdim=True))


def test_what_is_spread_adds_up_to_the_amount():
    result, where = torch.zeros(2, 4), torch.tensor([[1.0, 0, -1, 0], [0, 0, 0, 0]])
    spread(result, where, torch.tensor([[3.0], [5.0]]))
    assert result.tolist() == [[1.5, 0, -1.5, 0], [0, 0, 0, 0]]
