"""`resilience/bounds.safetensors`: the bounds of a checkpoint, beside it and out of the way of other loaders.

The file holds one and the same document three times, as the bytes `copy.0`, `copy.1` and `copy.2`: the SHA-256 of
what follows, then a safetensors file of the thresholds, whose metadata say how they bind and which checkpoint they were
made for. Reading takes each bit as two of the copies have it, so bounds are no target for faults themselves; a vote
that does not give back the digest is refused.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor

from quantkit.errors import ModelError, QuantkitError
from quantkit.model.checkpoint import Checkpoint
from quantkit.model.writer import whole
from quantkit.resilience.places import Bounds
from quantkit.untrusted import parse_json

DIRECTORY, FILE = "resilience", "bounds.safetensors"
COPIES = 3
ALIKE = 0.9  # of the first rows of a checkpoint are as they were, or it is another one
_DIGEST, _LENGTH, _SHORT = 32, 8, 4  # bytes of a SHA-256 and of the length of a safetensors header; digits of a row
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, SafetensorError, QuantkitError, RuntimeError)


def path_of(directory: Path) -> Path:
    """Return where the bounds of the checkpoint in `directory` are."""
    return directory / DIRECTORY / FILE


def vote(copies: Sequence[Tensor]) -> Tensor:
    """Return, bit for bit, what two of three integer tensors of one shape have."""
    first, second, third = copies
    return (first & second) | (third & (first | second))


def write(directory: Path, bounds: Bounds, checkpoint: Checkpoint) -> Path:
    """Write the bounds of the checkpoint in `directory` beside it, whole or not at all; return the file.

    Raises:
        OutputError: the disk is full or cannot be written; a file that was there is then as it was.
    """
    path = path_of(directory)
    copy = encode(bounds, identity(checkpoint))
    with whole(path, make=True) as partial:
        save_file({f"copy.{number}": copy.clone() for number in range(COPIES)}, partial)
    return path


def read(directory: Path, checkpoint: Checkpoint) -> Bounds | None:
    """Return the bounds of the checkpoint in `directory`, None if it has none.

    Raises:
        ModelError: the file is damaged beyond the vote, or belongs to another checkpoint.
    """
    path = path_of(directory)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            copies = [file.get_tensor(f"copy.{number}") for number in range(COPIES)]
        bounds, made_for = decode(vote(copies))
    except (OSError, *_DAMAGE) as error:
        raise ModelError(
            f"{path} is damaged beyond what its three copies can repair ({error}); make it again with quantkit protect"
        ) from error
    if not is_same(made_for, identity(checkpoint)):
        raise ModelError(
            f"{path} has the bounds of another checkpoint; make them for this one with quantkit protect, or remove them"
        )
    return bounds


def encode(bounds: Bounds, made_for: str) -> Tensor:
    """Return one copy, (bytes,) uint8."""
    about = {"form": bounds.form, "kind": bounds.kind, "facts": bounds.facts, "made_for": made_for}
    tensors = {name: threshold.detach().float().cpu().contiguous() for name, threshold in bounds.thresholds.items()}
    document = save(tensors, metadata={"quantkit": json.dumps(about, sort_keys=True)})
    return torch.frombuffer(bytearray(hashlib.sha256(document).digest() + document), dtype=torch.uint8)


def decode(copy: Tensor) -> tuple[Bounds, str]:
    """Return the bounds of one copy, (bytes,) uint8, and the identity of the checkpoint that they were made for.

    Raises:
        ValueError: it is not what its digest says.
    """
    data = copy.numpy().tobytes()
    digest, document = data[:_DIGEST], data[_DIGEST:]
    if hashlib.sha256(document).digest() != digest:
        raise ValueError("the vote of the copies is not what their digest says")
    about: Mapping[str, Any] = parse_json(_metadata(document)["quantkit"])
    bounds = Bounds(thresholds=load(document), form=about["form"], kind=about["kind"], facts=about["facts"])
    return bounds, str(about["made_for"])


def identity(checkpoint: Checkpoint) -> str:
    """Return a name for the content of a checkpoint, however its tensors are spread over shards.

    It begins with the hash of the names, dtypes and shapes of all tensors; four hexadecimal digits for the first row of
    each follow, so nothing large is read. That every bit is as it was is for `quantkit check` to say.
    """
    shards: dict[Path, list[str]] = {}
    for name, info in checkpoint.tensors.items():
        shards.setdefault(info.shard, []).append(name)
    rows: dict[str, bytes] = {}
    for shard, names in shards.items():
        try:
            with safe_open(shard, framework="pt") as file:
                rows |= {name: _first_row(file, name, checkpoint.tensors[name].shape) for name in names}
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot read {shard}: {error}; download the model again") from error
    shapes = [[name, info.dtype, info.shape] for name, info in sorted(checkpoint.tensors.items())]
    whole = hashlib.sha256(json.dumps(shapes).encode()).hexdigest()
    return whole + "".join(hashlib.sha256(rows[name]).hexdigest()[:_SHORT] for name in sorted(rows))


def is_same(made_for: str, found: str) -> bool:
    """Return whether two identities are of one checkpoint, of which some bits may have flipped meanwhile.

    Another model, or the same one quantized otherwise, differs in most of its first rows; a fault in one of them must
    not take away the bounds that are there for faults.
    """
    whole = 2 * _DIGEST
    if made_for[:whole] != found[:whole] or len(made_for) != len(found):
        return False
    starts = range(whole, len(found), _SHORT)
    alike = sum(made_for[start : start + _SHORT] == found[start : start + _SHORT] for start in starts)
    return alike >= ALIKE * len(starts)


def _first_row(file: Any, name: str, shape: tuple[int, ...]) -> bytes:  # noqa: ANN401  what safe_open gives
    row = file.get_slice(name)[:1] if len(shape) > 1 else file.get_tensor(name)
    data: bytes = row.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return data


def _metadata(document: bytes) -> Mapping[str, str]:
    size = int.from_bytes(document[:_LENGTH], "little")
    found: Mapping[str, str] = parse_json(document[_LENGTH : _LENGTH + size].decode())["__metadata__"]
    return found
