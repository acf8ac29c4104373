"""SparseGPT: weights go where the others can best make up for them, and do (Frantar and Alistarh, arXiv 2301.00774).

The mathematics are in `core/sparsegpt.py`. H = (2 / tokens) sum x x^T is taken of the inputs that a linear gets behind
the blocks that are pruned already. What a rounding pass does later starts from the weights as updated here;
with `joint` they are rounded in the same loop, so that what is kept makes up for both.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantkit.calibrate.passes import Window
from quantkit.calibrate.statistics import Hessian
from quantkit.core.affine import quantize, stored_grid
from quantkit.core.search import searched_bounds
from quantkit.core.second_order import Curvature
from quantkit.core.sparsegpt import BLOCK, sparsegpt
from quantkit.errors import UsageError
from quantkit.model.block import Site
from quantkit.pruners._pruner import Pruner, chosen, in_turns, magnitudes, take


@dataclass(frozen=True, kw_only=True)
class SparseGPT(Pruner):
    """SparseGPT.

    Attributes:
        damp: what is added to the diagonal of H, as a share of its mean.
        block: columns whose weights compete with each other; N:M has its own.
        true_sequential: inputs are those behind the pruned linears of the block; otherwise all inputs of a block are
            measured in one forward pass, before any of it is pruned, as in the authors' code.
        joint: round what is kept in the same loop, to nearest between searched bounds; the rounding pass is then `rtn`,
            which has nothing left to do.
    """

    second_order: ClassVar[bool] = True

    damp: float = 0.01
    block: int = BLOCK
    true_sequential: bool = False
    joint: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.damp < 0:
            raise UsageError(f"damp is a share of the mean of the diagonal, not {self.damp}; give 0 or more")
        if self.block < 1:
            raise UsageError(f"block must be at least 1 column, not {self.block}; the paper's is {BLOCK}")

    @property
    def forwards_per_window(self) -> int:
        """Four groups of linears in most families, as much as one more for the products x x^T."""
        return 5 if self.true_sequential else 2

    def prune(self, window: Window, sites: Sequence[Site]) -> None:
        """Drop weights and move the others; the smallest weights, with a note, where no input is known."""
        for group, heard in in_turns(window, sites, Hessian, true_sequential=self.true_sequential):
            hessian, name = heard.value, group[0].group
            if not heard.tokens or not hessian.isfinite().all():
                reason = "its inputs are not finite" if heard.tokens else "no input reached it"
                window.notes[f"magnitude for {name}"] = reason
                for site in group:
                    take(site, chosen(site, magnitudes(site)))
                continue
            curvature = Curvature.of(hessian, damp=self.damp, act_order=False)
            if curvature.damp != self.damp:
                window.notes[f"damp of {name}"] = curvature.damp
            if dead := int((curvature.pivots == 0).sum()):
                window.notes[f"dead inputs of {name}"] = dead
            for site in group:
                self._solve(site, curvature)

    def _solve(self, site: Site, curvature: Curvature) -> None:
        assert site.sparsity is not None
        how: dict[str, Callable[[int, Tensor], Tensor]] = {}
        if self.joint:
            bounds = searched_bounds(site.weight.detach(), site.scheme, scale_dtype=site.scale_dtype)
            how["settle"] = _rounding(site, bounds)
        weight = site.weight.detach()
        mask, values = sparsegpt(weight, curvature, site.sparsity, transposed=site.transposed, block=self.block, **how)
        take(site, mask, values)
        if self.joint:  # the values lie on the grid: rounding them gives their codes
            site.quantized = quantize(site.weight.detach(), *bounds, site.scheme, site.scale_dtype)


def _rounding(site: Site, bounds: tuple[Tensor, Tensor]) -> Callable[[int, Tensor], Tensor]:
    """Return what rounds one column of a site between known bounds, each (rows, groups)."""
    scheme, size = site.scheme, site.weight.shape[1] // bounds[0].shape[1]
    _, step, zero = stored_grid(*bounds, scheme, site.scale_dtype)
    step, zero = (values.repeat_interleave(size, dim=1) for values in (step, zero))
    if not site.transposed:
        step, zero = step.T.contiguous(), zero.T.contiguous()

    def settle(column: int, values: Tensor) -> Tensor:
        codes = (values / step[column]).round_().add_(zero[column]).clamp_(scheme.smallest_code, scheme.largest_code)
        return codes.sub_(zero[column]).mul_(step[column]).to(site.scale_dtype).to(torch.float32)

    return settle


METHOD = SparseGPT
