"""Round-to-nearest between each group's smallest and largest weight: no data, no training, the field's baseline."""

from dataclasses import dataclass
from typing import ClassVar

from quantkit.calibrate.passes import Phase, Window
from quantkit.core.affine import round_to_nearest
from quantkit.core.scheme import QuantScheme


@dataclass(frozen=True, kw_only=True)
class RoundToNearest:
    """Round every weight to the nearest level of its group's grid."""

    phase: ClassVar[Phase] = Phase.ROUND
    learns: ClassVar[bool] = False

    @classmethod
    def for_scheme(cls, scheme: QuantScheme) -> "RoundToNearest":  # noqa: ARG003  nothing depends on it
        """Return the method; it has no hyper-parameters."""
        return cls()

    @property
    def blocks_at_once(self) -> int:
        """One: every block alone."""
        return 1

    @property
    def updates_per_window(self) -> int:
        """It makes no updates."""
        return 0

    def apply(self, window: Window) -> None:
        """Round every site of the window that a pruning pass did not round already."""
        for site in window.sites:
            site.quantized = site.quantized or round_to_nearest(site.weight, site.scheme, site.scale_dtype)


METHOD = RoundToNearest
