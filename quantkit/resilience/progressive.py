"""One layer after the other, from the last to the first, each as tight as the budget lets it.

ProAct, Mousavi et al., arXiv 2406.06313. The budget may grow with the layers, so that the last one does not take all.
"""

from quantkit.resilience.choice import Resilience
from quantkit.resilience.ladder import descend, widen
from quantkit.resilience.material import Material


def find(material: Material, choice: Resilience) -> None:
    """Shrink the thresholds in place, layer by layer."""
    widened = widen(material)
    steps, count = [], len(material.layers)
    for done, layer in enumerate(reversed(material.layers), start=1):
        budget = material.budget * (done / count if material.shared else 1)
        steps.append(descend(material, [layer], choice, budget))
        material.tick(done / count)
    material.notes |= {
        "widened": widened,
        "factors": [step.factor for step in reversed(steps)],
        "passes_kept": sum(step.kept for step in steps),
        "passes_refused": sum(step.refused for step in steps),
    }


METHOD = find
