"""The result of a personalization: some float32 tensors in a safetensors file, and which model they belong to.

The metadata have one key, `quantkit`, a JSON object: `format`; `base`, the hash of the packed weights that they were
trained with; `trainable`, its name and fields; `ledger`, what is known of privacy, in a line; `report`, how it came
about. Nothing of the base is in it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantkit.errors import DataError, ModelError, UsageError
from quantkit.model.checkpoint import Checkpoint
from quantkit.model.integrity import sha256
from quantkit.model.writer import whole
from quantkit.personal.choices import build
from quantkit.personal.parameters._places import take_out
from quantkit.runtime.fused import fuse_again
from quantkit.untrusted import parse_json

FORMAT = "quantkit delta 1"
KEY = "quantkit"  # the one key of the metadata: safetensors writes several in an order of its own
SUFFIX = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What was learned.

    Attributes:
        base: of `base_hash`.
        trainable: name of what changed: bias, norm, ….
        options: its fields.
        tensors: float32, by name.
        ledger: what is known of privacy, in one line.
        report: how it came about.
    """

    base: str
    trainable: str
    options: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    ledger: str = "none"
    report: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write it to `path`, whole or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        told = {
            "format": FORMAT,
            "base": self.base,
            "trainable": {"name": self.trainable, "options": self.options},
            "ledger": self.ledger,
            "report": self.report,
        }
        save_whole(self.tensors, path, {KEY: json.dumps(told, sort_keys=True)})

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the delta in a file.

        Raises:
            DataError: there is none, or it is damaged.
        """
        if not path.is_file():
            raise DataError(f"there is no delta {path}; give the file that quantkit personalize wrote")
        try:
            with safe_open(path, framework="pt") as file:
                told = parse_json((file.metadata() or {}).get(KEY, "{}"))
                if told.get("format") != FORMAT:
                    raise DataError(f"{path} is no delta of quantkit; give the file that quantkit personalize wrote")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
            kind = told["trainable"]
            delta = cls(
                base=str(told["base"]),
                trainable=str(kind["name"]),
                options=dict(kind["options"]),
                tensors=tensors,
                ledger=str(told["ledger"]),
                report=dict(told["report"]),
            )
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is damaged: {error}; get it again") from error
        for name, tensor in tensors.items():
            if tensor.dtype != torch.float32 or not bool(tensor.isfinite().all()):
                raise DataError(f"{name} in {path} is not made of finite float32 numbers; get it again")
        return delta

    def refuse_other_base(self, base: str, where: object) -> None:
        """Raise ModelError unless `base` is the hash of the model that the delta was made for."""
        if base != self.base:
            raise ModelError(
                f"the delta was made for another model (weights {self.base[:12]}…) than {where} ({base[:12]}…); "
                "give the one it was trained with"
            )

    def attach(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Put the delta into `model`, the one that it was made for; return what may change further, by name.

        Raises:
            DataError: its tensors are not those that its kind has in this model.
        """
        parameters: dict[str, nn.Parameter] = build("parameters", self.trainable, self.options).attach(model)
        try:
            self._fill(parameters)
        except DataError:
            take_out(model)
            raise
        return parameters

    def settle(self, model: nn.Module) -> bool:
        """Make the delta a part of `model`'s own tensors if its kind can be; return whether it can.

        The model computes what it does with the delta attached, and no hook slows it down.
        """
        kind = build("parameters", self.trainable, self.options)
        if not hasattr(kind, "settle"):
            self.attach(model)
            return False
        self.attach(model)  # refuses what does not fit
        take_out(model)
        kind.settle(model, self.tensors)
        return True

    def _fill(self, parameters: Mapping[str, nn.Parameter]) -> None:
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        own = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        if shapes != own:
            name = next(iter(set(shapes.items()) ^ set(own.items())))[0]
            raise DataError(f"the delta does not fit the model: {name} is {own.get(name)}, not {shapes.get(name)}")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.tensors[name])


def base_hash(directory: Path) -> str:
    """Return the SHA-256 of the shards of a model, by which a delta knows its base.

    Raises:
        ModelError: they cannot be read.
    """
    shards = sorted({info.shard for info in Checkpoint(directory).tensors.values()})
    if not shards:
        raise UsageError(f"{directory} has no weights")
    try:
        lines = [f"{shard.name} {sha256(shard)}\n" for shard in shards]
    except OSError as error:
        raise ModelError(f"{directory} cannot be read: {error}") from error
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def frozen_hash(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> str:
    """Return the SHA-256 of every tensor of `model` that must not change: all but `parameters`."""
    moving, found = {id(parameter) for parameter in parameters.values()}, hashlib.sha256()
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name in sorted(name for name, tensor in state.items() if id(tensor) not in moving):
        flat = state[name].detach().cpu().contiguous().flatten()
        found.update(name.encode())
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


def save_whole(tensors: Mapping[str, Tensor], path: Path, told: Mapping[str, str], *, make: bool = False) -> None:
    """Write a safetensors file so that it is whole, and on the disk, or as it was before; see `whole`."""
    with whole(path, make=make) as partial:
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, partial, metadata=dict(told))


def apply(model: PreTrainedModel, directory: Path, file: str | Path) -> Delta:
    """Make the delta in `file` a part of `model`, a packed one that was loaded from `directory`; return it.

    Raises:
        DataError: there is no such delta, or it is damaged or does not fit.
        ModelError: it was made for another model.
    """
    delta = Delta.read(Path(file))
    delta.refuse_other_base(base_hash(directory), directory)
    if delta.settle(model):
        fuse_again(model)
    return delta
