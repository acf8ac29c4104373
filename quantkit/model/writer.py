"""Writing a checkpoint so that it appears whole or not at all.

Shards are written into a hidden directory beside the output (`model/workspace.py`), one for each finished block, so
nothing that is finished waits in memory. Only `finish` moves what was made into place; a failure before that leaves the
output as it was.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantkit.errors import OutputError
from quantkit.model.checkpoint import BYTES, INDEX, read_header
from quantkit.model.integrity import sha256
from quantkit.model.workspace import Workspace, clear_disk_errors, is_finished

SHARD_BYTES = 2**30


class Shards:
    """Tensors on their way into numbered safetensors files of one directory."""

    def __init__(self, directory: Path, output: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
        """Begin with nothing; `output` is the name that errors give to the whole."""
        self.directory, self.output, self.shard_bytes = directory, output, shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._shards: list[Path] = []
        self._placement: dict[str, int] = {}
        self._bytes = 0

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
            to_disk(shard)
        self._shards.append(shard)
        self._pending = {}

    @property
    def written(self) -> Sequence[Path]:
        """The shards that are on disk, in order."""
        return tuple(self._shards)

    @property
    def bytes(self) -> int:
        """Size of all tensors that were added."""
        return self._bytes

    def keep(self, count: int) -> None:
        """Go on behind the first `count` shards of an earlier process; whatever else is in the directory is removed.

        Raises:
            ModelError: a shard is missing or damaged.
        """
        found = {_number(path): path for path in self.directory.glob("*.safetensors")}
        for number in range(count):
            shard = self.directory / f"shard-{number:05}.safetensors"
            if number in found and found[number] != shard:  # it had its final name already
                found[number].rename(shard)
            for name, info in read_header(shard).items():
                self._placement[name] = number
                self._bytes += BYTES.get(info.dtype, 1) * info.elements
            self._shards.append(shard)
        for path in set(self.directory.iterdir()) - set(self._shards):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors that are on disk, by name."""
        by_shard: dict[int, list[str]] = {}
        for name in names:
            by_shard.setdefault(self._placement[name], []).append(name)
        tensors: dict[str, Tensor] = {}
        for number, wanted in by_shard.items():
            with safe_open(self._shards[number], framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in wanted}
        return tensors

    def close(self) -> dict[str, str]:
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
        with clear_disk_errors(self.output):
            (self.directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            for shard, name in zip(self._shards, names, strict=True):
                shard.rename(self.directory / name)
            return {name: sha256(self.directory / name) for name in names}


class Writer:
    """Writes tensors and side files to `output`; use it as a context manager and call `finish` at the end."""

    def __init__(
        self,
        output: Path,
        *,
        overwrite: bool = False,
        shard_bytes: int = SHARD_BYTES,
        place: Workspace | None = None,
        keep: int = 0,
    ) -> None:
        """Prepare to write, in `place` if the caller has it already, behind the first `keep` shards there.

        Raises:
            OutputError: `output` exists and `overwrite` is off, another process is writing it, a run that was
                interrupted could go on there, or its parent cannot be written.
        """
        refuse_existing(output, overwrite=overwrite)
        self.output, self.place, self._own = output, place or Workspace(output), place is None
        if self._own and self.place.run.exists():
            raise OutputError(
                f"{self.place.directory} holds an interrupted run of `quantkit quantize`; finish it, choose another "
                "-o, or remove the directory"
            )
        self.shards = Shards(self.place.made, output, shard_bytes=shard_bytes)
        self.shards.keep(keep)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._own:
            self.place.__exit__(kind, error, trace)

    @property
    def directory(self) -> Path:
        """Where the output is made."""
        return self.place.made

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor; see `Shards.add`."""
        self.shards.add(name, tensor)

    def flush(self) -> None:
        """Write the current shard; see `Shards.flush`."""
        self.shards.flush()

    def write_text(self, name: str, text: str) -> None:
        """Write a small side file.

        What is no character, such as a byte of a file's name that is not UTF-8, is written as JSON writes it.
        """
        with clear_disk_errors(self.output):
            (self.directory / name).write_text(text, encoding="utf-8", errors="backslashreplace")

    def copy(self, source: Path, name: str | None = None) -> None:
        """Copy a side file or a directory of the source model, following the symbolic links of a Hub cache.

        Raises:
            OutputError: it does not fit on the disk, which is found out before it is copied.
        """
        with clear_disk_errors(self.output):
            files = source.rglob("*") if source.is_dir() else [source]
            refuse_full_disk(self.output, sum(path.stat().st_size for path in files if path.is_file()))
            target = self.directory / (name or source.name)
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)

    @property
    def bytes(self) -> int:
        """Size of all tensors that were added."""
        return self.shards.bytes

    def close_shards(self) -> dict[str, str]:
        """Write what is pending, name the shards, write the index; return {file name: SHA-256}, as `Shards.close`."""
        return self.shards.close()

    def finish(self) -> None:
        """Move the directory, whose shards are closed, into the place of the output, as `Workspace.finish`."""
        self.place.finish()


def refuse_existing(output: Path, *, overwrite: bool) -> None:
    """Raise OutputError if `output` exists and may not be replaced, or is no directory that could be."""
    if output.exists() and not overwrite and not is_finished(output):
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
def whole(path: Path, *, make: bool = False) -> Iterator[Path]:
    """Give another name to write a file under, which takes the place of `path` when the block ends without an error.

    `make` its directory if there is none.

    Raises:
        OutputError: the disk is full or cannot be written; a file that was there is then as it was, and a directory
            that was not is gone.
    """
    partial, new = path.with_name(f".{path.name}.new"), make and not path.parent.exists()
    try:
        with clear_disk_errors(path):
            if new:
                path.parent.mkdir(parents=True)
            yield partial
            to_disk(partial)
            partial.replace(path)
            to_disk(path.absolute().parent)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
            if new:
                path.parent.rmdir()
        raise


def to_disk(path: Path) -> None:
    """Return when a file or a directory would survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _number(path: Path) -> int:
    """Return which shard a file is, by either of its names; -1 for a file that is none."""
    kind, _, rest = path.name.partition("-")
    number = rest[:5]
    if kind not in ("shard", "model") or not number.isdecimal():
        return -1
    return int(number) - (kind == "model")


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
