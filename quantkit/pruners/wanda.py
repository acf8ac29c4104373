"""Wanda: the weights with the smallest product of magnitude and input norm go (Sun et al., arXiv 2306.11695).

    S_ij = |W_ij| · ‖X_j‖₂

over the calibration tokens, compared within each output row; the weights that stay are not changed. With N:M the rows'
groups of M inputs are compared alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from quantkit.calibrate.passes import Window
from quantkit.calibrate.team import Team
from quantkit.core.masks import SCOPES, Scope
from quantkit.errors import UsageError
from quantkit.model.block import Site
from quantkit.pruners._pruner import Pruner, chosen, in_turns, take


def scores(weight: Float[Tensor, "out in"], norms: Float[Tensor, " in"]) -> Float[Tensor, "out in"]:
    """Return |W| times the norm of each input."""
    return weight.abs() * norms


class InputNorms:
    """Per input channel the root of the mean square over all tokens, (in,) float32: ‖X_j‖₂ but for a common factor."""

    def __init__(self) -> None:
        self.tokens, self.squares = 0, torch.zeros(())

    def add(self, inputs: Tensor) -> None:
        """Take in `inputs`, (tokens, in) float32."""
        self.squares = self.squares.to(inputs) + inputs.square().sum(dim=0)
        self.tokens += len(inputs)

    def merge(self, team: Team, inputs: Tensor) -> None:
        """Add the sums of the other processes."""
        if not self.tokens:
            self.squares = inputs.sum(dim=0)
        team.sum(self.squares)
        self.tokens = int(team.total(self.tokens)[0])

    @property
    def value(self) -> Tensor:
        """The norms."""
        return (self.squares / max(self.tokens, 1)).sqrt()


@dataclass(frozen=True, kw_only=True)
class Wanda(Pruner):
    """Wanda.

    Attributes:
        scope: weights that are compared with each other, those of a `row` in the paper, or of a `matrix`.
        true_sequential: inputs are those behind the pruned linears of the block; otherwise all inputs of a block are
            measured in one forward pass, before any of it is pruned, as in the paper.
    """

    scope: Scope = "row"
    true_sequential: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope not in SCOPES[:2]:
            raise UsageError(f"scope must be row or matrix, not {self.scope!r}: norms of different inputs differ")

    @property
    def forwards_per_window(self) -> int:
        """One for all groups of linears, or one for each."""
        return 4 if self.true_sequential else 1

    def prune(self, window: Window, sites: Sequence[Site]) -> None:
        """Drop the weights with the smallest scores; the smallest weights, with a note, where no input is known."""
        for group, heard in in_turns(window, sites, InputNorms, true_sequential=self.true_sequential):
            norms = heard.value
            if not heard.tokens or not norms.isfinite().all():
                reason = "its inputs are not finite" if heard.tokens else "no input reached it"
                window.notes[f"magnitude for {group[0].group}"] = reason
                norms = torch.ones_like(group[0].weight[:, 0] if group[0].transposed else group[0].weight[0])
            elif dead := int((norms == 0).sum()):
                window.notes[f"dead inputs of {group[0].group}"] = dead
            for site in group:
                by_row = scores(site.weight.T if site.transposed else site.weight, norms)
                take(site, chosen(site, by_row.T if site.transposed else by_row, self.scope))


METHOD = Wanda
