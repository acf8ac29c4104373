"""Reading safetensors checkpoints lazily: names and shapes first, tensors only when they are asked for.

A shard is opened for one call and closed again, so the memory that maps it never outlives the call, and resident
memory does not grow with the number of blocks that were read.
"""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.model.integrity import sha256, verified_sha256
from quantkit.untrusted import is_file, parse_json, read_document

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SAFETENSORS_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a stored tensor lies and what it is: shard file, safetensors dtype name, shape."""

    shard: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


class Checkpoint:
    """The safetensors checkpoint in a directory; a mapping of tensor name to `TensorInfo`, in file order."""

    def __init__(self, directory: Path) -> None:
        """Read the index and every shard's header.

        Raises:
            ModelError: no safetensors, a missing or truncated shard, an index that disagrees with its shards or that
                points outside the directory.
        """
        self.directory = directory
        placement = _read_index(directory)
        self.tensors: dict[str, TensorInfo] = {}
        if placement is None:
            self.tensors.update(read_header(_single_shard(directory)))
            return
        for shard in dict.fromkeys(placement.values()):
            header = read_header(directory / shard)
            wanted = [name for name, file in placement.items() if file == shard]
            if missing := [name for name in wanted if name not in header]:
                raise ModelError(
                    f"{directory / INDEX} says that {missing[0]} is in {shard}, but it is not; download the model again"
                )
            self.tensors.update((name, header[name]) for name in wanted)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def load(self, names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return the named tensors on the CPU, floating-point ones converted to `dtype` if one is given.

        Raises:
            ModelError: a shard vanished or cannot be read any more.
        """
        by_shard: dict[Path, list[str]] = {}
        for name in names:
            by_shard.setdefault(self.tensors[name].shard, []).append(name)
        tensors = {}
        for shard, wanted in by_shard.items():
            try:
                with safe_open(shard, framework="pt") as file:
                    for name in wanted:
                        tensor = file.get_tensor(name)
                        # copy: a tensor that aliased the mapped file would keep all of it resident
                        keep = dtype is None or not tensor.is_floating_point()
                        tensors[name] = tensor.to(tensor.dtype if keep else dtype, copy=True)
            except (OSError, SafetensorError) as error:
                raise ModelError(f"cannot read {shard}: {error}; download the model again") from error
        return tensors

    def verify(self) -> dict[str, str]:
        """Read every shard once and return {file name: SHA-256}, the digests of `sha256sum` and of the Hub.

        Raises:
            ModelError: at the first tensor that holds NaN or infinity; a shard that vanished or changed.
        """
        names: dict[Path, set[str]] = {}
        for name, info in self.tensors.items():
            names.setdefault(info.shard, set()).add(name)
        return {shard.name: verified_sha256(shard, names[shard]) for shard in names}


def side_files(directory: Path, *, but: Collection[str] = ()) -> Iterator[Path]:
    """Yield what lies beside the weights of a model and belongs to it, files and directories, but those named.

    Their content is copied into outputs, which are then given to others, so a link among them is followed to a regular
    file inside the directory, or in a snapshot of a Hub cache to one of its blobs, and nowhere else: a model from
    somewhere must not be able to carry a file of the user's away. Shards are never copied, only their tensors are
    read, so these may be links to anywhere.

    Raises:
        ModelError: a link that leads elsewhere, or something that is neither a file nor a directory.
    """
    for path in sorted(directory.iterdir()):
        weights = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        if weights or path.name.startswith(".") or path.name in but:
            continue
        _refuse_stray(path, directory)
        if not path.is_dir():
            yield path
        elif not _holds_weights(path):
            for inner in path.rglob("*"):
                _refuse_stray(inner, directory)
            yield path


def fingerprint(directory: Path) -> dict[str, str]:
    """Return {path inside the directory: SHA-256} of all that belongs to a model but its weights: index, side files.

    Raises:
        ModelError: as `side_files`; a file that cannot be read.
    """
    try:
        index = [directory / INDEX] if (directory / INDEX).is_file() else []
        inside = [each for path in side_files(directory) for each in (path, *sorted(path.rglob("*")))]
        return {path.relative_to(directory).as_posix(): sha256(path) for path in index + inside if path.is_file()}
    except OSError as error:
        raise ModelError(f"{directory} cannot be read: {error}") from error


def _holds_weights(directory: Path) -> bool:
    return any(path.suffix in _WEIGHTS for path in directory.rglob("*"))


def _refuse_stray(path: Path, directory: Path) -> None:
    if not path.is_symlink():
        if not (path.is_file() or path.is_dir()):
            raise ModelError(f"{path} is neither a file nor a directory; remove it from the model")
        return
    target, home = Path(os.path.realpath(path)), directory.resolve()
    cached = home.parent.name == "snapshots" and target.parent == (home.parent.parent / "blobs").resolve()
    if not (target.is_file() and (home in target.parents or cached)):
        raise ModelError(
            f"{path} is a link to {target}, which is no file of the model's directory, and would be copied into the "
            "output; put a copy in the place of the link, or remove it (only shards may be links to anywhere)"
        )


def _read_index(directory: Path) -> Mapping[str, str] | None:
    """Return {tensor name: shard file name} of a sharded checkpoint, None if there is no index."""
    path = directory / INDEX
    if not path.is_file():
        return None
    try:
        entries = dict(parse_json(read_document(path))["weight_map"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is not a safetensors index; download the model again") from error
    for name, file in entries.items():
        # a bare file name: nothing from an index may lead out of the directory
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise ModelError(f"{path} places {name} in {file!r}, outside the directory; the index is refused")
        if not is_file(directory / file):
            raise ModelError(f"{path} names the shard {file}, which does not exist; download the model again")
    return entries


def _single_shard(directory: Path) -> Path:
    path = directory / SINGLE
    if path.is_file():
        return path
    if any(next(directory.glob(pattern), None) for pattern in _PICKLES):
        raise ModelError(
            f"{directory} holds pickled weights only, which can run code when they are opened; load the model with "
            "transformers and save it again with save_pretrained, which writes safetensors"
        )
    raise ModelError(f"{directory} holds neither {SINGLE} nor {INDEX}")


def read_header(shard: Path) -> dict[str, TensorInfo]:
    """Return what a shard holds.

    Raises:
        ModelError: the file is missing, truncated or no safetensors.
    """
    if shard.exists() and not shard.is_file():  # to open a pipe would wait for somebody who writes
        raise ModelError(f"{shard} is no regular file; download it again")
    try:
        with safe_open(shard, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  no mapping
            return {name: TensorInfo(shard, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (OSError, SafetensorError, MemoryError) as error:  # a file of no size at all cannot be mapped
        raise ModelError(f"{shard} is truncated or is no safetensors file ({error}); download it again") from error
