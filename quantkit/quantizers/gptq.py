"""GPTQ: each column's rounding error is made up for by the columns after it (Frantar et al., arXiv 2210.17323).

The mathematics are in `core/second_order.py`. Here H = (2 / tokens) sum x x^T is taken of the inputs that a linear
really gets, with the blocks before it and the linears before it in its own block quantized already. That costs one
forward pass over all batches for each group of linears that share an input, as `true-sequential` in the paper's code.

Past the paper: the order of the columns leaves the groups together (static grids), and bounds can be searched for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from quantkit.calibrate.passes import Phase, Window
from quantkit.calibrate.statistics import Hessian, groups_in_order, input_statistics
from quantkit.core.affine import group_bounds, round_to_nearest
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import QuantScheme
from quantkit.core.search import TRIALS, searched_bounds
from quantkit.core.second_order import Curvature, gptq
from quantkit.errors import UsageError
from quantkit.model.block import Site

Rounded = tuple[QuantizedTensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class GPTQ:
    """GPTQ.

    Attributes:
        damp: what is added to the diagonal of H, as a share of its mean.
        act_order: round the columns with the largest inputs first, on grids of the original weight.
        search: search each group's bounds instead of taking its smallest and largest weight.
        true_sequential: a linear's inputs are those behind the quantized linears of its block; otherwise all inputs of
            a block are measured in one forward pass, before any of it is quantized.
    """

    phase: ClassVar[Phase] = Phase.ROUND
    learns: ClassVar[bool] = True
    second_order: ClassVar[bool] = True

    damp: float = 0.01
    act_order: bool = True
    search: bool = True
    true_sequential: bool = True

    def __post_init__(self) -> None:
        if self.damp < 0:
            raise UsageError(f"damp is a share of the mean of the diagonal, not {self.damp}; give 0 or more")

    @classmethod
    def for_scheme(cls, scheme: QuantScheme) -> "GPTQ":  # noqa: ARG003  nothing depends on it
        """Return the defaults, the same for every scheme."""
        return cls()

    @property
    def blocks_at_once(self) -> int:
        """One: every block alone."""
        return 1

    @property
    def updates_per_window(self) -> int:
        """It makes no updates."""
        return 0

    @property
    def forwards_per_window(self) -> int:
        """Four groups of linears in most families, as much as one more for the products x x^T, one for the error."""
        return 6 if self.true_sequential else 3

    @property
    def roundings_per_window(self) -> int:
        """One for each share of the bounds that is tried."""
        return TRIALS if self.search else 1

    def apply(self, window: Window) -> None:
        """Round the linears of the window; keep plain rounding if that is no worse."""
        if not window.sites:
            return
        rounded = self.solve(window)
        error = window.error({site.parameter: _dense(site, rounded[site.name][0]) for site in window.sites})
        worse = not error <= window.error_rtn  # true for nan as well
        if worse:
            reason = f"its error {window.error_rtn:.3g} is below GPTQ's {error:.3g}"
            window.notes["fallback"] = f"rtn, because {reason}"
        for site in window.sites:
            site.quantized = _plain(site)[0] if worse else rounded[site.name][0]

    def solve(self, window: Window, grids: Mapping[str, tuple[Tensor, Tensor]] | None = None) -> dict[str, Rounded]:
        """Return each site's quantized weight and the weight that its columns had when they were rounded, by name.

        `grids` are bounds of each group, (out, groups) each, by full parameter name, where they are known.
        Groups of linears take their turns in the order in which the blocks compute them.
        """
        solved: dict[str, Rounded] = {}
        dense: dict[str, Tensor] = {}
        measured = {} if self.true_sequential else input_statistics(window, Hessian)
        groups = groups_in_order(window)
        for turn, sites in enumerate(groups):
            heard = measured or input_statistics(window, Hessian, sites=sites, parameters=dense)
            solved |= self._round(sites, heard[sites[0].name], window, grids or {})
            dense |= {site.parameter: _dense(site, solved[site.name][0]) for site in sites}
            window.tick((turn + 1) / len(groups))
        return solved

    def _round(
        self,
        sites: Sequence[Site],
        statistic: Hessian,
        window: Window,
        grids: Mapping[str, tuple[Tensor, Tensor]],
    ) -> dict[str, Rounded]:
        """Round linears that share an input: to nearest, with a note, if nothing useful is known of it."""
        hessian = statistic.value
        if not statistic.tokens or not hessian.isfinite().all():
            reason = "their inputs are not finite" if statistic.tokens else "no input reached them"
            window.notes[f"rtn for {sites[0].group}"] = f"{', '.join(site.local_name for site in sites)}: {reason}"
            return {site.name: _plain(site) for site in sites}
        curvature = Curvature.of(hessian, damp=self.damp, act_order=self.act_order)
        if curvature.damp != self.damp:
            window.notes[f"damp of {sites[0].group}"] = curvature.damp

        def solve(site: Site) -> dict[str, Tensor]:
            rounded, moved = gptq(
                site.weight,
                curvature,
                site.scheme,
                site.scale_dtype,
                bounds=grids.get(site.parameter),
                find=partial(searched_bounds, scale_dtype=site.scale_dtype) if self.search else group_bounds,
                transposed=site.transposed,
                mask=site.mask,
            )
            return {**rounded.tensors(), "moved": moved}

        found = window.team.divide(sites, solve)
        pairs = zip(sites, found, strict=True)
        return {site.name: (QuantizedTensor.of(parts, site.scheme), parts["moved"]) for site, parts in pairs}


def _plain(site: Site) -> Rounded:
    return round_to_nearest(site.weight, site.scheme, site.scale_dtype), site.weight.detach()


def _dense(site: Site, quantized: QuantizedTensor) -> Tensor:
    return quantized.dequantize().to(site.weight.dtype)


METHOD = GPTQ
