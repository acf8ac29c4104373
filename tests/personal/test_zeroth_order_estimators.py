"""Estimators that need no gradients: what they leave as it was, what they keep, what they refuse."""

import math
from dataclasses import fields

import pytest
import torch
from torch import nn
from torch.nn import functional

from quantkit.errors import DataError, UsageError
from quantkit.personal.gradients.dp_mezo import DpMezo, clipped_sum
from quantkit.personal.gradients.mezo import Mezo
from quantkit.personal.gradients.subspace_zo import SubspaceZo

ESTIMATORS = {
    "mezo": Mezo(directions=2),
    "one side": Mezo(antithetic=False),
    "subspace": SubspaceZo(window=3, share=0.2),
    "cut directions": SubspaceZo(window=3, share=0.2, remove="directions"),
    "mapped": SubspaceZo(window=3, share=0.2, coordinates="mapped"),
    "raw, sensitive": SubspaceZo(window=3, share=0.2, coordinates="raw", sensitive=0.5),
    "private": DpMezo(noise=1.0, expected=8, key=b"test"),
}


def fresh(name):
    kind = ESTIMATORS[name]
    return type(kind)(**{field.name: getattr(kind, field.name) for field in fields(kind) if field.init})


def problem(seed=0):
    """Return float32 parameters and the losses of 8 examples; a forward pass tells of gradients that it would need."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    inputs, labels, seen = torch.randn(8, 6), torch.randint(3, (8,)), []

    def losses():
        values = functional.cross_entropy(model(inputs), labels, reduction="none")
        seen.append((torch.is_grad_enabled(), values.requires_grad, values.grad_fn))
        return values

    return dict(model.named_parameters()), losses, seen


def train(estimator, parameters, losses, steps, start=0):
    for step in range(start, start + steps):
        estimator.estimate([losses], parameters, step=step)
        with torch.no_grad():
            for parameter in parameters.values():
                parameter -= 0.05 * parameter.grad


@pytest.mark.parametrize("name", ESTIMATORS)
def test_parameters_are_left_to_the_bit_and_no_graph_is_made(name):
    parameters, losses, seen = problem()
    before = {key: p.detach().clone() for key, p in parameters.items()}
    loss = fresh(name).estimate([losses], parameters, step=0)
    assert all(torch.equal(p, before[key]) for key, p in parameters.items())
    assert all(p.grad.abs().sum() > 0 for p in parameters.values())
    assert set(seen) == {(False, False, None)}
    assert loss == pytest.approx(float(losses().detach().mean()), abs=1e-2)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_failed_pass_leaves_parameters_as_they_were(name):
    parameters, losses, _ = problem()
    before = {key: p.detach().clone() for key, p in parameters.items()}
    passes = iter(range(2))

    def fails():
        return losses() if next(passes) == 0 else 1 / 0

    with pytest.raises(ZeroDivisionError):
        fresh(name).estimate([fails], parameters, step=0)
    assert all(torch.equal(p, before[key]) for key, p in parameters.items())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_going_on_from_a_state_is_as_if_nothing_had_happened(name):
    whole, losses, _ = problem()
    train(fresh(name), whole, losses, 8)
    cut, losses, _ = problem()
    first = fresh(name)
    train(first, cut, losses, 5)
    kept = {key: value.clone() for key, value in first.state().items()}
    second = fresh(name)
    second.restore(kept)
    train(second, cut, losses, 3, start=5)
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    assert second.state()["rho"].shape == (8, second.directions)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_slopes_are_all_that_a_follower_needs(name):
    """Without the losses, from the slopes alone, every gradient is had again to the bit."""
    taught, losses, _ = problem()
    teacher = fresh(name)
    train(teacher, taught, losses, 8)
    followed, _, _ = problem()
    follower = fresh(name)
    for step, rho in enumerate(teacher.state()["rho"]):
        follower.follow(rho, followed, step=step)
        with torch.no_grad():
            for parameter in followed.values():
                parameter -= 0.05 * parameter.grad
    assert all(torch.equal(taught[key], followed[key]) for key in taught)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_empty_batch_has_a_gradient_and_no_loss(name):
    parameters, _, _ = problem()
    estimator = fresh(name)
    assert math.isnan(estimator.estimate([], parameters, step=0))
    size = sum(float(p.grad.abs().sum()) for p in parameters.values())
    assert math.isfinite(size)
    assert (size > 0) == (name == "private")  # noise is added whether anybody is there or not


def test_micro_batches_change_nothing():
    parameters, losses, _ = problem()
    parts = [lambda start=start: losses()[start : start + 2] for start in range(0, 8, 2)]
    gradients = []
    for split in ([losses], parts):
        Mezo(seed=1).estimate(split, parameters, step=0)
        gradients.append(torch.cat([p.grad.flatten() for p in parameters.values()]))
    assert torch.allclose(*gradients, rtol=1e-6)


def test_distances_are_relative_to_what_there_is():
    parameters, losses, _ = problem()
    for scale in (1.0, 1e3):
        large = {key: nn.Parameter(p.detach() * scale) for key, p in parameters.items()}
        mezo = Mezo(perturbation=1e-3)
        mezo.estimate([losses], large, step=0)
        values = torch.cat([p.detach().flatten() for p in large.values()])
        assert mezo.distance == pytest.approx(1e-3 * float(values.square().mean().sqrt()), rel=1e-5)
    zero = Mezo(perturbation=1e-3)
    zero.estimate([losses], {"bias": nn.Parameter(torch.zeros(4))}, step=0)
    assert zero.distance == 1e-3


def test_the_noise_floor_is_that_of_the_loss():
    parameters, losses, _ = problem()
    generator = torch.Generator().manual_seed(0)

    def noisy():
        return losses().double() + 1e-4 * torch.randn(1, generator=generator, dtype=torch.float64)

    mezo = Mezo(perturbation=1e-2)
    before = {key: p.detach().clone() for key, p in parameters.items()}
    floor = mezo.noise_floor([noisy], parameters)
    assert floor.loss == pytest.approx(1e-4, rel=0.8)
    assert floor.slope == pytest.approx(floor.loss / (math.sqrt(2) * mezo.distance))
    assert mezo.noise_floor([losses], parameters).loss < 1e-6  # float32
    assert all(torch.equal(p, before[key]) for key, p in parameters.items())


def test_cut_directions_have_nothing_of_what_is_removed():
    parameters, losses, _ = problem()
    subspace = SubspaceZo(window=3, share=0.3, remove="directions")
    train(subspace, parameters, losses, 5)
    removed = subspace.removed["0.weight"]
    draw = subspace.draws(5)[0]("0.weight", parameters["0.weight"])
    assert removed.abs().sum() > 0
    assert (removed @ draw.double().unsqueeze(2)).abs().max() < 1e-6


def test_only_the_most_sensitive_examples_count():
    slopes = torch.tensor([[1.0, -5.0, 0.5, 3.0], [1.0, 4.0, 0.5, 0.0]], dtype=torch.float64)
    assert SubspaceZo(sensitive=0.5).summed_up(slopes, 0).tolist() == [-1.0, 2.0]
    assert SubspaceZo().summed_up(slopes, 0).tolist() == slopes.mean(1).tolist()


# privacy


def test_no_example_adds_more_than_the_bound():
    slopes = torch.tensor([[3.0, 0.1, -8.0, math.nan], [4.0, 0.2, 6.0, 1.0]], dtype=torch.float64)
    assert clipped_sum(slopes[:, :1], 1.0).tolist() == pytest.approx([0.6, 0.8])
    assert clipped_sum(slopes[:, 1:2], 1.0).tolist() == [0.1, 0.2]
    assert clipped_sum(slopes[:, 3:], 1.0).tolist() == [0.0, 0.0]
    assert clipped_sum(slopes, 1.0).tolist() == pytest.approx([0.6 + 0.1 - 0.8, 0.8 + 0.2 + 0.6])
    one = torch.tensor([[-7.0, 0.4, 2.0]], dtype=torch.float64)
    assert clipped_sum(one, 0.5).tolist() == one.clamp(-0.5, 0.5).sum(1).tolist()


def test_without_noise_and_with_a_far_bound_privacy_is_mezo():
    parameters, losses, _ = problem()
    gradients = []
    for estimator in (Mezo(seed=4), DpMezo(seed=4, noise=0.0, expected=8, bound=1e6)):
        estimator.estimate([losses], parameters, step=0)
        gradients.append(torch.cat([p.grad.flatten() for p in parameters.values()]))
    assert torch.allclose(*gradients, rtol=1e-6)


def test_noise_has_the_deviation_that_is_accounted_for():
    private = DpMezo(noise=1.5, expected=4, bound=0.2, key=b"test", directions=2)
    nobody = torch.zeros(2, 0, dtype=torch.float64)
    drawn = torch.stack([private.summed_up(nobody, step) for step in range(2000)])
    assert drawn.std(0).tolist() == pytest.approx([1.5 * 0.2 / 4] * 2, rel=0.06)
    assert abs(float(drawn.prod(1).mean())) < 4 * (1.5 * 0.2 / 4) ** 2 / 2000**0.5


def test_keys_are_secret_unless_given():
    nobody = torch.zeros(1, 0, dtype=torch.float64)
    first, second = (DpMezo(noise=1.0, expected=1) for _ in range(2))
    assert first.summed_up(nobody, 0) != second.summed_up(nobody, 0)
    assert "key" not in repr(first)
    assert set(first.state()) == {"rho", "distance"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mezo(perturbation=0.0), "the perturbation is 0; use a finite number above 0, such as 1e-3"),
        (lambda: Mezo(directions=0), "there are 0 directions; use at least 1"),
        (lambda: Mezo(seed=-1), "the seed -1 is out of range"),
        (lambda: SubspaceZo(window=1), "a history of 1 steps has no directions; use at least 2"),
        (lambda: SubspaceZo(share=1.5), "share is 1.5; use a number from 0 to 1"),
        (lambda: SubspaceZo(remove="gradients"), "unknown remove 'gradients' \\(did you mean gradient"),
        (lambda: DpMezo(noise=-1.0, expected=8), "noise is -1; use a finite number, 0 for none"),
        (lambda: DpMezo(noise=1.0, expected=0), "the expected batch is 0; use a finite number above 0"),
        (lambda: DpMezo(noise=1.0, expected=8, bound=math.nan), "the clipping bound is nan"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize("stiffness", [1e-2, 1.0, 1e3])
def test_the_rate_follows_from_the_curvature(stiffness):
    parameters = {"a": nn.Parameter(torch.zeros(40, 20)), "b": nn.Parameter(torch.zeros(200))}
    size = sum(p.numel() for p in parameters.values())

    def losses():
        return torch.stack([stiffness / 2 * sum(p.double().square().sum() for p in parameters.values())])

    # z'Hz is stiffness times a chi-squared number with as many degrees of freedom as there are parameters
    curvature = 1 / (2 * Mezo().rate([losses], parameters))
    assert curvature == pytest.approx(stiffness * size, rel=4 * math.sqrt(2 / size / 8))
    assert all(not p.any() for p in parameters.values())


def test_descent_with_that_rate_goes_down():
    parameters, losses, _ = problem()
    estimator = Mezo()
    before, rate = float(losses().detach().mean()), estimator.rate([losses], parameters)
    for step in range(200):
        estimator.estimate([losses], parameters, step=step)
        with torch.no_grad():
            for parameter in parameters.values():
                parameter -= rate * parameter.grad
    assert float(losses().detach().mean()) < 0.5 * before


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_no_rate_follows_from_a_loss_that_does_not_change(value):
    parameters, _, _ = problem()
    with pytest.raises(DataError, match="pass --lr"):
        Mezo().rate([lambda: torch.full((4,), value)], parameters)
