"""Several processes that share one run: how they split it, add up, agree, and notice that one of them is gone.

A launcher (torchrun, accelerate launch) starts the processes and tells each through the environment who it is. Tensors
travel as they are, everything else as JSON; nothing is pickled. What processes decide, they decide on sums that are the
same to the last bit for all of them.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from quantkit.errors import TeamError, UsageError
from quantkit.model.block import Block

T = TypeVar("T")

TIMEOUT = timedelta(hours=4)  # for one that downloads or writes text while the others wait; a death is seen at once
PATIENCE, SOON = 20.0, 6.0  # seconds in which processes tell that they end; in which one does that should by now


@dataclass(frozen=True, kw_only=True)
class Team:
    """The processes of a run, seen by one of them; `Team()` is a process alone, for which nothing here does anything.

    All of them make the same calls in the same order.

    Attributes:
        rank: which of them this one is, from 0; the first one writes and speaks.
        size: how many there are.
        local_rank: which of those on its machine this one is, from 0.
        local_size: how many are on its machine.
        store: where they leave word for each other, None for one alone.
        elastic: whether the launcher keeps the store; otherwise the first process does.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    store: Store | None = None
    elastic: bool = False

    @classmethod
    @contextmanager
    def join(cls) -> Iterator[Self]:
        """Join the processes that a launcher started, for the duration of the context; without a launcher be alone.

        Raises:
            UsageError: more processes than GPUs on a machine that has some.
            TeamError: the others cannot be reached.
        """
        size, local = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        if size == 1:
            yield cls()
            return
        gpus = torch.cuda.device_count()
        if gpus:
            if local >= gpus:
                raise UsageError(f"there are more processes on this machine than its {gpus} GPUs; start {gpus}")
            torch.cuda.set_device(local)
        with together():
            store, rank, size = next(rendezvous("env://", timeout=timedelta(minutes=10)))
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if gpus else "gloo",
                store=PrefixStore("group", store),
                rank=rank,
                world_size=size,
                timeout=TIMEOUT,
            )
        here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        elastic = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            word = PrefixStore("word", store)
            yield cls(rank=rank, size=size, local_rank=local, local_size=here, store=word, elastic=elastic)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    @classmethod
    def current(cls) -> Self:
        """Return the processes that this one has joined, for those to whom no one can pass them."""
        return cls(rank=dist.get_rank(), size=dist.get_world_size()) if dist.is_initialized() else cls()

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.size == 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def device(self, name: str | None) -> str | None:
        """Return the device that `name` means for this process: of several GPUs each process takes its own."""
        return (
            f"cuda:{self.local_rank}"
            if not self.alone and torch.cuda.is_available() and name in (None, "cuda")
            else name
        )

    def refuse_uneven(self, samples: int, batch_size: int) -> None:
        """Raise UsageError unless batches of `batch_size` of so many sequences can be split evenly."""
        sizes = f"{self.size}, {2 * self.size} or {4 * self.size}"
        if batch_size % self.size:
            raise UsageError(
                f"--batch-size {batch_size} cannot be split over {self.size} processes; "
                f"use a multiple of their number, such as --batch-size {sizes}"
            )
        if samples % self.size:
            below = samples // self.size * self.size
            raise UsageError(
                f"{samples} sequences cannot be split over {self.size} processes; "
                f"use --samples {below or below + self.size}"
            )

    def rows(self, batch: Tensor) -> Tensor:
        """Return this process's rows of `batch`, (batch, ...), which are as many for every process."""
        return batch.tensor_split(self.size)[self.rank]

    def sum(self, *tensors: Tensor) -> None:
        """Replace each tensor by the sum over all processes."""
        self._reduce(tensors, dist.ReduceOp.SUM)

    def minimum(self, *tensors: Tensor) -> None:
        """Replace each tensor by its smallest values over all processes."""
        self._reduce(tensors, dist.ReduceOp.MIN)

    def maximum(self, *tensors: Tensor) -> None:
        """Replace each tensor by its largest values over all processes."""
        self._reduce(tensors, dist.ReduceOp.MAX)

    def total(self, *values: float) -> list[float]:
        """Return the sums of numbers over all processes, added in float64."""
        together = torch.tensor(values, dtype=torch.float64)
        self.sum(together)
        return [float(value) for value in together]

    def wait(self) -> None:
        """Return when every process has come here."""
        self.sum(torch.zeros(1))

    def broadcast(self, *tensors: Tensor, source: int = 0) -> None:
        """Replace each tensor by that of the process `source`, bit by bit."""
        if self.alone:
            return
        for tensor in tensors:
            values = tensor.detach()
            flat = values.contiguous().view(-1)
            if not len(flat):
                continue
            with together():
                dist.broadcast(flat.view(torch.uint8), source)
            if flat.data_ptr() != values.data_ptr():
                values.copy_(flat.view(values.shape))

    def give(self, tensors: Mapping[str, Tensor] | None, *, source: int = 0) -> dict[str, Tensor]:
        """Return the tensors of the process `source` by name; the others need know neither names nor shapes."""
        mine = dict(tensors or {})
        if self.alone:
            return mine
        facts = [[n, str(t.dtype).removeprefix("torch."), t.device.type, list(t.shape)] for n, t in mine.items()]
        given = {}
        for name, dtype, device, shape in json.loads(self._text(json.dumps(facts), source)):
            own = self.rank == source
            given[name] = mine[name] if own else torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            self.broadcast(given[name], source=source)
        return given

    def say(self, value: T, *, source: int = 0) -> T:
        """Return the value of the process `source`: anything that JSON knows."""
        said: T = value if self.alone else json.loads(self._text(json.dumps(value), source))
        return said

    def divide(self, items: Sequence[T], work: Callable[[T], Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Return what `work` makes of every item, each computed by one process, all processes at the same time."""
        if self.alone or len(items) < 2:
            return [dict(work(item)) for item in items]
        own = {number: work(items[number]) for number in range(self.rank, len(items), self.size)}
        return [self.give(own.get(number), source=number % self.size) for number in range(len(items))]

    def in_turn(self, work: Callable[[], T]) -> T:
        """Return `work()`, which the first process of every machine runs first: what it fetches is then there."""
        done = [work()] if self.local_rank == 0 else []
        self.wait()
        return done[0] if done else work()

    def agree(self, what: str, value: str) -> None:
        """Raise UsageError if `value`, which `what` names, is not the same for every process."""
        (different,) = self.total(value != self.say(value))
        if different:
            raise UsageError(f"the processes have different {what}; start all of them with the same command")

    def farewell(self, *, cause: bool) -> list[int] | None:
        """Tell the others that this process ends; return which ended without a word, None if another one tells why.

        `cause` says whether this process knows why. Of those who do the first speaks; where none does, the process that
        keeps the store, or one of all if the launcher keeps it. Everyone else must leave at once, because some notice
        that a process is gone only when those next to them leave.
        """
        assert self.store is not None, "a process alone has nobody to tell"
        everyone = range(self.size)
        try:
            self.store.set(f"{self.rank}", "cause" if cause else "lost")
            if cause:
                if self.rank > 0 and self._hear([0], SOON).get(0) == "cause":
                    return None  # at once: when the first process has heard this one, it takes the store with it
                told = self.store.add("told", 1) > 1
                self._hear(everyone if self.leads and not self.elastic else [], SOON)
                return None if told else []
            time.sleep(0.5)  # a process that dies closes its connections one after the other, the store perhaps last
            if self.store.add("lost", 1) > 1 if self.elastic else not self._keeps_store():
                return None
            dist.destroy_process_group()  # who waits for this one notices, and can say so too
            heard = self._hear(everyone, PATIENCE)
        except RuntimeError:  # the store is gone, and the first process with it
            return [0] if self.rank == 1 else None
        return None if "cause" in heard.values() else [rank for rank in everyone if rank not in heard]

    def _keeps_store(self) -> bool:
        """Return whether the store ends with this process; raises RuntimeError if it has ended."""
        assert self.store is not None
        self.store.check(["0"])
        return self.leads and not self.elastic

    def _hear(self, ranks: Iterable[int], patience: float) -> dict[int, str]:
        """Return the last words of processes, of those who have any soon; for the last of them no one waits long."""
        assert self.store is not None
        missing, heard, began = set(ranks), dict[int, str](), time.monotonic()
        last = began
        while missing and time.monotonic() < min(began + patience, last + SOON if len(missing) == 1 else math.inf):
            for rank in [rank for rank in missing if self.store.check([f"{rank}"])]:
                heard[rank], last = self.store.get(f"{rank}").decode(), time.monotonic()
                missing.remove(rank)
            time.sleep(0.05)
        return heard

    def _text(self, text: str, source: int) -> str:
        own = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        length = torch.tensor([len(own)])
        self.broadcast(length, source=source)
        received = own if self.rank == source else torch.empty(int(length), dtype=torch.uint8)
        self.broadcast(received, source=source)
        return bytes(received.tolist()).decode()

    def _reduce(self, tensors: Sequence[Tensor], how: Any) -> None:  # noqa: ANN401  torch has no type for it
        if self.alone:
            return
        for tensor in tensors:
            with together():
                dist.all_reduce(tensor, how)


def unite(team: Team, blocks: Sequence[Block], *, sliding: bool) -> None:
    """Give every process what the first one decided about the blocks, in case that unlike processors round differently.

    With `sliding`, the blocks stay in the window: what was learned about them and their weights as they are now, too.
    """
    if team.alone:
        return
    for block in blocks:
        team.broadcast(*(p for n, p in block.module.named_parameters() if sliding or n in block.changed))
        for site in block.sites:
            if site.mask is not None:
                team.broadcast(site.mask)
            if site.quantized is not None:
                team.broadcast(*site.quantized.tensors().values())
            if sliding and site.learned is not None:
                team.broadcast(*site.learned.values())


@contextmanager
def together() -> Iterator[None]:
    """Turn what torch.distributed raises, which is no narrower, into TeamError."""
    try:
        yield
    except RuntimeError as error:
        raise TeamError(
            "another process of the run ended or cannot be reached; start the same command again"
        ) from error
