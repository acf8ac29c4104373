"""What a run keeps on disk so that the same command, started again, goes on where it was cut off.

The streams between the blocks are not kept, they are gigabytes: whoever goes on reads the finished blocks back and
runs them again, forward only, by the same operations, which gives the same bytes on the same machine. Kept are

    identity       what the run is: recipe, versions, and what its source looks like
    tokens         what it is calibrated on
    source         SHA-256 of the source's weights
    losses         what was measured to spend a budget of bits
    shares         what share each linear loses, where that was measured
    block-00007    a finished block: its report, which shards hold it, and what the window had decided about later ones
    result         everything after the last block

Each is a JSON file that appears whole or not at all and carries its own SHA-256 and that of the tensors beside it. A
file is on the disk before one is written that counts on it, so nothing is believed after a loss of power that is not
there.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit.errors import OutputError, UsageError
from quantkit.model.integrity import sha256
from quantkit.model.workspace import clear_disk_errors
from quantkit.model.writer import to_disk

_BLOCK = "block-{:05}"


class Journal:
    """The kept facts of one run, in a directory that is made when the first of them is kept."""

    def __init__(self, directory: Path, identity: Mapping[str, object], *, restart: bool = False) -> None:
        """Open what an earlier process kept, or begin anew.

        Args:
            directory: where facts are kept.
            identity: what must be the same for the run to go on, by names that a user understands.
            restart: forget what was kept.

        Raises:
            UsageError: what was kept is of another run; the message names the first difference.
            OutputError: what was kept is damaged.
        """
        self.directory, self.identity = directory, dict(identity)
        if restart:
            shutil.rmtree(directory, ignore_errors=True)
        self._refuse_another_run()
        self.finished = 0
        while self._path(_BLOCK.format(self.finished)).exists():
            self.finished += 1

    @property
    def begun(self) -> bool:
        """Whether anything is kept."""
        return self._path("identity").exists()

    def note(self, name: str, facts: Any, tensors: Mapping[str, Tensor] | None = None) -> None:  # noqa: ANN401
        """Keep facts, anything that JSON holds, with tensors beside them; a fact of that name is replaced.

        Raises:
            OutputError: the disk is full or cannot be written.
        """
        if name != "identity" and not self.begun:
            self.note("identity", self.identity)
        with clear_disk_errors(self.directory):
            self.directory.mkdir(exist_ok=True)
            document: dict[str, Any] = {"facts": facts}
            if tensors is not None:
                path = self._path(name, "safetensors")
                save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, path)
                to_disk(path)
                document["tensors"] = sha256(path)
            document["sha256"] = _digest(document)
            new = self._path(name, "new")
            new.write_text(json.dumps(document, indent=1), encoding="utf-8")
            to_disk(new)
            new.replace(self._path(name))
            to_disk(self.directory)

    def recall(self, name: str) -> Any:  # noqa: ANN401
        """Return the facts that were kept under a name, None if there are none.

        Raises:
            OutputError: they are damaged.
        """
        return self._document(name)["facts"] if self._path(name).exists() else None

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors that were kept with the facts of a name.

        Raises:
            OutputError: they are damaged.
        """
        path = self._path(name, "safetensors")
        self.verify(path, self._document(name).get("tensors"))
        return load_file(path)

    def verify(self, path: Path, digest: object) -> None:
        """Refuse a file that is not what was written.

        Raises:
            OutputError: it is missing, or its SHA-256 is another.
        """
        try:
            if sha256(path) != digest:
                raise self._damaged(path)
        except OSError as error:
            raise self._damaged(path) from error

    def note_block(self, facts: Mapping[str, Any], window: Mapping[str, Tensor]) -> None:
        """Keep the next finished block; `window` is what is decided so far about later blocks."""
        self.note(_BLOCK.format(self.finished), facts, window)
        if self.finished:  # only the last block's window matters
            self._path(_BLOCK.format(self.finished - 1), "safetensors").unlink(missing_ok=True)
        self.finished += 1

    def block(self, index: int) -> Any:  # noqa: ANN401
        """Return the facts of a finished block."""
        return self.recall(_BLOCK.format(index))

    def window(self) -> dict[str, Tensor]:
        """Return what was decided about the blocks behind the last finished one."""
        return self.tensors(_BLOCK.format(self.finished - 1))

    def _document(self, name: str) -> dict[str, Any]:
        path = self._path(name)
        try:
            document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            claimed = document.pop("sha256")
            if claimed == _digest(document) and "facts" in document:
                return document
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
        raise self._damaged(path)

    def _path(self, name: str, kind: str = "json") -> Path:
        return self.directory / f"{name}.{kind}"

    def _damaged(self, path: Path) -> OutputError:
        return OutputError(
            f"{path} is not what an interrupted run wrote there, so it cannot go on; --restart begins anew"
        )

    def _refuse_another_run(self) -> None:
        kept = self.recall("identity")
        if kept is None:  # nothing, or the remains of a process that died before it kept anything
            shutil.rmtree(self.directory, ignore_errors=True)
            return
        for name in [*self.identity, *kept]:
            old, new = kept.get(name), self.identity.get(name)
            if old != json.loads(json.dumps(new)):
                output = self.directory.parent.name[1:].removesuffix(".partial")
                raise UsageError(
                    f"an interrupted run of {output} had {name} {_said(old)}, not {_said(new)}; start it again as it "
                    "was to finish it, pass --restart to begin anew, or choose another -o"
                )


def _digest(document: object) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _said(value: object) -> str:
    return "unset" if value is None else json.dumps(value)
