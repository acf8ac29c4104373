"""All thresholds at once, under one budget.

FitAct, Ghavami et al., arXiv 2112.13544, with the loss and the ladder of the progressive method, so that the two
compare.
"""

from quantkit.resilience.choice import Resilience
from quantkit.resilience.ladder import descend, widen
from quantkit.resilience.material import Material


def find(material: Material, choice: Resilience) -> None:
    """Shrink the thresholds in place, all of them together."""
    widened = widen(material)
    step = descend(material, material.layers, choice, material.budget)
    material.tick(1.0)
    material.notes |= {
        "widened": widened,
        "factors": [step.factor],
        "passes_kept": step.kept,
        "passes_refused": step.refused,
    }


METHOD = find
