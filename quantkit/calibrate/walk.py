"""Two streams and a window that slides over the blocks: load, reference, passes, propagate, hand over.

The reference stream runs through the original blocks, the actual stream through the finished ones (OmniQuant, arXiv
2308.13137, section 3). A block learns to bring the actual stream back to the reference.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from quantkit.calibrate.passes import Pass, Phase, Window
from quantkit.calibrate.streams import Stream
from quantkit.calibrate.team import Team, unite
from quantkit.core.affine import round_to_nearest
from quantkit.errors import ModelError
from quantkit.model.block import Arguments, Block, Site


@dataclass(frozen=True, kw_only=True)
class BlockReport:
    """What happened to one block.

    Attributes:
        index: which block.
        error_rtn: relative squared error of the block's output with plain round-to-nearest weights, of pruned ones
            where a pass prunes; where no pass rounds the same as `error`.
        error: the same with the weights that were kept.
        notes: what the passes noted.
    """

    index: int
    error_rtn: float
    error: float
    notes: Mapping[str, object] = field(default_factory=dict)


class Listener(Protocol):
    """Who wants to know how far the walk is."""

    def stage(self, name: str) -> None:
        """Another kind of work begins, and `progress` with it: 'distilling' after the walk, over the whole model."""

    def progress(self, done: float, total: int) -> None:
        """`done` of `total` blocks are finished; fractions in between."""

    def block(self, report: BlockReport) -> None:
        """A block is finished."""


class Walk:
    """The streams and the sliding window.

    `actual` is the stream before the window, `plain` the head of it with activations as they are, and each of
    `references` the reference stream after one of the window's blocks. A window holds `span` blocks where so many are
    left. The passes are applied whenever a block comes in; once the window has reached the end, its blocks are finished
    one after the other with what was decided about them there.
    """

    def __init__(  # noqa: PLR0913  the streams, and what the engine knows
        self,
        load: Callable[[int], Block],
        passes: Sequence[Pass],
        arguments: Sequence[Sequence[Arguments]],
        actual: Stream,
        plain: Stream,
        *,
        device: torch.device,
        seed: int,
        listener: Listener,
        team: Team,
    ) -> None:
        """Begin before the first block.

        Args:
            load: gives a block by its number.
            passes: what is done to each window, in order.
            arguments: per batch, per block of the model, the other arguments of the block.
            actual: the hidden states before block 0; advanced in place.
            plain: its head, for the check sample; advanced in place.
            device: where blocks are computed.
            seed: seed of everything random.
            listener: told about progress.
            team: the processes that share the run.
        """
        self.load, self.passes, self.arguments = load, passes, arguments
        self.actual, self.plain = actual, plain
        self.device, self.seed, self.listener = device, seed, listener
        self.team = team
        self.total = len(arguments[0])
        self.rounds = any(step.phase is Phase.ROUND for step in passes)
        self.span = min(self.total, max(step.blocks_at_once for step in passes))
        self.blocks: list[Block] = []
        self.references: list[Stream] = []
        self.notes: Mapping[str, object] = {}  # those of the last window; they hold for all that was decided there
        self.last = actual.copy()  # the reference stream after the last block that was loaded; both begin as one

    def advance(self, index: int) -> tuple[Block, BlockReport]:
        """Finish block `index`, the first of the window, and let the window slide behind it."""
        fresh = 0
        while len(self.blocks) < min(self.span, self.total - index):
            self._take_in(index + len(self.blocks))
            fresh += 1
        pruned = self._prune(index, fresh) if fresh else {}
        block, alone = self.blocks[0], self._window(index, count=1)
        error_rtn = alone.error(rounded_to_nearest(block.sites)) if self.rounds else 0.0
        if fresh:
            self.notes = {**pruned, **self._optimise(index, fresh, error_rtn)}
        for site in block.sites:
            finish_site(site, block, rounded=self.rounds)

        def keep(batch: int, output: Tensor) -> None:
            self.actual[batch] = output

        error = alone.error(keep=keep)
        self._advance_plain(alone)
        del self.blocks[0], self.references[0]
        bar = error_rtn if self.rounds else error
        return block, BlockReport(index=index, error_rtn=bar, error=error, notes=self.notes)

    def _prune(self, index: int, fresh: int) -> dict[str, object]:
        """Apply the passes that prune to the window, before anything is measured of rounding; return their notes."""
        window = self._window(index, count=len(self.blocks), fresh=fresh)
        before = [step for step in self.passes if step.phase <= Phase.PRUNE]
        for step in before:
            step.apply(window)
        if before:  # the weights of whole blocks travel, for nothing where none was pruned
            unite(self.team, window.blocks, sliding=True)
        return window.notes

    @torch.no_grad()
    def replay(self, index: int, restore: Callable[[Block], BlockReport]) -> tuple[Block, BlockReport]:
        """Go past block `index`, which an earlier process finished, by the same operations, so that bytes are the same.

        `restore` gives the block what was decided about it.
        """
        self._take_in(index)
        (block,) = self.blocks
        report = restore(block)
        for site in block.sites:
            finish_site(site, block, rounded=self.rounds)
        alone = self._window(index, count=1)
        for batch in range(len(self.actual)):
            self.actual[batch] = alone.forward(batch, student=True)
        self._advance_plain(alone)
        self.blocks.clear()
        self.references.clear()
        return block, report

    def reopen(self, index: int, restore: Callable[[Sequence[Block]], Mapping[str, object]]) -> None:
        """Take in what was in the window when block `index` was the next to be finished.

        `restore` gives the blocks what was decided about them so far, and returns the notes of that window.
        """
        while len(self.blocks) < min(self.span - 1, self.total - index):
            self._take_in(index + len(self.blocks))
        if self.blocks:
            self.notes = restore(self.blocks)

    @torch.no_grad()
    def _advance_plain(self, window: Window) -> None:
        """Advance the stream of the check sample: the actual one, but for quantized activations."""
        separate = any(site.scheme.quantizes_activations for site in window.sites)
        for batch, hidden in enumerate(self.plain):
            self.plain[batch] = window.forward(batch, hidden=hidden) if separate else self.actual[batch]

    def _optimise(self, index: int, fresh: int, error_rtn: float) -> Mapping[str, object]:
        """Apply the passes to the window; `error_rtn` is that of its first block."""
        window = self._window(index, count=len(self.blocks), fresh=fresh)
        if self.rounds:
            window.error_rtn = error_rtn if self.span == 1 else window.error(rounded_to_nearest(window.sites))
        for step in self.passes:
            if step.phase > Phase.PRUNE:
                step.apply(window)
        unite(self.team, window.blocks, sliding=self.span > 1)
        return window.notes

    def whole(self, blocks: Sequence[Block], start: Sequence[Tensor]) -> Window:
        """Return a window of all blocks, which are finished; `start` is the stream before the first."""
        return Window(
            blocks=blocks,
            inputs=start,
            references=[*([] for _ in blocks[1:]), self.last],
            arguments=self.arguments,
            device=self.device,
            fresh=0,
            seed=self.seed,
            streams=self.actual.streams,
            team=self.team,
            tick=lambda share: self.listener.progress(self.total * share, self.total),
        )

    @torch.no_grad()
    def _take_in(self, index: int) -> None:
        """Load a block behind the window and advance the reference stream through it."""
        self.blocks.append(self.load(index))
        if self.references:  # an earlier block of the window still needs the stream that is left behind
            self.last = self.last.copy()
        self.references.append(self.last)
        place = len(self.blocks) - 1
        alone = self._window(index, count=1, first=place)
        for batch, hidden in enumerate(self.last):
            output = alone.forward(batch, hidden=hidden)
            if batch == 0 and not bool(output.isfinite().all()):
                raise ModelError(
                    f"block {index} of the original model gives values that are NaN or infinite; "
                    "its config.json does not belong to the weights, or is damaged"
                )
            self.last[batch] = output

    def _window(self, index: int, *, count: int, first: int = 0, fresh: int = 0) -> Window:
        return Window(
            blocks=self.blocks[first : first + count],
            inputs=self.actual,
            references=self.references[first : first + count],
            arguments=[arguments[index : index + count] for arguments in self.arguments],
            device=self.device,
            fresh=fresh,
            seed=self.seed,
            streams=self.actual.streams,
            team=self.team,
            tick=lambda share: self.listener.progress(index + share, self.total),
        )


@torch.no_grad()
def finish_site(site: Site, block: Block, *, rounded: bool) -> None:
    """Give a site's linear the weight that will be stored: of its codes, or the pruned one in the stored dtype."""
    if rounded:
        assert site.quantized is not None, f"no pass rounded {site.name}"
        site.weight.data = site.quantized.dequantize().to(site.weight.dtype)
    elif site.mask is not None:
        name = f"{site.local_name}.weight"
        site.weight.data = site.weight.data.to(block.dtypes[name]).to(site.weight.dtype)
        block.changed.add(name)
    assert site.mask is None or not site.weight.data[~site.mask].any(), f"{site.name} has weights that were pruned"


def rounded_to_nearest(sites: Sequence[Site]) -> dict[str, Tensor]:
    """Return the weights of the sites, rounded to nearest, by full parameter name."""
    rounded = {}
    for site in sites:
        quantized = round_to_nearest(site.weight, site.scheme, site.scale_dtype)
        rounded[site.parameter] = quantized.dequantize().to(site.weight.dtype)
    return rounded
