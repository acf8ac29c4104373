"""What a method is: one pass over one window of blocks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from quantkit.model.block import Arguments, Block, Site


class Phase(IntEnum):
    """The order in which passes may stand in a recipe."""

    FOLD = 1  # equivalent transforms: the block's output is unchanged
    PRUNE = 2  # decides which weights are zero
    ROUND = 3  # sets `site.quantized`
    COMPENSATE = 4  # adds what rounding lost
    GUARD = 5  # bounds activations


@dataclass(kw_only=True)
class Window:
    """The consecutive blocks that are optimised together, with everything a pass may look at.

    Attributes:
        blocks: the blocks, their weights in float32.
        inputs: the actual stream, what the quantized blocks before this window produce; one tensor
            (batch, tokens, width) per batch.
        targets: the reference stream after this window, what the original model produces there; same layout.
        arguments: per batch, per block of the window, the other arguments of the block.
        device: where the blocks are.
        error_rtn: the window's error with plain round-to-nearest weights, the bar for every method.
        notes: what a pass wants to see in the report, one value per name.
        tick: to be called after every update, with the share of the pass that is done.
    """

    blocks: Sequence[Block]
    inputs: Sequence[Tensor]
    targets: Sequence[Tensor]
    arguments: Sequence[Sequence[Arguments]]
    device: torch.device
    error_rtn: float = 0.0
    notes: dict[str, object] = field(default_factory=dict)
    tick: Callable[[float], None] = lambda share: None  # noqa: ARG005

    @property
    def sites(self) -> list[Site]:
        """All quantized linears of the window."""
        return [site for block in self.blocks for site in block.sites]

    def forward(
        self,
        batch: int,
        weights: dict[str, Tensor] | None = None,
        hidden: Tensor | None = None,
        *,
        student: bool = True,
    ) -> Tensor:
        """Return the window's output for a batch of the actual stream, or for `hidden`, (batch, tokens, width).

        `weights` replaces the weights of the named sites (full names); gradients flow to them. Activations are
        quantized for the `student` alone: what the original blocks compute is computed without. On a GPU the matrix
        products run in bfloat16 under autocast, on a CPU everything is float32.
        """
        value = (self.inputs[batch] if hidden is None else hidden).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            for block, arguments in zip(self.blocks, self.arguments[batch], strict=True):
                own = {site.local_name: weights[site.name] for site in block.sites} if weights else None
                value = block.forward(value, arguments, own, quantized=student)
        return value

    @torch.no_grad()
    def error(
        self, weights: dict[str, Tensor] | None = None, keep: Callable[[int, Tensor], None] | None = None
    ) -> float:
        """Return the squared error of the window's output over the squared norm of the target, over all batches.

        `keep` is given every batch's output.
        """
        error = norm = 0.0
        for batch, stored in enumerate(self.targets):
            target = stored.to(self.device, torch.float32)
            output = self.forward(batch, weights)
            error += float((output.float() - target).square().sum(dtype=torch.float64))
            norm += float(target.square().sum(dtype=torch.float64))
            if keep is not None:
                keep(batch, output)
        return error / max(norm, 1e-30)


class Pass(Protocol):
    """One step on one window; a frozen dataclass whose fields are the method's hyper-parameters.

    Attributes:
        phase: where it may stand in a recipe.
        learns: whether it learns from calibration data, so that more data makes it better and slower.
        updates_per_batch: forward+backward passes it makes over each batch, for the prediction of time.
    """

    phase: ClassVar[Phase]
    learns: ClassVar[bool]

    @property
    def updates_per_batch(self) -> int: ...  # noqa: D102

    def apply(self, window: Window) -> None:
        """Do the step; afterwards the sites hold what it decided."""
        ...
