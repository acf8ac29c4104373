"""M-FAC: weights go by what a Fisher matrix of gradients says that they cost, and the others make up for them.

Frantar, Kurtic and Alistarh, arXiv 2107.03356, section 4; the mathematics are in `core/mfac.py`, and which gradients
they are in `calibrate/gradients.py`. A block's linears are pruned one after the other on gradients of the whole block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quantkit.calibrate.gradients import Samples, gradient_samples
from quantkit.calibrate.passes import Window
from quantkit.core.mfac import obs_prune
from quantkit.errors import UsageError
from quantkit.model.block import Site
from quantkit.pruners._pruner import Pruner, chosen, magnitudes, take

MOST_NUMBERS = 1 << 26  # of gradients or of blocks of F that are held at once: 256 MiB


@dataclass(frozen=True, kw_only=True)
class MFAC(Pruner):
    """M-FAC.

    Attributes:
        gradients: m, the gradients that F is made of.
        tokens: calibration tokens, at most, that they are made of.
        damp: λ, as a share of the mean of the diagonal of the gradients' F.
        block: weights of a row that are correlated with each other.
        recomputations: steps in which the weights go, F computed anew for each.
        loss: whose gradients they are: of the block's reconstruction (`block`), or the language-model loss of the whole
            original model (`model`), which then has to fit into memory, with what reaches all of its linears.
        scope: weights that are compared with each other: those of a `row` or of a `matrix`.
    """

    gradients: int = 256
    tokens: int = 8192
    damp: float = 0.01
    block: int = 32
    recomputations: int = 8
    loss: Literal["block", "model"] = "block"
    scope: Literal["row", "matrix"] = "row"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in ("block", "model"):
            raise UsageError(f"loss must be block or model, not {self.loss!r}")
        for name in ("gradients", "tokens", "block", "recomputations"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.damp > 0:
            raise UsageError(f"damp must be positive, not {self.damp}: without it F has no inverse")
        if self.scope not in ("row", "matrix"):
            raise UsageError(f"scope must be row or matrix, not {self.scope!r}")

    @property
    def forwards_per_window(self) -> int:
        """One, and as much as two more for its backward pass."""
        return 3

    def prune(self, window: Window, sites: Sequence[Site]) -> None:
        """Drop weights and move the others; the smallest weights, with a note, where there is no gradient."""
        samples = self._samples(window, sites)
        for turn, site in enumerate(sites):
            found = samples.get(site.name)
            scale = found.mean_square() if found else 0.0
            if found is None or not 0 < scale < torch.inf:
                reason = f"the mean square of its gradients is {scale:g}" if found else "no input reached it"
                window.notes[f"magnitude for {site.local_name}"] = reason
                take(site, chosen(site, magnitudes(site)))
            else:
                take(site, *self._solve(site, found, self.damp * scale))
            window.tick((turn + 1) / len(sites))

    def _samples(self, window: Window, sites: Sequence[Site]) -> dict[str, Samples]:
        if self.loss == "model":
            return {site.name: site.samples.to(window.device) for site in sites if site.samples is not None}
        return gradient_samples(window, sites, gradients=self.gradients, tokens=self.tokens)

    def _solve(self, site: Site, samples: Samples, damp: float) -> tuple[Tensor, Tensor]:
        """Return mask and weight, found for as many rows at once as there is room for, or as are compared."""
        assert site.sparsity is not None
        weight = site.weight.detach().T.contiguous() if site.transposed else site.weight.detach()
        rows, width = weight.shape
        by_row = self.scope == "row" or site.sparsity.group is not None
        at_once = max(1, MOST_NUMBERS // (width * max(len(samples.inputs), self.block))) if by_row else rows
        masks, values = [], []
        for first in range(0, rows, at_once):
            last = min(first + at_once, rows)
            mask, value = obs_prune(
                weight[first:last],
                samples.gradients(first, last),
                site.sparsity,
                damp=damp,
                block=self.block,
                recomputations=self.recomputations,
                by_row=self.scope == "row",
            )
            masks.append(mask)
            values.append(value)
        mask, value = torch.cat(masks), torch.cat(values)
        return (mask.T.contiguous(), value.T.contiguous()) if site.transposed else (mask, value)


METHOD = MFAC
