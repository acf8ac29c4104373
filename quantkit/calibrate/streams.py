"""Hidden states between blocks, on the host: in memory up to a budget, in a file beyond it.

A stream holds one tensor per batch. What does not fit the budget is written to a chunk of one file that has no name
where the system allows that, so nothing stays behind however the process ends. Reading maps the chunk for as long as
its tensor is used: its pages are the system's to drop, and no more than the batch in use is resident. Where a tensor
lies changes nothing about it: either way it is contiguous, on the CPU, and begins with a page.

What fits has pages of its own too, and no tensor stays alive with them: it is made anew from the pages when it is read.
The C library (glibc up to 2.37) takes aligned memory anew where it has just freed as much, as soon as something small
came to lie behind it, and the small parts of a tensor that stays do: 537 MB of streams made 1.6 GB resident.

Streams that begin as one share their tensors, and a chunk is not written again while anybody can read it.
"""

import errno
import mmap
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable, MutableSequence
from pathlib import Path
from typing import IO, Self, overload

import torch
from torch import Tensor

from quantkit.errors import OutputError


class Streams:
    """Where the streams of a run lie, and how much of them may stay in memory.

    Attributes:
        budget: bytes that all streams together may take in memory; None: any.
        directory: where the file lies that holds the rest; None: where temporary files lie.
        held: bytes that they take in memory now.
        spilled: the most bytes that lay in the file.
    """

    def __init__(self, budget: int | None = None, directory: Path | None = None) -> None:
        """Begin without streams; the file is there as long as it is needed."""
        self.budget, self.directory = budget, directory
        self.held = self.spilled = 0
        self._file: IO[bytes] | None = None
        self._chunks = self._end = 0  # how many are in use, and the size of the file
        self._free: dict[int, list[int]] = defaultdict(list)  # size → places of chunks that nobody reads any more

    def new(self, dtype: torch.dtype, tensors: Iterable[Tensor] = ()) -> "Stream":
        """Return a stream that begins with `tensors` and keeps what it is given in `dtype`."""
        stream = Stream(self, dtype, [])
        stream.extend(tensors)
        return stream

    def keep(self, tensor: Tensor) -> "_Held | _Spilled":
        """Keep a contiguous tensor of the CPU.

        Raises:
            OutputError: it does not fit the budget, and the disk is full or cannot be written.
        """
        if self.budget is None or self.held + tensor.nbytes <= self.budget:
            return _Held(self, tensor)
        return _Spilled(self, tensor, self._write(tensor))

    def map(self, chunk: "_Spilled") -> Tensor:
        """Return what was written to a chunk; nothing else is written there while the tensor lives."""
        memory = _Mapping(self._fileno(), chunk.size, access=mmap.ACCESS_COPY, offset=chunk.place)
        memory.chunk = chunk
        return torch.frombuffer(memory, dtype=chunk.dtype).view(chunk.shape)

    def forget(self, chunk: "_Spilled") -> None:
        """Let the place of a chunk be written again; without chunks there is no file."""
        self._free[_in_pages(chunk.size)].append(chunk.place)
        self._chunks -= 1
        if not self._chunks and self._file is not None:
            self._file.close()
            self._file, self._end = None, 0
            self._free.clear()

    def _write(self, tensor: Tensor) -> int:
        """Write a tensor where nobody reads; return the place."""
        size = _in_pages(tensor.nbytes)
        free = self._free[size]
        place = free.pop() if free else self._end
        rest, end = tensor.flatten().view(torch.uint8).numpy().data, place
        try:
            while rest:  # a disk that is almost full takes a part
                done = os.pwrite(self._fileno(), rest, end)
                rest, end = rest[done:], end + done
        except OSError as error:
            reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
            raise OutputError(
                f"cannot spill activations to {self.directory or tempfile.gettempdir()}: {reason}; "
                "make room there, or let more of them stay in memory with --memory"
            ) from error
        self._chunks += 1
        self._end = max(self._end, place + size)
        self.spilled = max(self.spilled, self._end)
        return place

    def _fileno(self) -> int:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self.directory, buffering=0)  # noqa: SIM115  as long as the streams
        return self._file.fileno()


class Stream(MutableSequence[Tensor]):
    """One tensor per batch, (batch, tokens, width), on the CPU in the stream's dtype.

    A tensor that is put in is converted; one that is taken out is not to be written into. A slice and a copy are
    streams of their own that share the tensors.
    """

    def __init__(self, streams: Streams, dtype: torch.dtype, chunks: "list[_Held | _Spilled | None]") -> None:
        self.streams, self.dtype, self._chunks = streams, dtype, chunks

    def __len__(self) -> int:
        return len(self._chunks)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> "Stream": ...
    def __getitem__(self, index: int | slice) -> "Tensor | Stream":
        if isinstance(index, slice):
            return Stream(self.streams, self.dtype, self._chunks[index])
        chunk = self._chunks[index]
        assert chunk is not None, f"batch {index} of the stream could not be kept"
        return chunk.tensor

    @overload
    def __setitem__(self, index: int, value: Tensor) -> None: ...
    @overload
    def __setitem__(self, index: slice, value: Iterable[Tensor]) -> None: ...
    def __setitem__(self, index: int | slice, value: Tensor | Iterable[Tensor]) -> None:
        assert isinstance(index, int) and isinstance(value, Tensor), "batches are replaced one by one"  # noqa: PT018
        self._chunks[index] = None  # its room is needed for what replaces it
        self._chunks[index] = self._kept(value)

    def __delitem__(self, index: int | slice) -> None:
        del self._chunks[index]

    def insert(self, index: int, value: Tensor) -> None:
        """Put a batch in front of another one."""
        self._chunks.insert(index, self._kept(value))

    def copy(self) -> Self:
        """Return a stream of the same tensors, which goes its own way from here."""
        return type(self)(self.streams, self.dtype, list(self._chunks))

    def _kept(self, value: Tensor) -> "_Held | _Spilled":
        return self.streams.keep(value.to("cpu", self.dtype).detach().contiguous())


class _Held:
    """A tensor in memory."""

    def __init__(self, streams: Streams, tensor: Tensor) -> None:
        self.streams, self.shape, self.dtype, self.size = streams, tensor.shape, tensor.dtype, tensor.nbytes
        self.memory = mmap.mmap(-1, tensor.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON)
        self.tensor.copy_(tensor)
        streams.held += self.size

    @property
    def tensor(self) -> Tensor:
        """The tensor; it is made anew each time, since one that lives as long would lie behind memory that is freed."""
        return torch.frombuffer(self.memory, dtype=self.dtype).view(self.shape)

    def __del__(self) -> None:
        self.streams.held -= self.size


class _Spilled:
    """A tensor in the file."""

    def __init__(self, streams: Streams, tensor: Tensor, place: int) -> None:
        self.streams, self.place = streams, place
        self.shape, self.dtype, self.size = tensor.shape, tensor.dtype, tensor.nbytes

    @property
    def tensor(self) -> Tensor:
        """The tensor, mapped; what is written into it does not reach the file."""
        return self.streams.map(self)

    def __del__(self) -> None:
        self.streams.forget(self)


class _Mapping(mmap.mmap):
    """Keeps its chunk from being written while it is mapped."""

    chunk: _Spilled


def _in_pages(size: int) -> int:
    return -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
