"""The hidden directory beside an output in which everything is made: `.OUT.partial/`.

    lock      held by the process that writes; the kernel lets go of it when that process ends, however it ends
    output/   what becomes OUT, whole, by one rename
    blocks/   finished blocks that passes over the whole model work on again
    old/      an OUT that is being replaced, until the new one is in its place
    run/      what a run needs to go on after it was cut off (`calibrate/journal.py`); other writers have none

A process that dies leaves the directory behind. The next one that wants the same OUT goes on there if it can, and
otherwise sweeps it.
"""

import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from safetensors import SafetensorError

from quantkit.errors import OutputError

_UNLOCKABLE = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # some network file systems


class Workspace:
    """The directory while this process has it; use it as a context manager.

    Attributes:
        output: what is to be written.
        directory: where it is made.
        finished: whether a run here had its output in place and died before it could sweep up.
    """

    def __init__(self, output: Path) -> None:
        """Take the directory of `output`, with whatever is in it.

        Raises:
            OutputError: another process is writing `output`, or the parent cannot be written.
        """
        self.output = output.resolve()  # a link to a directory stays one
        self.directory = place_of(output)
        with clear_disk_errors(output):
            self._lock = _lock(self.directory, output)
            _settle(self)
            self.finished = is_finished(output)
            self.made.mkdir(exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.run.exists():
            self.remove()
        self._lock.close()

    @property
    def made(self) -> Path:
        """What becomes the output."""
        return self.directory / "output"

    @property
    def run(self) -> Path:
        """What a run keeps; it exists only where something is worth keeping."""
        return self.directory / "run"

    @property
    def blocks(self) -> Path:
        """Where finished blocks wait for passes over the whole model."""
        return self.directory / "blocks"

    def finish(self) -> None:
        """Move what was made into the place of the output; an old one is kept until then.

        Raises:
            OutputError: the disk cannot be written; an overwritten output is then back in its place.
        """
        with clear_disk_errors(self.output):
            old = self.directory / "old"
            if self.output.exists():
                os.replace(self.output, old)  # noqa: PTH105  a name for what the tests make fail
            try:
                self.made.rename(self.output)
            except OSError:
                if old.exists():
                    old.rename(self.output)
                raise
            self.remove()

    def remove(self) -> None:
        """Remove the directory and what is left in it; `run` last, by which another process knows what was begun."""
        for path in (self.made, self.blocks, self.directory / "old", self.run, self.directory):
            shutil.rmtree(path, ignore_errors=True)


def place_of(output: Path) -> Path:
    """Return the directory in which `output` is made."""
    target = output.resolve()
    return target.with_name(f".{target.name}.partial")


def is_finished(output: Path) -> bool:
    """Return whether `output` is what a run left that died before it could sweep up."""
    place = place_of(output)
    return (place / "run").exists() and not (place / "output").exists() and output.exists()


@contextmanager
def clear_disk_errors(output: Path) -> Iterator[None]:
    """Turn what the file system or safetensors says into one OutputError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error)
        reason = "the disk is full" if full else str(error)
        raise OutputError(f"cannot write {output}: {reason}; nothing was changed") from error


def _settle(workspace: Workspace) -> None:
    """Finish what a process began that died between the two renames of `Workspace.finish`."""
    old, made = workspace.directory / "old", workspace.made
    if old.exists() and not workspace.output.exists():
        (made if made.exists() else old).rename(workspace.output)
    if old.exists():
        shutil.rmtree(old)


def _lock(directory: Path, output: Path) -> IO[str]:
    """Return the open lock file of `directory`, which is made if need be."""
    path = directory / "lock"
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # another process has just removed the directory
            file = path.open("a+", encoding="utf-8")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                who = file.read() or "another process"
                file.close()
                raise OutputError(f"{output} is being written by {who}; wait for it, or choose another -o") from None
            except OSError as error:
                if error.errno not in _UNLOCKABLE:
                    raise
            if _is(file, path):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
                return file
            file.close()


def _is(file: IO[str], path: Path) -> bool:
    """Return whether the open file still is the one at `path`: its last owner removes it before it lets go."""
    with suppress(FileNotFoundError):
        return os.fstat(file.fileno()).st_ino == path.stat().st_ino
    return False
