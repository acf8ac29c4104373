"""What a run keeps of its finished blocks, and how another process goes on behind them."""

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from quantkit.calibrate.engine import CheckSample
from quantkit.calibrate.journal import Journal
from quantkit.calibrate.team import Team
from quantkit.calibrate.walk import BlockReport, Walk
from quantkit.errors import QuantkitWarning
from quantkit.model.block import Block
from quantkit.model.integrity import sha256
from quantkit.output import Sink
from quantkit.provenance import Timed

# of what `provenance.machine` says: what decides over the last bits of a result
_DECIDES = ("cpu", "threads", "gpu")


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, and did so behind a finished block."""


class Keeper:
    """Keeps every finished block; see `quantkit.calibrate.engine.Keeper`.

    Attributes:
        finished: how many blocks were finished when this process began.
        attempt: 1 for the process that began the run, and so on.
        identical: whether everything that was computed again came out as before.
    """

    def __init__(  # noqa: PLR0913
        self,
        journal: Journal,
        sink: Sink,
        first: Callable[[], None],
        *,
        staged: bool,
        machine: Mapping[str, Any],
        watch: Timed,
        stop: Callable[[], bool],
    ) -> None:
        """Begin behind what the journal has.

        Args:
            journal: where facts are kept.
            sink: where finished blocks are, or go if they are `staged`.
            first: keeps what all blocks depend on, once there is one.
            staged: whether the whole model is worked on again behind the last block, so that blocks are kept apart
                from what is written.
            machine: on what blocks are computed.
            watch: knows how long this process has worked.
            stop: asked after each block whether to go on.
        """
        self.journal, self.sink, self.first, self.staged = journal, sink, first, staged
        self.machine, self.watch, self.stop = {**machine}, watch, stop
        self.finished, self.identical = journal.finished, True
        self.spent, self.attempt = 0.0, 1
        if self.finished:
            last = journal.block(self.finished - 1)
            self.spent, self.attempt = last["seconds"], last["process"] + 1
            self._verify()
            self._compare_machines(last["machine"])

    @property
    def seconds(self) -> float:
        """Time that went into the run, that of earlier processes included up to their last finished block."""
        return self.spent + self.watch.seconds

    def restore(self, block: Block) -> BlockReport:
        """Give a finished block what was decided about it."""
        facts = self.journal.block(block.index)
        self.sink.restore(block, facts["changed"])
        self.sink.zeros |= facts["zeros"]
        return BlockReport(**facts["report"])

    def reopen(self, blocks: Sequence[Block]) -> Mapping[str, object]:
        """Give the blocks of the window what they had when the last finished block left it; return its notes."""
        facts, tensors = self.journal.block(self.finished - 1), self.journal.window()
        for block in blocks:
            block.changed |= {*facts["window"][block.name]}
            block.set_state(_part(tensors, block.name))
        notes: Mapping[str, object] = facts["report"]["notes"]
        return notes

    def keep(self, block: Block, report: BlockReport, walk: Walk) -> None:
        """Keep a block, or compare what it leads to with what it led to when it was finished.

        Raises:
            Stopped: the run was asked to stop.
        """
        digest = _digest(walk.plain)
        if block.index < self.finished:
            self._compare(self.journal.block(block.index)["stream"], digest)
            return
        if not self.journal.finished:
            self.first()
        if self.staged:
            self.sink.emit(block)
        later = walk.blocks
        facts = {
            "report": asdict(report),
            "changed": sorted(block.changed),
            "zeros": {site.name: self.sink.zeros[site.name] for site in block.sites if site.name in self.sink.zeros},
            "shards": len(self.sink.shards.written),
            "sha256": [sha256(shard) for shard in self.sink.shards.written[self._before() :]],
            "stream": digest,
            "window": {block.name: sorted(block.changed) for block in later},
            "seconds": self.seconds,
            "process": self.attempt,
            "machine": self.machine,
        }
        window = {f"{b.name}/{key}": tensor for b in later for key, tensor in b.state().items()}
        self.journal.note_block(facts, window)
        if self.stop():
            raise Stopped

    def note_result(self, sample: CheckSample, whole: Mapping[str, Any], sink: Sink) -> None:
        """Keep what comes out behind the last block; `sink` is where everything is written."""
        facts = {
            "whole": whole,
            "shards": len(sink.shards.written),
            "sha256": [sha256(shard) for shard in sink.shards.written],
            "replaced": sorted(sink.replaced),
            "written": sink.written,
            "zeros": sink.zeros,
        }
        self.journal.note("result", facts, {"tokens": sample.tokens, "logits": sample.logits})

    def result(self, sink: Sink) -> tuple[list[BlockReport], CheckSample, dict[str, Any]] | None:
        """Return what came out behind the last block, if a process got there, and let `sink` know what it wrote."""
        facts = self.journal.recall("result")
        if facts is None:
            return None
        tensors = self.journal.tensors("result")
        for shard, digest in zip(sink.shards.written, facts["sha256"], strict=True):
            self.journal.verify(shard, digest)
        sink.zeros = facts["zeros"]
        sink.replaced = {*facts["replaced"]}
        sink.written = {name: (kind, tuple(shape)) for name, (kind, shape) in facts["written"].items()}
        reports = [BlockReport(**self.journal.block(index)["report"]) for index in range(self.finished)]
        return reports, CheckSample(**tensors), facts["whole"]

    def _compare(self, before: str, now: str) -> None:
        if before != now and self.identical:
            self.identical = False
            warnings.warn(
                "what was finished before comes out differently here, as on other hardware; the run goes on, but its "
                "output will not be that of an uninterrupted run to the last bit",
                QuantkitWarning,
                stacklevel=2,
            )

    def _compare_machines(self, before: Mapping[str, object]) -> None:
        for name in _DECIDES:
            if before.get(name) != self.machine.get(name):
                warnings.warn(
                    f"the interrupted run had {name} {before.get(name)}, here it is {self.machine.get(name)}; the last "
                    "bits of what follows may be others than those of an uninterrupted run",
                    QuantkitWarning,
                    stacklevel=2,
                )

    def _before(self) -> int:
        """Return how many shards there were behind the last finished block."""
        return int(self.journal.block(self.journal.finished - 1)["shards"]) if self.journal.finished else 0

    def _verify(self) -> None:
        """Refuse shards that are not those that were written."""
        digests = [digest for index in range(self.finished) for digest in self.journal.block(index)["sha256"]]
        for shard, digest in zip(self.sink.shards.written, digests, strict=True):
            self.journal.verify(shard, digest)


class Shared:
    """What every process of a team has for a keeper: the first one asks the true one, and tells the others."""

    def __init__(self, team: Team, keeper: Keeper | None = None) -> None:
        """Begin behind what the keeper of the first process has; the others give none."""
        self.team, self.keeper = team, keeper
        self.finished: int = team.say(keeper.finished if keeper else 0)

    def restore(self, block: Block) -> BlockReport:
        """Give a finished block what was decided about it."""
        report: Any = asdict(self.keeper.restore(block)) if self.keeper else None
        block.changed |= {*self.team.say(sorted(block.changed))}
        self._share(block)
        return BlockReport(**self.team.say(report))

    def reopen(self, blocks: Sequence[Block]) -> Mapping[str, object]:
        """Give the blocks of the window what they had; return the notes of the last finished one."""
        notes = self.keeper.reopen(blocks) if self.keeper else None
        for block in blocks:
            block.changed |= {*self.team.say(sorted(block.changed))}
            self._share(block)
        return self.team.say(notes) or {}

    def keep(self, block: Block, report: BlockReport, walk: Walk) -> None:
        """Keep a block, in the first process.

        Raises:
            Stopped: the run was asked to stop.
        """
        stopped = False
        if self.keeper:
            try:
                self.keeper.keep(block, report, walk)
            except Stopped:
                stopped = True
        if self.team.say(stopped):
            raise Stopped

    def _share(self, block: Block) -> None:
        if not self.team.alone:
            state = self.team.give(block.state() if self.keeper else None)
            if not self.keeper:
                block.set_state(state)


def _part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the tensors of one block, by their names behind its own."""
    return {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}


def _digest(stream: Sequence[Tensor]) -> str:
    """Return the SHA-256 of hidden states."""
    digest = hashlib.sha256()
    for hidden in stream:
        digest.update(hidden.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
