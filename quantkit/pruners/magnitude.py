"""Magnitude pruning: the smallest weights go, no data; the field's baseline (Han et al., arXiv 1506.02626).

The score of a weight is |w|. It is compared within its matrix, as the baseline of the papers does, within its row, or
with all weights of its block; over the whole model with `allocation = "magnitude"`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from quantkit.calibrate.passes import Window
from quantkit.core import masks
from quantkit.core.masks import SCOPES, Scope
from quantkit.errors import UsageError
from quantkit.model.block import Site
from quantkit.pruners._pruner import Pruner, chosen, magnitudes, take


@dataclass(frozen=True, kw_only=True)
class Magnitude(Pruner):
    """Magnitude pruning.

    Attributes:
        scope: weights that are compared with each other: those of a `matrix`, of a `row`, or `global`: of a block.
    """

    learns: ClassVar[bool] = False

    scope: Scope = "matrix"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope not in SCOPES:
            raise UsageError(f"scope must be one of {', '.join(SCOPES)}, not {self.scope!r}")
        if self.scope == "global" and self.allocation != "uniform":
            raise UsageError(
                f"scope global and allocation {self.allocation} both say what each linear loses; leave out one of them"
            )

    def prune(self, window: Window, sites: Sequence[Site]) -> None:
        """Drop the smallest weights."""
        if self.scope != "global":
            for site in sites:
                take(site, chosen(site, magnitudes(site), self.scope))
        elif self.asked.group is not None:  # nothing is compared beyond a few inputs
            for site in sites:
                take(site, chosen(site, magnitudes(site)))
        else:
            for block in window.blocks:
                own = {site.name: site for site in block.sites if site in sites}
                found = masks.choose_globally({name: magnitudes(site) for name, site in own.items()}, self.asked)
                for name, mask in found.items():
                    take(own[name], mask)


METHOD = Magnitude
