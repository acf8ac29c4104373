"""DiceSGD: closed forms, conservation, and that no neighbour ever exceeds the sensitivity that is accounted."""

import math

import pytest
import torch
from slotted import batch, losses_of, one_by_one, slotted, tiny

from quantkit.errors import QuantkitWarning, UsageError
from quantkit.personal.accounting import gaussian_epsilon, gaussian_noise_for
from quantkit.personal.clipping import norms, weighted
from quantkit.personal.gradients.dice import METHOD, Dice, _projection, feed_back, norm_of, sensitivity

TARGETS = torch.tensor([[0.0], [0.0], [10.0]], dtype=torch.float64)


def clipped_mean(rows, bound):
    return {"x": weighted(_projection(norms({"x": rows}, ["x"]), bound), rows) / len(rows)}


def descend(inner, outer, steps=4000, rate=0.05):
    """Return where x ends that minimises the sum of (x - target)^2 / 2, and the norm of the error there."""
    x, error = torch.zeros(1, dtype=torch.float64), {"x": torch.zeros(1, dtype=torch.float64)}
    for _ in range(steps):
        rows = x - TARGETS
        v, error = feed_back({"x": rows.mean(0)}, clipped_mean(rows, inner), error, outer)
        x = x - rate * v["x"]
    return float(x), float(norm_of(error))


def test_clipping_alone_stays_beside_the_minimum():
    x = torch.zeros(1, dtype=torch.float64)
    for _ in range(4000):
        x = x - 0.05 * clipped_mean(x - TARGETS, 0.5)["x"]
    assert float(x) == pytest.approx(0.25, abs=1e-6)  # 2 x = C1: half of the clipped pull of the third


@pytest.mark.parametrize("outer", [0.5, 1.0, 5.0])
def test_feeding_back_reaches_the_minimum(outer):
    assert descend(0.5, outer)[0] == pytest.approx(10 / 3, abs=1e-6)


def test_less_outer_than_inner_clipping_never_gets_there_and_is_refused():
    place, grown = descend(0.5, 0.1)
    assert place == pytest.approx(0.4, abs=1e-3)
    assert grown > 1000
    with pytest.raises(
        UsageError, match=r"outer clipping 0\.1 is below the inner 0\.5: the error would grow; raise it"
    ):
        Dice(noise=0, expected=1, participations=1, inner=0.5, outer=0.1)


def test_without_a_bound_it_is_the_gradient():
    model, parameters = slotted(tiny("llama"))
    given = batch(4)
    theirs = one_by_one(model, parameters, given)
    estimator = Dice(noise=0, expected=4, participations=1, inner=1e9, outer=1e9, enforced=1e9)
    loss = estimator.estimate(losses_of(model, given, [3, 1]), parameters, step=0)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, theirs[name].mean(0), rtol=1e-10, atol=1e-12)
    assert loss == pytest.approx(losses_of(model, given)[0]().mean().item())


def test_what_was_released_and_what_is_left_are_all_gradients():
    model, parameters = slotted(tiny("llama"))
    estimator = Dice(noise=0, expected=3, participations=9, inner=0.5, outer=2.0, enforced=1e9)
    released = {name: torch.zeros_like(p) for name, p in parameters.items()}
    true = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for step in range(6):
        given = batch(3, seed=step)
        rows = one_by_one(model, parameters, given)
        estimator.estimate(losses_of(model, given), parameters, step=step)
        for name, parameter in parameters.items():
            released[name] += parameter.grad
            true[name] += rows[name].mean(0)
            parameter.data -= 0.1 * parameter.grad
    for name in parameters:
        torch.testing.assert_close(released[name] + estimator.error[name], true[name], rtol=1e-10, atol=1e-11)


def moved(generator, *, inner, outer, enforced, participations, steps=12, batch_size=3, width=4):
    """Return how far all v_t move when one example is taken out of the steps that it is in, x_t being kept."""
    taken = torch.randperm(steps, generator=generator)[:participations].tolist()
    errors = [{"x": torch.zeros(width, dtype=torch.float64)} for _ in range(2)]
    distance = 0.0
    for step in range(steps):
        size = 10 ** (2 * torch.rand(batch_size, 1, generator=generator, dtype=torch.float64) - 1)
        rows = size * torch.randn(batch_size, width, generator=generator, dtype=torch.float64)
        rows = rows * _projection(rows.norm(dim=1), enforced)[:, None]
        without = rows.clone()
        if step in taken:
            without[0] = 0
        pair = []
        for side, given in enumerate((rows, without)):
            clipped = clipped_mean(given, inner)
            v, errors[side] = feed_back({"x": given.mean(0)}, clipped, errors[side], outer)
            pair.append(v["x"])
        distance += float((pair[0] - pair[1]).square().sum())
    return math.sqrt(distance)


@pytest.mark.parametrize(("outer", "participations"), [(0.5, 1), (0.5, 4), (2.0, 4), (2.0, 12)])
def test_no_neighbour_moves_more_than_is_accounted(outer, participations):
    settings = {"inner": 0.5, "enforced": 3.0, "participations": participations}
    bound = sensitivity(**settings, batch=3)
    generator = torch.Generator().manual_seed(participations)
    found = [moved(generator, outer=outer, **settings) for _ in range(60)]
    assert max(found) <= bound
    assert max(found) > 0.1 * bound  # it is about these quantities


def test_noise_is_in_units_of_the_sensitivity_and_epsilon_that_of_one_gaussian_mechanism():
    wide = {"a": torch.nn.Parameter(torch.zeros(100_000))}
    noise = gaussian_noise_for(3.0, 1e-5)
    estimator = Dice(noise=noise, expected=8, participations=5, inner=0.5, outer=1, enforced=2)
    delta = math.sqrt(5) * 0.5 / 8 + 5 * 1.5 / 8
    assert estimator.sensitivity() == pytest.approx(delta)
    assert math.isnan(estimator.estimate([], wide, step=0))
    assert float(wide["a"].grad.std()) == pytest.approx(noise * delta, rel=0.02)
    assert gaussian_epsilon(noise, 1e-5) == pytest.approx(3.0, abs=1e-6)


def test_a_growing_error_is_told():
    model, parameters = slotted(tiny("llama"))
    estimator = Dice(noise=0, expected=1, participations=9, inner=1e-3, outer=1e-3, enforced=1e3)
    with pytest.warns(QuantkitWarning, match="what clipping took has grown to .* raise the outer clipping"):
        estimator.estimate(losses_of(model, batch(2)), parameters, step=0)


def test_the_error_is_not_written_down():
    estimator = Dice(noise=0, expected=1, participations=1)
    estimator.error = {"secret": torch.ones(1)}
    assert estimator.state() == {}
    assert "secret" not in repr(estimator)
    with pytest.raises(UsageError, match="dice cannot go on after an interruption"):
        estimator.restore({})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inner": 0}, "inner clipping is 0; use a finite number above 0"),
        ({"enforced": 0.5}, "gradients held to 0.5 are below the inner clipping 1; raise it"),
        ({"participations": 0}, "noise, batch and participations must be finite numbers"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        METHOD(**{"noise": 1, "expected": 1, "participations": 1} | settings)
