"""Shrinking thresholds: the budget is kept, and the ladder finds what a search over all thresholds finds."""

import copy

import pytest
import torch
from torch import nn

from quantkit import Resilience, bound_module
from quantkit.errors import UsageError
from quantkit.resilience import interval, ladder
from quantkit.resilience.bounds import Bound
from quantkit.resilience.material import Material


def material(bounds, damage, *, budget=1.0, values=None):
    """Return material whose 'model' gives its bounds' outputs for fixed inputs as logits."""
    x = torch.linspace(0, 4, 65) if values is None else values

    def run(_):
        for bound in bounds:
            y = bound(x)
        return torch.stack([y, -y], dim=-1)

    return Material(layers=[[bound] for bound in bounds], run=run, batches=4, damage=damage, budget=budget)


def test_a_descent_ends_just_above_what_the_budget_forbids():
    bound = Bound(torch.tensor(4.0))
    work = material([bound], lambda: 0.0 if float(bound.threshold) >= 1.7 else 2.0)
    choice = Resilience(decays=(1e3,) * 5, epochs=16)
    step = ladder.descend(work, work.layers, choice, 1.0)
    # the last rung moves by 4 batches of 0.05 / 2^4 in a pass
    assert 1.7 <= float(bound.threshold) < 1.7 * 1.02
    assert step.refused == 5
    assert step.factor == pytest.approx(float(bound.threshold) / 4, rel=1e-5)


def test_a_decay_stops_where_it_weighs_as_much_as_what_is_cut_off():
    # no budget at all: the loss itself must hold the threshold, the gentler the decay the higher
    found = []
    for decay in (0.3, 0.1, 0.03):
        bound = Bound(torch.tensor(4.0))
        work = material([bound], lambda: 0.0)
        ladder.descend(work, work.layers, Resilience(decays=(decay,), epochs=60), 1.0)
        found.append(float(bound.threshold))
        losses = []
        for share in (0.99, 1.01):
            bound.threshold = torch.tensor(found[-1] * share)
            losses.append(float(work.loss(work.layers, 0)))
        assert (losses[0] - losses[1]) / 0.02 == pytest.approx(decay, rel=0.6)
    assert found == sorted(found)
    assert found[-1] < 4.0


def test_a_loss_that_is_not_finite_leaves_the_thresholds():
    bound = Bound(torch.tensor(4.0))
    work = material([bound], lambda: 0.0)
    work.run = lambda _: bound(torch.ones(3)) * torch.nan
    ladder.descend(work, work.layers, Resilience(), 1.0)
    assert float(bound.threshold) == 4.0


def test_damage_that_is_not_a_number_is_never_accepted():
    bound = Bound(torch.tensor(4.0))
    work = material([bound], lambda: float("nan"))
    assert ladder.descend(work, work.layers, Resilience(), 1.0).kept == 0
    assert float(bound.threshold) == 4.0


@pytest.mark.parametrize("form", ["zero", "clamp"])
def test_forms_come_back_after_training(form):
    bound = Bound(torch.tensor(4.0), form)
    work = material([bound], lambda: 0.0)
    ladder.descend(work, work.layers, Resilience(epochs=2), 1.0)
    assert bound.form == form
    assert not bound.threshold.requires_grad


def test_too_tight_thresholds_are_widened_into_the_budget():
    bound = Bound(torch.tensor(1.0))
    work = material([bound], lambda: 0.0 if float(bound.threshold) >= 2 else 9.0)
    factor = ladder.widen(work)
    assert factor == pytest.approx(float(bound.threshold))
    assert 2 <= factor < 2 * ladder.WIDER


def test_an_area_is_the_mean_over_the_logarithm():
    assert interval.area(lambda rate: 5.0, (1e-6, 1e-3)) == 5.0
    assert interval.area(lambda rate: {1e-6: 0.0, 1e-5: 10.0, 1e-3: 10.0}[rate], (1e-6, 1e-5, 1e-3)) == pytest.approx(
        (5 + 20) / 3
    )


def test_the_interval_search_finds_the_best_threshold_of_a_known_curve():
    bound = Bound(torch.tensor(8.0))
    work = material([bound], lambda: 0.0)
    best = 2.5
    interval.find(work, Resilience(), lambda rate: 100 - abs(float(bound.threshold) - best), (1e-5,))
    assert float(bound.threshold) == pytest.approx(best, abs=8 / 4**2)


def test_the_interval_search_leaves_out_what_costs_too_much():
    bound = Bound(torch.tensor(8.0))
    work = material([bound], lambda: 0.0 if float(bound.threshold) >= 4 else 9.0)
    interval.find(work, Resilience(), lambda rate: 100 - float(bound.threshold), (1e-5,))
    assert 4 <= float(bound.threshold) < 5


@pytest.fixture(scope="module")
def trained():
    """Return a small network with three activation functions and what it learned: the sign of an image's mean."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 3, 3), nn.SiLU(), nn.Flatten()),
        *(nn.Linear(48, 16), nn.GELU(), nn.Linear(16, 8), nn.ReLU(inplace=True), nn.Linear(8, 2)),
    )
    images = torch.randn(160, 1, 6, 6)
    labels = (images.mean((1, 2, 3)) > 0).long()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.requires_grad_(False), images, labels


@pytest.fixture
def classifier(trained):
    model, images, labels = trained
    return copy.deepcopy(model), images, labels


@pytest.mark.parametrize("form", ["clamp", "zero", "smooth"])
@pytest.mark.parametrize("kind", ["layer", "neuron", "hybrid", "ranger"])
def test_every_kind_and_form_bounds_a_module_within_its_budget(classifier, kind, form):
    model, images, labels = classifier
    held = images[:80], labels[:80]
    weights = [value.clone() for value in model.parameters()]
    before = (model(held[0]).argmax(-1) == labels[:80]).float().mean()
    model.train()
    choice = Resilience(kind=kind, form=form, epochs=2, budget=2.5)
    bounds = bound_module(model, images[80:], resilience=choice, held_out=held)
    assert all(module.training for module in model.modules() if not isinstance(module, Bound))
    model.eval()
    after = (model(held[0]).argmax(-1) == labels[:80]).float().mean()
    assert bounds.facts["damage"] == pytest.approx(100 * float(before - after), abs=1e-4)
    assert 100 * float(before - after) <= 2.5 or kind == "ranger"
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    shapes = [tuple(value.shape) for value in bounds.thresholds.values()]
    each = [(3, 4, 4), (16,), (8,)]
    assert shapes == {"neuron": each, "hybrid": [(), (), (8,)]}.get(kind, [(), (), ()])
    noise = model(torch.full((1, 1, 6, 6), torch.nan))
    assert noise.isfinite().all()


def test_the_maximum_alone_changes_nothing_that_was_seen(classifier):
    model, images, _ = classifier
    bounds = bound_module(model, images, resilience="ranger", held_out=(images, model(images).argmax(-1)))
    assert bounds.facts["damage"] == 0.0
    seen = model[:2](images).max()  # the first activation, bounded
    assert float(bounds.thresholds["1"]) == float(seen)


def test_a_module_that_is_used_twice_is_bounded_once():
    activation = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 4), activation, nn.Linear(4, 4), activation)
    bounds = bound_module(model, torch.randn(8, 4), resilience="ranger")
    assert model[1] is model[3]
    assert list(bounds.thresholds) == ["1"]


def test_a_module_without_activation_modules_is_refused():
    with pytest.raises(UsageError, match="no ReLU, ReLU6, SiLU or GELU module"):
        bound_module(nn.Sequential(nn.Linear(2, 2)), torch.randn(4, 2))


def test_neurons_of_several_shapes_are_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.activation = nn.ReLU()

        def forward(self, x):
            return self.activation(x) + self.activation(x.sum(-1, keepdim=True))

    with pytest.raises(UsageError, match="activation is called with several shapes"):
        bound_module(nn.Sequential(Twice()), torch.randn(4, 3), resilience="neuron")


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"kind": "rangers"}, "unknown kind of bounds 'rangers'"),
        ({"method": "progresive"}, r"unknown method for thresholds .*did you mean progressive"),
        ({"form": "clip"}, "unknown form of a bound 'clip'"),
        ({"budget": -1.0}, "budget must be"),
        ({"budget": float("nan")}, "budget must be"),
        ({"decays": ()}, "decays positive"),
        ({"margin": 0.0}, "margin and lr must be positive"),
    ],
)
def test_what_no_choice_can_be_is_refused(choice, message):
    with pytest.raises(UsageError, match=message):
        Resilience(**choice)


def test_an_interval_without_faults_is_refused(classifier):
    model, images, _ = classifier
    with pytest.raises(UsageError, match="give evaluate="):
        bound_module(model, images, resilience=Resilience(method="interval"))
