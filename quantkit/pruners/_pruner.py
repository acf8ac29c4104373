"""What all pruners have in common: how much they drop of what, turns of the linears, and a short recovery."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

from torch import Tensor

from quantkit.calibrate.passes import Phase, Window
from quantkit.calibrate.statistics import Statistic, groups_in_order, input_statistics
from quantkit.core import masks
from quantkit.core.masks import Scope, Sparsity
from quantkit.core.scheme import QuantScheme
from quantkit.errors import UsageError
from quantkit.model.block import Site
from quantkit.pruners._recovery import recover

S = TypeVar("S", bound=Statistic)
Allocation = Literal["uniform", "magnitude", "loss", "mfac"]


@dataclass(frozen=True, kw_only=True)
class Pruner:
    """A pass that decides which weights are zero.

    Attributes:
        sparsity: how much goes: a share such as 0.5, or N:M such as "2:4", by which N of every M inputs stay.
        include: globs of the linears that are pruned; none: all that the run has.
        exclude: globs of the linears that stay dense.
        allocation: what share each linear loses: the same (`uniform`), what one threshold for the magnitudes of the
            whole model takes (`magnitude`), or what costs least of the blocks' outputs, by their measured loss (`loss`)
            or by M-FAC's saliencies (`mfac`); the share of all together is that of `sparsity`.
        recover: updates by which the kept weights of a block are trained afterwards.
    """

    phase: ClassVar[Phase] = Phase.PRUNE
    learns: ClassVar[bool] = True
    second_order: ClassVar[bool] = False

    sparsity: str | float = 0.5
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    allocation: Allocation = "uniform"
    recover: int = 0

    def __post_init__(self) -> None:
        if self.recover < 0:
            raise UsageError(f"recover is a number of updates, not {self.recover}; give 0 or more")
        if self.asked.group is not None and self.allocation != "uniform":
            raise UsageError(
                f"allocation {self.allocation} gives each linear its own share, but {self.asked} is the same share of "
                "every few weights; give a share such as 0.5, or leave the allocation uniform"
            )

    @classmethod
    def for_scheme(cls, scheme: QuantScheme) -> "Pruner":  # noqa: ARG003  nothing depends on it
        """Return the defaults, the same for every scheme."""
        return cls()

    @property
    def asked(self) -> Sparsity:
        """How much goes of all that is pruned."""
        return Sparsity.parse(self.sparsity)

    @property
    def blocks_at_once(self) -> int:
        """One: every block alone; of a larger window the blocks that are new in it."""
        return 1

    @property
    def updates_per_window(self) -> int:
        """The updates of the recovery."""
        return self.recover

    def apply(self, window: Window) -> None:
        """Prune the linears that a sparsity was given to, in the blocks that are new in the window."""
        fresh = window.blocks[len(window.blocks) - window.fresh :]
        sites = [site for block in fresh for site in block.sites if site.sparsity is not None]
        if sites:
            self.prune(window, sites)
            if self.recover:
                recover(window, sites, self.recover)

    def prune(self, window: Window, sites: Sequence[Site]) -> None:
        """Give each of the sites its mask, and the weight that it then has."""
        raise NotImplementedError


def in_turns(
    window: Window, sites: Sequence[Site], make: Callable[[], S], *, true_sequential: bool
) -> Iterator[tuple[list[Site], S]]:
    """Yield the linears that share an input, and a statistic of it, in the order in which inputs reach them.

    With `true_sequential` it is that of the input behind the linears that had their turn; otherwise everything is
    measured before the first turn.
    """
    wanted = {site.name for site in sites}
    measured = {} if true_sequential else input_statistics(window, make, sites=sites)
    groups = [[site for site in group if site.name in wanted] for group in groups_in_order(window)]
    groups = [group for group in groups if group]
    for turn, group in enumerate(groups):
        heard = measured or input_statistics(window, make, sites=group)
        yield group, heard[group[0].name]
        window.tick((turn + 1) / len(groups))


def magnitudes(site: Site) -> Tensor:
    """Return the magnitudes of a site's weight."""
    return site.weight.detach().abs()


def chosen(site: Site, scores: Tensor, scope: Scope = "matrix") -> Tensor:
    """Return the mask of a site by scores of its weight's shape, the site's own share of them."""
    assert site.sparsity is not None
    within: Literal["matrix", "row"] = "row" if scope == "row" else "matrix"
    if site.transposed:
        return masks.choose(scores.T.contiguous(), site.sparsity, within).T.contiguous()
    return masks.choose(scores, site.sparsity, within)


def take(site: Site, mask: Tensor, weight: Tensor | None = None) -> None:
    """Give a site its mask and its weight, or what else was made of it, with zeros where the mask drops.

    Raises:
        UsageError: the mask is not of the weight's shape.
    """
    site.weight.data = masks.apply(site.weight.data if weight is None else weight, mask)
    site.mask = mask
