"""The largest value that was seen, times a margin.

Ranger, Chen, Li and Pattabiraman, arXiv 2003.13874: nothing is trained. What is damaged is noted and not mended: the
thresholds stay where they are.
"""

from quantkit.resilience.choice import Resilience
from quantkit.resilience.material import Material


def find(material: Material, choice: Resilience) -> None:  # noqa: ARG001  as every method is called
    """Leave the thresholds as they are: at the largest value that was seen."""
    material.tick(1.0)


METHOD = find
