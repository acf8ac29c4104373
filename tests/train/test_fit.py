import math

import pytest
import torch

from quantkit.train.fit import ParameterGroup, fit


def parameter(*values):
    return torch.nn.Parameter(torch.tensor(values))


def run(parameters, loss, *, batches=1, epochs=1, lr=0.1, **group):
    shares = []
    groups = [ParameterGroup(parameters=parameters, lr=lr, **group)]
    return fit(groups, loss, batches=batches, epochs=epochs, tick=shares.append), shares


def test_a_quadratic_goes_to_its_minimum():
    target = torch.tensor([3.0, -1.0])
    value = parameter(0.0, 0.0)
    result, _ = run([value], lambda batch: (value - target).square().sum(), epochs=400)
    torch.testing.assert_close(value.detach(), target, rtol=0, atol=1e-2)
    assert result.losses[-1] < 1e-3 < result.losses[0]
    assert not result.diverged


def test_the_minimum_over_batches_is_their_mean():
    targets = torch.tensor([0.0, 1.0, 5.0])
    value = parameter(4.0)
    run([value], lambda batch: (value - targets[batch]).square().sum(), batches=3, epochs=600, lr=0.01)
    assert value.item() == pytest.approx(2.0, abs=0.3)  # their median is 1


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_first_update_is_one_learning_rate_against_the_gradient(scale):
    value = parameter(1.0, -1.0)
    run([value], lambda batch: scale * value.square().sum(), lr=0.01)
    torch.testing.assert_close(value.detach(), torch.tensor([0.99, -0.99]))


def test_groups_have_their_own_learning_rates_and_decay():
    slow, fast, decayed = parameter(1.0), parameter(1.0), parameter(1.0)
    groups = [
        ParameterGroup(parameters=[slow], lr=0.01),
        ParameterGroup(parameters=[fast], lr=0.1),
        ParameterGroup(parameters=[decayed], lr=0.1, weight_decay=0.5),
    ]
    fit(groups, lambda batch: slow.sum() + fast.sum() + 0 * decayed.sum(), batches=1, epochs=1, tick=print)
    found = [value.item() for value in (slow, fast, decayed)]
    assert found == pytest.approx([0.99, 0.9, 0.95])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_a_loss_that_is_not_finite_never_reaches_the_parameters(bad):
    value = parameter(1.0)
    result, shares = run([value], lambda batch: bad * value.sum(), epochs=3)
    assert result.diverged
    assert value.item() == 1.0
    assert (result.losses, shares) == ([], [])


def test_training_stops_in_the_middle_of_an_epoch():
    value, seen = parameter(1.0), []

    def loss(batch):
        seen.append(value.item())
        return value.sum() * (math.nan if len(seen) == 4 else 1)

    result, shares = run([value], loss, batches=3, epochs=5)
    assert result.diverged
    assert (len(result.losses), len(seen), len(shares)) == (1, 4, 3)
    assert value.item() == seen[-1]


def test_ticks_are_the_shares_of_all_updates():
    value = parameter(1.0)
    _, shares = run([value], lambda batch: value.sum(), batches=2, epochs=2)
    assert shares == [0.25, 0.5, 0.75, 1.0]


def test_batches_come_in_order_every_epoch():
    value, order = parameter(1.0), []
    run([value], lambda batch: order.append(batch) or value.sum(), batches=3, epochs=2)
    assert order == [0, 1, 2, 0, 1, 2]


def test_losses_are_the_means_of_the_epochs():
    value = parameter(0.0)
    result, _ = run([value], lambda batch: value.sum() * 0 + batch, batches=3, epochs=2)
    assert result.losses == [1.0, 1.0]


def test_no_epochs_change_nothing():
    value = parameter(1.0)
    result, shares = run([value], lambda batch: value.sum(), epochs=0)
    assert (value.item(), result.losses, result.diverged, shares) == (1.0, [], False, [])
