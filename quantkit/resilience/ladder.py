"""Shrinking thresholds under a budget: a ladder of ever gentler decays, each step accepted or taken back.

A threshold is its present value times e^f; f is trained from 0 on the distillation loss plus w/2 · Σ e^(2f), the L2
decay that pulls thresholds towards 0 until what they cut off weighs as much. After each pass over the batches the
damage on what was held out decides: within the budget it is kept and the same decay goes on, beyond it is taken back
and the next, smaller decay begins (ProAct, arXiv 2406.06313; its authors' code measures the damage on the test set).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantkit.resilience.bounds import Bound
from quantkit.resilience.choice import Resilience
from quantkit.resilience.material import Material
from quantkit.train.fit import ParameterGroup, fit

STANDSTILL = 2e-3  # a pass that changes no threshold by a larger share has found where its decay leads
WIDER, MOST_WIDER = 1.1, 24  # by what thresholds grow that already cost too much, and how often: ten times at most


@dataclass
class Descent:
    """What became of some layers: passes kept and taken back, and by what factor thresholds changed on average."""

    kept: int = 0
    refused: int = 0
    factor: float = 1.0


def descend(material: Material, layers: Sequence[Sequence[Bound]], choice: Resilience, budget: float) -> Descent:
    """Shrink the thresholds of `layers` as far as the damage stays within `budget`; all others stay."""
    bounds = [bound for layer in layers for bound in layer]
    before, result = [bound.threshold.clone() for bound in bounds], Descent()
    for rung, decay in enumerate(choice.decays):
        lr = choice.lr / 2**rung
        for _ in range(choice.epochs):
            kept = [bound.threshold.clone() for bound in bounds]
            if not _pass(material, layers, lr, decay):
                break
            if not material.damage() <= budget:  # nor a NaN
                _restore(bounds, kept)
                result.refused += 1
                break
            result.kept += 1
            if _change(bounds, kept) < STANDSTILL:
                break
    result.factor = math.exp(_mean_log(bounds, before))
    return result


def widen(material: Material) -> float:
    """Make all thresholds larger until the damage is within the budget; return by what factor."""
    factor = 1.0
    for _ in range(MOST_WIDER):
        if material.damage() <= material.budget:
            break
        factor *= WIDER
        for bound in material.bounds:
            bound.threshold.mul_(WIDER)
    return factor


def _pass(material: Material, layers: Sequence[Sequence[Bound]], lr: float, decay: float) -> bool:
    """Train for one pass over the batches; return whether every loss was finite."""
    bounds = [bound for layer in layers for bound in layer]
    starts = [bound.threshold for bound in bounds]
    factors = [nn.Parameter(torch.zeros_like(start)) for start in starts]

    def loss(batch: int) -> Tensor:
        _set(bounds, starts, factors)
        pull = sum((factor.mul(2).exp().sum() for factor in factors), torch.zeros(()))
        return material.loss(layers, batch) + pull * (decay / 2)

    with _trainable(bounds), torch.enable_grad():
        done = fit(
            [ParameterGroup(parameters=factors, lr=lr)],
            loss,
            batches=material.batches,
            updates=material.batches,
            tick=lambda _: None,
        )
    _set(bounds, starts, [factor.detach() for factor in factors])
    return not done.diverged


def _set(bounds: Sequence[Bound], starts: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    for bound, start, factor in zip(bounds, starts, factors, strict=True):
        bound.threshold = start * factor.exp()


def _restore(bounds: Sequence[Bound], values: Sequence[Tensor]) -> None:
    for bound, value in zip(bounds, values, strict=True):
        bound.threshold = value


@contextmanager
def _trainable(bounds: Sequence[Bound]) -> Iterator[None]:
    """Give bounds that drop to 0 a slope inside the context: as they are, no threshold gets a gradient."""
    forms = [bound.form for bound in bounds]
    for bound in bounds:
        bound.form = "smooth" if bound.form == "zero" else bound.form
    try:
        yield
    finally:
        for bound, form in zip(bounds, forms, strict=True):
            bound.form = form


def _change(bounds: Sequence[Bound], before: Sequence[Tensor]) -> float:
    """Return the largest change of a threshold, as a share."""
    changes = [(bound.threshold / old).log().abs().max() for bound, old in zip(bounds, before, strict=True)]
    return float(torch.stack(changes).max())


def _mean_log(bounds: Sequence[Bound], before: Sequence[Tensor]) -> float:
    logs = [(bound.threshold / old).log().mean() for bound, old in zip(bounds, before, strict=True)]
    return float(torch.stack(logs).mean())
