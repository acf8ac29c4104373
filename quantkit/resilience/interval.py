"""A search of each threshold by what the model is worth under faults.

FT-ClipAct, Hoang et al., arXiv 1912.00941: of an interval, first from 0 to the largest value that was seen, four
points are tried; the neighbours of the best are the next interval. What is maximised is the area under the curve of
the metric over the rates of faults, on a logarithmic axis.
"""

import math
from collections.abc import Callable, Sequence

from quantkit.errors import UsageError
from quantkit.resilience.bounds import Bound
from quantkit.resilience.choice import Resilience
from quantkit.resilience.ladder import widen
from quantkit.resilience.material import Material

RATES = (1e-7, 1e-6, 3e-6, 1e-5, 3e-5)
POINTS, ROUNDS, LEAST_ROUNDS = 4, 4, 3
ENOUGH = 0.2  # points of the area; a round that gains less is the last one

Evaluate = Callable[[float], float]


def find(
    material: Material, choice: Resilience, evaluate: Evaluate | None = None, rates: Sequence[float] = RATES
) -> None:
    """Set the thresholds in place, from the first layer to the last; `evaluate(rate)`: the metric, larger is better.

    Points whose damage is beyond the budget are not chosen.

    Raises:
        UsageError: without `evaluate`.
    """
    del choice
    if evaluate is None:
        raise UsageError("the method interval measures under faults; give evaluate=, or choose another method")
    measure = evaluate
    widen(material)
    areas = []
    for done, layer in enumerate(material.layers, start=1):
        areas += [_search(material, bound, lambda: area(measure, rates)) for bound in layer]
        material.tick(done / len(material.layers))
    material.notes["areas"] = areas


def area(evaluate: Evaluate, rates: Sequence[float]) -> float:
    """Return the mean of the metric over the logarithm of the rate, by trapezoids."""
    values, places = [evaluate(rate) for rate in rates], [math.log10(rate) for rate in rates]
    if len(rates) == 1:
        return values[0]
    parts = [(b - a) * (u + v) / 2 for a, b, u, v in zip(places, places[1:], values, values[1:], strict=False)]
    return sum(parts) / (places[-1] - places[0])


def _search(material: Material, bound: Bound, worth: Callable[[], float]) -> float:
    """Set the threshold of one bound to the best that was tried; return its area."""
    whole = bound.threshold.clone()
    low, high, best, best_share = 0.0, 1.0, worth(), 1.0
    for number in range(1, ROUNDS + 1):
        step, before = (high - low) / POINTS, best
        shares = [low + step * (point + 1) for point in range(POINTS)]
        for share in shares:
            bound.threshold = whole * share
            if share < best_share and material.damage() > material.budget:
                continue
            if (found := worth()) > best:
                best, best_share = found, share
        low, high = max(low, best_share - step), min(1.0, best_share + step)
        if number >= LEAST_ROUNDS and best - before <= ENOUGH:
            break
    bound.threshold = whole * best_share
    return best


METHOD = find
