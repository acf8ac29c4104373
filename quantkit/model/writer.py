"""Writing a checkpoint so that it appears whole or not at all.

Shards are written into a hidden directory beside the output, one for each finished window of blocks, so nothing that is
finished waits in memory. Only `finish` moves the directory into place; a failure before that leaves the output as
it was.
"""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from quantkit.errors import OutputError
from quantkit.model.checkpoint import INDEX
from quantkit.model.integrity import sha256

SHARD_BYTES = 2**30


class Writer:
    """Writes tensors and side files to `output`; use it as a context manager and call `finish` at the end."""

    def __init__(self, output: Path, *, overwrite: bool = False, shard_bytes: int = SHARD_BYTES) -> None:
        """Prepare to write.

        Raises:
            OutputError: `output` exists and `overwrite` is off, or its parent cannot be written.
        """
        refuse_existing(output, overwrite=overwrite)
        self.output, self.shard_bytes = output.resolve(), shard_bytes  # a link to a directory stays one
        self._pending: dict[str, Tensor] = {}
        self._shards: list[Path] = []
        self._placement: dict[str, int] = {}
        self._bytes = 0
        with clear_disk_errors(output):
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self.directory = Path(tempfile.mkdtemp(prefix=f".{self.output.name}.partial-", dir=self.output.parent))
            self.directory.chmod(0o755)  # mkdtemp makes it private, but this becomes the user's directory

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)  # nothing is left to remove after `finish`

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor to the current shard; a shard that the tensor would overflow is written first.

        Raises:
            OutputError: the disk is full or cannot be written.
            ValueError: a tensor of that name was added before.
        """
        if name in self._placement:
            raise ValueError(f"tensor {name} is written twice")
        size = tensor.numel() * tensor.element_size()
        if self._pending and sum(map(_bytes, self._pending.values())) + size > self.shard_bytes:
            self.flush()
        self._pending[name] = tensor.detach().to("cpu").contiguous()
        self._placement[name] = len(self._shards)
        self._bytes += size

    def flush(self) -> None:
        """Write the current shard, so that its tensors no longer take memory.

        Raises:
            OutputError: the disk is full or cannot be written.
        """
        if not self._pending:
            return
        shard = self.directory / f"shard-{len(self._shards):05}.safetensors"
        with clear_disk_errors(self.output):
            save_file(self._pending, shard, metadata={"format": "pt"})
            shard.chmod(0o644)  # safetensors makes its files private
        self._shards.append(shard)
        self._pending = {}

    def write_text(self, name: str, text: str) -> None:
        """Write a small side file.

        What is no character, such as a byte of a file's name that is not UTF-8, is written as JSON writes it.
        """
        with clear_disk_errors(self.output):
            (self.directory / name).write_text(text, encoding="utf-8", errors="backslashreplace")

    def copy(self, source: Path, name: str | None = None) -> None:
        """Copy a side file or a directory of the source model, following the symbolic links of a Hub cache."""
        with clear_disk_errors(self.output):
            target = self.directory / (name or source.name)
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)

    @property
    def bytes(self) -> int:
        """Size of all tensors that were added."""
        return self._bytes

    def close_shards(self) -> dict[str, str]:
        """Write what is pending, give the shards their final names, write the index; return {file name: SHA-256}.

        Raises:
            OutputError: the disk is full or cannot be written.
        """
        self.flush()
        count = len(self._shards)
        names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
        index = {
            "metadata": {"total_size": self._bytes},
            "weight_map": {name: names[shard] for name, shard in sorted(self._placement.items())},
        }
        self.write_text(INDEX, json.dumps(index, indent=2) + "\n")
        with clear_disk_errors(self.output):
            for shard, name in zip(self._shards, names, strict=True):
                shard.rename(self.directory / name)
            return {name: sha256(self.directory / name) for name in names}

    def finish(self) -> None:
        """Move the directory, whose shards are closed, into the place of the output.

        Raises:
            OutputError: the disk cannot be written; an overwritten output is then back in its place.
        """
        with clear_disk_errors(self.output):
            _replace(self.directory, self.output)


def refuse_existing(output: Path, *, overwrite: bool) -> None:
    """Raise OutputError if `output` exists and may not be replaced, or is no directory that could be."""
    if output.exists() and not overwrite:
        raise OutputError(f"{output} exists; choose another -o, or replace it with --overwrite")
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file, not a directory; choose another -o")
    if output.is_mount():
        raise OutputError(f"{output} is a mount point, which cannot be replaced; choose a directory below it")


def refuse_full_disk(output: Path, needed: int) -> None:
    """Raise OutputError if the disk of `output` has fewer than `needed` free bytes."""
    parent = next(path for path in output.resolve().parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(
            f"{output} needs {needed / 1e9:.2f} GB but {parent} has {free / 1e9:.2f} GB free; "
            "free some or choose another -o"
        )


@contextmanager
def clear_disk_errors(output: Path) -> Iterator[None]:
    """Turn what the file system or safetensors says into one OutputError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error)
        reason = "the disk is full" if full else str(error)
        raise OutputError(f"cannot write {output}: {reason}; nothing was changed") from error


def _replace(directory: Path, output: Path) -> None:
    """Move `directory` to `output`; an existing output is kept until the new one is in place."""
    if not output.exists():
        directory.rename(output)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old-", dir=output.parent))
    try:
        os.replace(output, old)  # noqa: PTH105  onto the empty directory, which makes the name ours
    except OSError:
        old.rmdir()
        raise
    try:
        directory.rename(output)
    except OSError:
        old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
