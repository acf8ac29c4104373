"""Whether a run fits: what it may take, what the streams get of that, and which flags would make it fit."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch

from quantkit import costs, host
from quantkit.workload import Workload

SHARE = 0.8  # of what is free: what streams may fill up to in a run that was not told how much it may take
SPARE = 0.03  # of what the user allows, that streams leave alone: by so much a prediction of the rest may be too low
SHORTEST = 128  # tokens; shorter sequences teach too little to be proposed
GIB = 2**30

Others = Sequence[tuple[str, Workload]]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a run may take, in bytes.

    Attributes:
        memory: the most resident host memory.
        streams: what resident memory may grow to with streams; what is more is spilled.
        free: what resident memory could grow to on this machine.
        device: memory that is free on a GPU that computes the blocks; 0 without one.
    """

    memory: int
    streams: int
    free: int
    device: int = 0

    @classmethod
    def of(cls, device: torch.device, memory: int | None = None) -> Self:
        """Return the limits on this machine now; `memory` is the most that the user allows, None: what is free."""
        own, left = host.resident_memory(), host.free_memory()
        most = own + left if memory is None else min(memory, own + left)
        return cls(
            memory=most,
            streams=own + int(SHARE * left) if memory is None else int((1 - SPARE) * most),
            free=own + left,
            device=costs.free_device_memory(device),
        )

    def held(self, work: Workload) -> int:
        """Return how much of the streams may stay in memory: what the rest of the run leaves, one batch at least."""
        return max(costs.batch_bytes(work), self.streams - costs.host_memory(work, 0))

    def memory_of(self, work: Workload) -> int:
        """Return the predicted peak of resident host memory."""
        return costs.host_memory(work, self.held(work))

    def spilled(self, work: Workload) -> int:
        """Return how much of the streams is predicted to be spilled."""
        batch = costs.batch_bytes(work)
        return max(0, costs.stream_bytes(work) - self.held(work) // batch * batch)

    def fits(self, work: Workload) -> bool:
        """Return whether the run fits, its streams spilled as far as need be."""
        return not any(self._short(work))

    def refusal(self, work: Workload, others: Others) -> str | None:
        """Say what there is too little of, and which flags would make the run fit; None if it fits.

        `others` are presets and what they would do, those that the user would rather have first.
        """
        short = next(self._short(work), None)
        if short is None:
            return None
        ways = self._ways(work, others)
        return f"{short}; " + (f"{' or '.join(ways)} makes it fit" if ways else "no flag makes it fit on this machine")

    def _short(self, work: Workload) -> Iterator[str]:
        """Yield where memory is short: how much the run takes beyond what the process has, and how much there is."""
        least, own = _least(work), host.resident_memory()
        if least > self.memory and self.memory < self.free:
            allowed = f"--memory allows {self.memory / 1e9:.2f} GB"
            yield f"the run needs {least / 1e9:.2f} GB of memory in all where {allowed}"
        elif least > self.memory:
            yield _needs(least - own, "memory", self.free - own)
        if work.on_gpu and costs.device_memory(work) > self.device:
            yield _needs(costs.device_memory(work), f"memory on {work.device}", self.device)

    def _ways(self, work: Workload, others: Others) -> list[str]:
        """Return flags of which each makes the run fit; if there are none, a set that does so together."""
        raised = [(f"--memory {-(-10 * _least(work) // GIB) / 10:.1f}GiB", work)]
        this = [("", work)]
        found = [
            *replace(self, memory=self.free)._first(raised if self.memory < self.free else []),
            *self._first(_with_single_sequences(this)),
            *self._first(_with_shorter_sequences(this)),
            *self._first((f"--preset {name}", other) for name, other in others),
        ]
        if found:
            return found
        named = [(f"--preset {name}", other) for name, other in others]
        single = list(_with_single_sequences([*this, *named]))
        return self._first([*single, *_with_shorter_sequences(single)])

    def _first(self, runs: Iterable[tuple[str, Workload]]) -> list[str]:
        """Return the flags of the first run that fits, if there is one."""
        return next(([flags] for flags, work in runs if self.fits(work)), [])


def _least(work: Workload) -> int:
    """Return the predicted peak of host memory with all but one batch of the streams spilled."""
    return costs.host_memory(work, costs.batch_bytes(work))


def _needs(needed: int, what: str, free: int) -> str:
    return f"the run needs {needed / 1e9:.2f} GB of {what} where {free / 1e9:.2f} GB are free"


def _with_single_sequences(runs: Iterable[tuple[str, Workload]]) -> Iterator[tuple[str, Workload]]:
    for flags, work in runs:
        yield f"{flags} --batch-size 1".strip(), replace(work, batch_size=1)


def _with_shorter_sequences(runs: Iterable[tuple[str, Workload]]) -> Iterator[tuple[str, Workload]]:
    """Yield the runs with half of the tokens in a sequence, half of that, and so on."""
    runs = list(runs)
    seqlen = runs[0][1].seqlen // 2
    while seqlen >= SHORTEST:
        for flags, work in runs:
            yield f"{flags} --seqlen {seqlen}".strip(), replace(work, seqlen=seqlen)
        seqlen //= 2
