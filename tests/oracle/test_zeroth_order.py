"""MeZO against autograd, the official update formula, and exact gradients; the subspace against numpy."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from quantkit.personal import noise
from quantkit.personal.gradients.mezo import Mezo, noise_of, slopes
from quantkit.personal.gradients.subspace_zo import SubspaceZo, low_variance, standardised, without


def mlp(dtype=torch.float64, seed=0):
    """Return a smooth model of two layers with its loss of 8 examples, in micro-batches of 5 and 3."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).to(dtype).eval()
    inputs, labels = torch.randn(8, 6, dtype=dtype), torch.randint(4, (8,))

    def losses(part):
        return lambda: functional.cross_entropy(model(inputs[part]), labels[part], reduction="none")

    return dict(model.named_parameters()), [losses(slice(0, 5)), losses(slice(5, 8))]


def whole(losses):
    return torch.cat([part() for part in losses])


def directional(parameters, losses, draw):
    """Return z . gradient of the mean loss, by autograd."""
    gradients = torch.autograd.grad(whole(losses).mean(), list(parameters.values()))
    return sum(float((draw(n, p).to(p) * g).sum()) for (n, p), g in zip(parameters.items(), gradients, strict=True))


def test_slopes_are_directional_derivatives_up_to_the_square_of_the_distance():
    parameters, losses = mlp()
    draw = Mezo(seed=3).draws(0)[0]
    exact = directional(parameters, losses, draw)

    def gap(distance):
        return abs(float(slopes(losses, parameters, [draw], distance)[0].mean()) - exact)

    assert gap(1e-3) < 1e-4 * abs(exact)
    assert gap(1e-1) / gap(1e-2) == pytest.approx(100, rel=0.2)
    assert gap(1e-2) / gap(1e-3) == pytest.approx(100, rel=0.05)


def test_one_side_has_an_error_of_the_distance_itself():
    parameters, losses = mlp()
    draw = Mezo(seed=3).draws(0)[0]
    exact = directional(parameters, losses, draw)
    gaps = [abs(float(slopes(losses, parameters, [draw], e, antithetic=False)[0].mean()) - exact) for e in (1e-3, 1e-4)]
    assert gaps[0] / gaps[1] == pytest.approx(10, rel=0.05)


def test_slopes_of_examples_are_those_of_each_alone():
    parameters, losses = mlp()
    draws = Mezo(directions=2).draws(5)
    found, values = slopes(losses, parameters, draws, 1e-2)
    assert found.shape == (2, 8)
    assert values == pytest.approx(whole(losses).tolist(), abs=1e-2)
    for place in range(8):
        alone = [lambda place=place: whole(losses)[place : place + 1]]
        assert torch.equal(slopes(alone, parameters, draws, 1e-2)[0][:, 0], found[:, place])


def test_the_estimate_is_unbiased():
    """On a quadratic the estimate has no error of the distance: its mean is the gradient, exactly."""
    count, size = 100_000, 30
    torch.manual_seed(0)
    matrix = torch.randn(size, size, dtype=torch.float64)
    matrix, place = matrix @ matrix.T / size, torch.randn(size, dtype=torch.float64)
    z = noise.normal(0, 0, 0, "theta", (count, size)).double()

    def loss(theta):
        return (theta @ matrix * theta).sum(-1) / 2

    rho = (loss(place + 0.1 * z) - loss(place - 0.1 * z)) / 0.2
    estimates = rho[:, None] * z
    error = estimates.std(0) / count**0.5
    assert ((estimates.mean(0) - place @ matrix).abs() < 3 * error).float().mean() > 0.98
    assert (estimates.mean(0) - place @ matrix).norm() < 1.5 * error.norm()


def test_estimates_of_the_class_average_to_the_gradient_of_autograd():
    parameters, losses = mlp()
    exact = torch.autograd.grad(whole(losses).mean(), list(parameters.values()))
    exact = torch.cat([g.flatten() for g in exact])
    total, rounds = torch.zeros_like(exact), 400
    mezo = Mezo(directions=4, perturbation=1e-3)
    for step in range(rounds):
        mezo.estimate(losses, parameters, step=step)
        total += torch.cat([p.grad.flatten() for p in parameters.values()])
    # of n estimates the mean has a relative error of sqrt(d / n)
    assert (total / rounds - exact).norm() / exact.norm() < 1.3 * (len(exact) / (4 * rounds)) ** 0.5


@pytest.mark.parametrize("directions", [1, 3])
def test_a_step_is_the_official_formula(directions):
    """theta - lr (rho z + decay theta), without decay where a name has bias in it; z given, here by the generator."""
    parameters, losses = mlp()
    before = {name: p.detach().clone() for name, p in parameters.items()}
    rate, decay, distance = 0.1, 0.01, 1e-3
    expected = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for k in range(directions):
        z = {name: noise.normal(11, 4, k, name, p.shape).double() for name, p in parameters.items()}
        sides = []
        for sign in (1, -1):
            for name, p in parameters.items():
                p.data = before[name] + sign * distance * z[name]
            sides.append(whole(losses).mean().item())
        rho = float(np.float32((sides[0] - sides[1]) / (2 * distance)))  # slopes are kept in float32
        for name in expected:
            expected[name] += rho * z[name] / directions
    for name, p in parameters.items():
        p.data = before[name].clone()
        expected[name] = before[name] - rate * (expected[name] + decay * before[name] * ("bias" not in name))

    mezo = Mezo(seed=11, directions=directions, perturbation=distance)
    mezo.distance = distance
    mezo.estimate(losses, parameters, step=4)
    decayed = [p for name, p in parameters.items() if "bias" not in name]
    others = [p for name, p in parameters.items() if "bias" in name]
    torch.optim.SGD([{"params": decayed, "weight_decay": decay}, {"params": others}], lr=rate).step()
    for name, p in parameters.items():
        assert torch.allclose(p, expected[name], rtol=1e-14, atol=1e-15)
        assert not torch.equal(p, before[name])


def test_noise_of_a_loss_is_found():
    torch.manual_seed(0)
    x = np.linspace(-1, 1, 9)
    found = [noise_of(np.exp(x / 50) + 1e-6 * np.random.default_rng(seed).normal(size=9)) for seed in range(200)]
    assert float(np.median(found)) == pytest.approx(1e-6, rel=0.3)
    assert noise_of(np.exp(x / 50)) < 1e-12


# the subspace


def pca(history, share):
    """Return the directions that hold the last `share` of the variance, from the eigenvectors of the covariance."""
    deviation = history.std(0, ddof=1)
    centred = (history - history.mean(0)) / np.where(deviation > 0, deviation, 1)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    values, vectors = values[::-1], vectors[:, ::-1]
    total, kept = 0.0, 0
    while total <= (1 - share) * values.sum():
        total, kept = total + values[kept], kept + 1
    return vectors[:, kept : min(len(history) - 1, history.shape[1])].T, vectors[:, :kept].T


def walk(window=12, d=40, seed=0):
    """Return a path that goes far along few directions and hardly along others."""
    generator = np.random.default_rng(seed)
    steps = generator.normal(size=(window, window)) * np.geomspace(1, 1e-3, window)
    return np.cumsum(steps, 0) @ generator.normal(size=(window, d))


@pytest.mark.parametrize("share", [1e-4, 1e-2, 0.2, 0.99])
def test_the_projector_is_that_of_a_principal_component_analysis(share):
    history = walk()
    removed = low_variance(standardised(torch.from_numpy(history))[0], share)
    expected, kept = pca(history, share)
    assert removed.shape == expected.shape
    assert 1 <= len(removed) <= len(history) - 1
    assert torch.allclose(removed @ removed.T, torch.eye(len(removed), dtype=torch.float64), atol=1e-12)
    assert np.allclose(removed.T.numpy() @ removed.numpy(), expected.T @ expected, atol=1e-9)
    gradient = torch.from_numpy(np.random.default_rng(1).normal(size=(1, 40)))
    cut = without(gradient, removed[None])
    assert (cut @ removed.T).abs().max() < 1e-12  # nothing of P is left
    assert np.allclose(kept @ cut[0].numpy(), kept @ gradient[0].numpy(), atol=1e-9)  # all of the others


def test_no_share_removes_nothing():
    assert len(low_variance(standardised(torch.from_numpy(walk()))[0], 0.0)) == 0


def test_the_default_of_the_official_program_keeps_next_to_nothing():
    """Its 0.99 is a trap: of 11 directions 1 is kept, where 1e-3, as published, keeps most of them."""
    centred = standardised(torch.from_numpy(walk()))[0]
    assert len(low_variance(centred, 0.99)) == 10
    assert len(low_variance(centred, 1e-3)) < 8


def test_a_history_without_motion_removes_nothing():
    assert len(low_variance(standardised(torch.ones(5, 7, dtype=torch.float64))[0], 0.5)) == 0


def test_a_step_of_the_subspace_is_the_published_formula():
    """RGE on one side and the projection, in float64, with the numbers of the generator as directions."""
    parameters, losses = mlp()
    parameters = {"0.weight": parameters["0.weight"]}
    subspace = SubspaceZo(seed=2, directions=3, window=4, share=0.3, perturbation=1e-3)
    weight, path = parameters["0.weight"], []
    for step in range(7):
        before = weight.detach().clone()
        path += [before] if step else []
        subspace.estimate(losses, parameters, step=step)
        expected = torch.zeros_like(before)
        for k in range(3):
            z = noise.normal(2, step, k, "0.weight", before.shape).double()
            with torch.no_grad():
                here = whole(losses).mean()
                weight.copy_(before + subspace.distance * z)
                expected += (whole(losses).mean() - here) / subspace.distance * z / 3
                weight.copy_(before)
        if step >= 4:
            for row in range(len(before)):
                removed = torch.from_numpy(pca(torch.stack(path[:4])[:, row].numpy(), 0.3)[0].copy())
                expected[row] -= expected[row] @ removed.T @ removed
        assert torch.allclose(weight.grad, expected, rtol=1e-6, atol=1e-8)
        with torch.no_grad():
            weight -= 0.05 * weight.grad
