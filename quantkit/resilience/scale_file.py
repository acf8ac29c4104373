"""`resilience/scales.safetensors`: what protects the scales of a checkpoint, beside it and out of the way of others.

The file holds the parts of `scales.protect_scales` as `<name of the scale tensor>.<part>`, the kind in its metadata.
Reading the checkpoint through `guarded` repairs scales that changed since; the file on disk is left as it is.
"""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantkit.errors import ModelError, OutputError, QuantkitWarning, UsageError, nearest
from quantkit.model.checkpoint import Checkpoint
from quantkit.model.writer import whole
from quantkit.resilience import side_file
from quantkit.resilience.scales import SCALE_KINDS, protect_scales, repair_scales

FILE, KEY = "scales.safetensors", "quantkit_scales"
END = ".weight_scale"  # of the names of scales in compressed-tensors
LIMIT = 0.1  # of the scales of a tensor; more of them do not change by themselves, so the file is another's


def path_of(directory: Path) -> Path:
    """Return where the protection of the scales of the checkpoint in `directory` is."""
    return directory / side_file.DIRECTORY / FILE


def beside(directory: Path) -> str:
    """Return what protects the checkpoint in `directory`, in words; nothing: an empty text."""
    there = {"bounds": side_file.path_of(directory), "guards of scales": path_of(directory)}
    return " and ".join(name for name, path in there.items() if path.exists())


def refuse(directory: Path, kind: str, *, overwrite: bool) -> None:
    """Refuse what `write` could not do or should not replace.

    Raises:
        UsageError: an unknown kind, no scales of compressed-tensors.
        ModelError: a checkpoint that cannot be read.
        OutputError: there is a protection.
    """
    if kind not in SCALE_KINDS:
        raise UsageError(f"unknown protection of scales {kind!r}{nearest(kind, SCALE_KINDS)}")
    if not directory.is_dir():
        raise ModelError(f"the directory {directory} does not exist; give one that `quantkit quantize` wrote")
    _names(Checkpoint(directory))
    if path_of(directory).exists() and not overwrite:
        raise OutputError(f"the scales of {directory} are protected; replace the protection with --overwrite")


def write(directory: Path, kind: str) -> Path:
    """Write what protects the scales of the checkpoint in `directory`, whole or not at all; return the file.

    Raises:
        UsageError: an unknown kind, no scales of compressed-tensors, scales that cannot be protected.
        ModelError: a checkpoint that cannot be read.
        OutputError: the disk is full or cannot be written; a file that was there is then as it was.
    """
    checkpoint = Checkpoint(directory)
    parts: dict[str, Tensor] = {}
    for name, scale in checkpoint.load(_names(checkpoint)).items():
        parts |= {f"{name}.{part}": tensor for part, tensor in protect_scales(scale, kind).items()}
    path = path_of(directory)
    with whole(path, make=True) as partial:
        save_file(parts, partial, metadata={KEY: kind})
    return path


def _names(checkpoint: Checkpoint) -> list[str]:
    names = [name for name in checkpoint if name.endswith(END)]
    if not names:
        raise UsageError(
            f"{checkpoint.directory} has no scales of compressed-tensors; give what quantkit quantize wrote"
        )
    return names


def read(directory: Path) -> tuple[str, dict[str, dict[str, Tensor]]] | None:
    """Return the kind of protection, and name of a scale tensor → its guard; None where there is none.

    Raises:
        ModelError: the file is no such file.
    """
    path = path_of(directory)
    if not path.is_file():
        return None
    guards: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            kind = (file.metadata() or {}).get(KEY)
            for name in file.keys():  # noqa: SIM118  no mapping
                scale, _, part = name.rpartition(".")
                guards.setdefault(scale, {})[part] = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is damaged ({error}); make it again with quantkit protect, or remove it") from error
    if kind not in SCALE_KINDS:
        raise ModelError(f"{path} protects scales by {kind!r}, which is not known; make it again, or remove it")
    return kind, guards


def guarded(directory: Path) -> Checkpoint:
    """Return the checkpoint in `directory`; scales that are protected come repaired.

    Raises:
        ModelError: see `Checkpoint`; a protection that is damaged or that of another checkpoint.
    """
    found = read(directory)
    return Checkpoint(directory) if found is None else Guarded(directory, *found)


class Guarded(Checkpoint):
    """A checkpoint whose scales are repaired whenever they are read, with a warning where that changed one."""

    def __init__(self, directory: Path, kind: str, guards: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over the guards of `read`.

        Raises:
            ModelError: they protect other tensors than the checkpoint's scales.
        """
        super().__init__(directory)
        self.kind, self.guards = kind, guards
        scales = {name for name in self.tensors if name.endswith(END)}
        if odd := sorted(scales ^ guards.keys()):
            raise self._of_another(odd[0])

    def load(self, names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """See `Checkpoint.load`.

        Raises:
            ModelError: as there; so many scales differ that the protection must be that of another checkpoint.
        """
        names = list(names)
        protected = [name for name in names if name in self.guards]
        tensors = super().load([name for name in names if name not in self.guards], dtype)
        for name, scale in super().load(protected).items():
            tensors[name] = self._repaired(name, scale) if dtype is None else self._repaired(name, scale).to(dtype)
        return tensors

    def _repaired(self, name: str, scale: Tensor) -> Tensor:
        try:
            repaired = repair_scales(scale, self.guards[name], self.kind)
        except (KeyError, RuntimeError, ValueError, IndexError) as error:
            raise self._of_another(name) from error
        changed = repaired.corrected + repaired.replaced
        if changed > max(4, LIMIT * scale.numel()):
            raise self._of_another(name)
        if changed:
            warnings.warn(
                f"{name}: {changed} scales were damaged, {repaired.corrected} of them put right and "
                f"{repaired.replaced} replaced ({self.kind}); quantkit check tells whether the files are whole",
                QuantkitWarning,
                stacklevel=2,
            )
        return repaired.scale

    def _of_another(self, name: str) -> ModelError:
        path = path_of(self.directory)
        return ModelError(f"{path} does not fit {name}: it protects another checkpoint; make it again, or remove it")
