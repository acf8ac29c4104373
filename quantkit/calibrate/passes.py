"""What a method is: one pass over one window of blocks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from quantkit.calibrate.streams import Streams
from quantkit.calibrate.team import Team
from quantkit.errors import UsageError
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

    Windows may slide: a block that was in the window before keeps its place, its original weights, and what the pass
    stored in `site.learned`; when the window moves on, its first block is finished with what `site.quantized` holds.

    Attributes:
        blocks: the blocks, their weights in float32.
        inputs: the actual stream, what the quantized blocks before this window produce; one tensor
            (batch, tokens, width) per batch, on the host wherever the blocks are.
        references: per block of the window, the reference stream after it, what the original model produces there;
            per batch as `inputs`.
        arguments: per batch, per block of the window, the other arguments of the block.
        device: where the blocks are.
        fresh: how many blocks at the end of the window were not in the one before.
        error_rtn: the window's error with plain round-to-nearest weights, the bar for every method.
        seed: seed of everything random.
        team: the processes that share the run; each holds its own rows of every batch.
        amp: compute matrix products in bfloat16 on a CPU too, as a pass may want while it trains.
        streams: where a pass keeps what it computes for all batches.
        head: for a window of the whole model (batch, row, hidden (1, tokens, width)) → logits (1, tokens, vocabulary)
            float32 of the row's sequence; gradients flow to `hidden`.
        notes: what a pass wants to see in the report, one value per name.
        tick: to be called after every update, with the share of the pass that is done.
    """

    blocks: Sequence[Block]
    inputs: Sequence[Tensor]
    references: Sequence[Sequence[Tensor]]
    arguments: Sequence[Sequence[Arguments]]
    device: torch.device
    fresh: int = 1
    error_rtn: float = 0.0
    seed: int = 0
    team: Team = field(default_factory=Team)
    amp: bool = False
    streams: Streams = field(default_factory=Streams)
    head: Callable[[int, int, Tensor], Tensor] | None = None
    notes: dict[str, object] = field(default_factory=dict)
    tick: Callable[[float], None] = lambda share: None  # noqa: ARG005

    @property
    def batch_size(self) -> int:
        """Sequences in a batch, over all processes."""
        return len(self.inputs[0]) * self.team.size

    @property
    def targets(self) -> Sequence[Tensor]:
        """The reference stream after the window."""
        return self.references[-1]

    @property
    def sites(self) -> list[Site]:
        """All quantized linears of the window."""
        return [site for block in self.blocks for site in block.sites]

    def forward(
        self,
        batch: int,
        parameters: Mapping[str, Tensor] | None = None,
        hidden: Tensor | None = None,
        *,
        student: bool = False,
    ) -> Tensor:
        """Return the window's output for a batch of the actual stream, or for `hidden`, (batch, tokens, width).

        `parameters` replaces parameters of the blocks (full names, as `model.layers.3.mlp.up_proj.weight`); gradients
        flow to them. The `student` has its activations quantized where its scheme says so; what the original blocks
        compute is computed without. On a GPU the matrix products run in bfloat16 under autocast, on a CPU everything is
        float32 but for `amp`.
        """
        value = (self.inputs[batch] if hidden is None else hidden).to(self.device)
        for place in range(len(self.blocks)):
            value = self.step(place, batch, value, parameters, student=student)
        return value

    def step(
        self,
        place: int,
        batch: int,
        hidden: Tensor,
        parameters: Mapping[str, Tensor] | None = None,
        *,
        student: bool = False,
    ) -> Tensor:
        """Return what one block of the window, the one at `place`, makes of `hidden`; the rest as in `forward`."""
        block = self.blocks[place]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp or self.device.type == "cuda"):
            own = _within(block, parameters)
            return block.forward(hidden, self.arguments[batch][place], own, quantized=student)

    @torch.no_grad()
    def error(
        self, parameters: Mapping[str, Tensor] | None = None, keep: Callable[[int, Tensor], None] | None = None
    ) -> float:
        """Return the squared error of the student's output over the squared norm of the target, over all batches.

        `keep` is given every batch's output.
        """
        error = norm = 0.0
        for batch, stored in enumerate(self.targets):
            target = stored.to(self.device, torch.float32)
            output = self.forward(batch, parameters, student=True)
            error += float((output.float() - target).square().sum(dtype=torch.float64))
            norm += float(target.square().sum(dtype=torch.float64))
            if keep is not None:
                keep(batch, output)
        error, norm = self.team.total(error, norm)
        return error / max(norm, 1e-30)


def _within(block: Block, parameters: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the entries of `parameters` that belong to `block`, by their name inside it."""
    prefix = f"{block.name}."
    return {name.removeprefix(prefix): v for name, v in (parameters or {}).items() if name.startswith(prefix)}


class Pass(Protocol):
    """One step on one window; a frozen dataclass whose fields are the method's hyper-parameters.

    Attributes:
        phase: where it may stand in a recipe.
        learns: whether it learns from calibration data, so that more data makes it better and slower.

    For predictions a pass may also have `forwards_per_window`, forward passes over all batches that it makes for each
    window without an update, `roundings_per_window`, how often it rounds all weights to try something, and
    `second_order`, true if it holds the Hessian of a linear. A pass with a true `let` moves scales between modules, and
    the plan says where the model does not allow that.
    """

    phase: ClassVar[Phase]
    learns: ClassVar[bool]

    @property
    def blocks_at_once(self) -> int:
        """Blocks in a window; windows of more than one slide by one block. 0: the whole model, after the walk."""
        ...

    @property
    def updates_per_window(self) -> int:
        """Forward and backward passes over one batch that it makes for each window, for the prediction of time."""
        ...

    def apply(self, window: Window) -> None:
        """Do the step; afterwards the sites hold what it decided."""
        ...


def refuse_wrong_passes(passes: Mapping[str, Pass], *, dense: bool) -> None:
    """Refuse passes, by their methods' names in order, that do not make a recipe.

    Raises:
        UsageError: an order that is not the phases' order, or not exactly one pass that rounds and at most one that
            prunes; for weights that stay `dense`, anything but one that prunes.
    """
    phases = [step.phase for step in passes.values()]
    if phases != sorted(phases):
        order = " → ".join(f"{name} ({step.phase.name.lower()})" for name, step in passes.items())
        raise UsageError(f"the passes are out of order: {order}; folding comes first, then pruning, then rounding")
    rounding, pruning = ([n for n, step in passes.items() if step.phase is p] for p in (Phase.ROUND, Phase.PRUNE))
    if dense:
        if len(pruning) != 1 or len(passes) != 1:
            raise UsageError(f"exactly one pass must prune, and none round, not {', '.join(passes) or 'none'}")
        return
    if len(pruning) > 1:
        raise UsageError(f"one pass prunes, not {len(pruning)} ({', '.join(pruning)}); leave out all but one")
    if len(rounding) > 1:
        raise UsageError(
            f"exactly one pass must round, not {len(rounding)} ({', '.join(rounding)}); leave out all but one"
        )
    if not rounding and pruning == [*passes]:
        raise UsageError(f"nothing rounds: {pruning[0]} prunes; use quantkit prune, or --prune {pruning[0]}")
    if not rounding:
        raise UsageError(
            f"nothing rounds: {', '.join(passes)} only improves what another method rounded; "
            "use --preset balanced, or name both as passes of a --recipe"
        )
    joint = [name for name in pruning if getattr(passes[name], "joint", False)]
    if joint and rounding != ["rtn"]:
        raise UsageError(f"{joint[0]} with joint rounds by itself; use --method rtn, not {rounding[0]}")
