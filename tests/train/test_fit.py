"""The training loop: what its updates are, which values it ends with, and when it stops."""

import itertools
import math

import pytest
import torch

from quantkit.train.fit import SCHEDULES, SIGN, ParameterGroup, fit


def parameter(*values):
    return torch.nn.Parameter(torch.tensor(values))


def run(parameters, loss, *, batches=1, updates=1, lr=0.1, schedule="constant", seed=None, **group):
    """Return the result of a fit and the shares that it told."""
    shares = []
    result = fit(
        [ParameterGroup(parameters=parameters, lr=lr, **group)],
        loss,
        batches=batches,
        updates=updates,
        tick=shares.append,
        schedule=schedule,
        generator=None if seed is None else torch.Generator().manual_seed(seed),
    )
    return result, shares


def positions(loss_of, *, updates, **options):
    """Return where one parameter, which starts at 0, is before each update and at the end."""
    value, seen = parameter(0.0), []

    def loss(batch):
        seen.append(value.item())
        return loss_of(value)

    run([value], loss, updates=updates, **options)
    return [*seen, value.item()]


def test_a_quadratic_goes_to_its_minimum():
    target = torch.tensor([3.0, -1.0])
    value = parameter(0.0, 0.0)
    result, _ = run([value], lambda batch: (value - target).square().sum(), updates=400)
    torch.testing.assert_close(value.detach(), target, rtol=0, atol=1e-2)
    assert result.losses[-1] < 1e-3 < result.losses[0]
    assert not result.diverged


def test_the_minimum_over_batches_is_their_mean():
    targets = torch.tensor([0.0, 1.0, 5.0])
    value = parameter(4.0)
    run([value], lambda batch: (value - targets[batch]).square().sum(), batches=3, updates=1800, lr=0.01)
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
    fit(groups, lambda batch: slow.sum() + fast.sum() + 0 * decayed.sum(), batches=1, updates=1, tick=print)
    found = [value.item() for value in (slow, fast, decayed)]
    assert found == pytest.approx([0.99, 0.9, 0.95])


SHARES = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: math.cos(math.pi * done / 2) ** 2,
}


@pytest.mark.parametrize("betas", [(0.9, 0.999), SIGN], ids=["adam", "sign"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_constant_gradient_draws_the_schedule(schedule, betas):
    """Under a constant gradient both optimizers move by the learning rate, so the path is the sum of the schedule."""
    updates, lr = 8, 0.25
    path = positions(lambda value: -value.sum(), updates=updates, lr=lr, schedule=schedule, betas=betas)
    steps = [after - before for before, after in itertools.pairwise(path)]
    assert steps == pytest.approx([lr * SHARES[schedule](k / updates) for k in range(updates)], rel=1e-4)


def test_sign_descent_forgets_the_size_and_the_past_of_gradients():
    slopes = iter([1e-3, -50.0, 2.0, 2.0, -1e-4])
    path = positions(lambda value: next(slopes) * value.sum(), updates=5, lr=0.5, betas=SIGN)
    assert path == pytest.approx([0.0, -0.5, 0.0, -0.5, -1.0, -0.5], abs=1e-3)


@pytest.mark.parametrize("betas", [(0.9, 0.999), SIGN], ids=["adam", "sign"])
def test_the_size_of_the_loss_does_not_matter(betas):
    """A block's mean squared error may be so small that AdamW's own epsilon would stop the gradients."""

    def path(size):
        return positions(lambda value: size * (value.sum() - 3).square(), updates=20, lr=0.05, betas=betas)

    assert path(1e-9) == pytest.approx(path(1.0), rel=1e-3)


def test_sign_descent_leaves_what_has_no_gradient():
    value = parameter(1.0, 1.0)
    run([value], lambda batch: value[0], lr=0.25, betas=SIGN)
    assert value.tolist() == pytest.approx([0.75, 1.0])


def test_a_limit_holds_after_every_update():
    path = positions(lambda value: -value.sum(), updates=6, lr=0.2, limit=0.5, betas=SIGN)
    assert path == pytest.approx([0.0, 0.2, 0.4, 0.5, 0.5, 0.5, 0.5], abs=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_a_loss_that_is_not_finite_never_reaches_the_parameters(bad):
    value = parameter(1.0)
    result, shares = run([value], lambda batch: bad * value.sum(), updates=3)
    assert result.diverged
    assert value.item() == 1.0
    assert (result.losses, shares) == ([], [])


def diverging(losses, batches):
    """Return the result of a fit with these losses, the value at the start of each update, and the value at the end."""
    value, seen, left = parameter(1.0), [], list(losses)

    def loss(batch):
        seen.append(value.item())
        return value.sum() * 0 + left.pop(0) - value.sum() + value.sum().detach()

    result, _ = run([value], loss, batches=batches, updates=len(losses) + 5, betas=SIGN)
    return result, seen, value.item()


def test_a_divergence_in_the_first_pass_gives_back_the_start():
    result, seen, end = diverging([5.0, 4.0, math.nan], batches=4)
    assert (result.diverged, result.losses) == (True, [])
    assert len(seen) == 3
    assert end == seen[0] == 1.0


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([5.0, 5.0, 3.0, 3.0, 4.0, 4.0, 1.0, math.nan], 2),  # half a pass with a small loss is no pass
        ([3.0, 3.0, 4.0, 4.0, math.inf], 1),
        ([3.0, 3.0, 3.0, 3.0, math.nan], 1),  # of two that are alike the first
    ],
    ids=["the second pass", "the first pass", "a tie"],
)
def test_a_later_divergence_gives_back_the_end_of_the_best_pass(losses, best):
    result, seen, end = diverging(losses, batches=2)
    assert result.diverged
    assert len(result.losses) == (len(losses) - 1) // 2
    assert end == seen[2 * best]


def test_several_groups_are_given_back_together():
    first, second, calls = parameter(1.0), parameter(2.0), []

    def loss(batch):
        calls.append(batch)
        return (first + second).sum() * (math.nan if len(calls) == 4 else 1.0)

    groups = [ParameterGroup(parameters=[value], lr=lr, betas=SIGN) for value, lr in ((first, 0.1), (second, 0.2))]
    fit(groups, loss, batches=2, updates=8, tick=lambda share: None)
    assert [first.item(), second.item()] == pytest.approx([0.8, 1.6])


def test_ticks_are_the_shares_of_all_updates():
    value = parameter(1.0)
    _, shares = run([value], lambda batch: value.sum(), batches=2, updates=4)
    assert shares == [0.25, 0.5, 0.75, 1.0]


def batch_order(**options):
    value, order = parameter(1.0), []
    run([value], lambda batch: order.append(batch) or value.sum(), **options)
    return order


def test_batches_come_in_order_without_a_generator():
    assert batch_order(batches=3, updates=6) == [0, 1, 2, 0, 1, 2]


def test_a_generator_shuffles_every_pass_anew_and_the_same_again():
    order = batch_order(batches=8, updates=24, seed=1)
    passes = [order[start : start + 8] for start in (0, 8, 16)]
    assert [sorted(one) for one in passes] == 3 * [list(range(8))]
    assert len({tuple(one) for one in [*passes, list(range(8))]}) == 4
    assert batch_order(batches=8, updates=24, seed=1) == order
    assert batch_order(batches=8, updates=24, seed=2) != order


def test_the_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    batch_order(batches=8, updates=9, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(("updates", "finished"), [(2, 0), (3, 1), (5, 1), (7, 2)])
def test_updates_need_not_fill_whole_passes(updates, finished):
    value = parameter(1.0)
    result, shares = run([value], lambda batch: -value.sum(), batches=3, updates=updates, betas=SIGN)
    assert (len(shares), shares[-1], len(result.losses)) == (updates, 1.0, finished)
    assert value.item() == pytest.approx(1 + 0.1 * updates)
    assert not result.diverged


def test_losses_are_the_means_of_the_passes():
    value = parameter(0.0)
    result, _ = run([value], lambda batch: value.sum() * 0 + batch, batches=3, updates=6)
    assert result.losses == [1.0, 1.0]


def test_no_updates_change_nothing():
    value = parameter(1.0)
    result, shares = run([value], lambda batch: value.sum(), updates=0)
    assert (value.item(), result.losses, result.diverged, shares) == (1.0, [], False, [])
