"""The shards of an output against its index and its manifest: every tensor once, whole, as promised."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.evaluation.documents import Report, at_most
from quantkit.model.checkpoint import INDEX, TensorInfo, read_header
from quantkit.model.integrity import sha256


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The safetensors files of an output.

    Attributes:
        headers: file name → tensor name → dtype and shape, of every readable file, in the index or not.
        lost: names of files that are missing or cannot be read.
    """

    headers: Mapping[str, Mapping[str, TensorInfo]]
    lost: frozenset[str]

    @property
    def bytes(self) -> int:
        """Size of the data of all files without their headers."""
        return sum(_payload(next(iter(header.values())).shard) for header in self.headers.values() if header)

    def places(self) -> dict[str, list[str]]:
        """Return tensor name → names of the files that hold it."""
        places: dict[str, list[str]] = {}
        for file, header in self.headers.items():
            for name in header:
                places.setdefault(name, []).append(file)
        return places


def read_shards(output: Path, index: Mapping[str, str] | None, report: Report | None) -> tuple[Shards, list[str]]:
    """Return the shards of `output`, and a fault for each that is missing, damaged or a stranger."""
    present = {path.name for path in output.glob("*.safetensors")}
    named = set((index or {}).values()) | set(report.sha256 if report else ())
    faults = [f"the shard {file} is missing" for file in sorted(named - present)]
    headers: dict[str, dict[str, TensorInfo]] = {}
    for file in sorted(present):
        try:
            headers[file] = read_header(output / file)
        except ModelError as error:
            cause = f" ({error.__cause__})" if error.__cause__ else ""
            faults.append(f"the shard {file} is truncated or damaged{cause}")
        if report and file not in report.sha256:
            faults.append(f"{file} lies beside the weights but the report does not know it")
    return Shards(headers=headers, lost=frozenset(named - set(headers))), faults


def shard_faults(output: Path, shards: Shards, index: Mapping[str, str] | None, report: Report | None) -> list[str]:
    """Return what is wrong with the shards; tensors of a lost shard are not told again one by one."""
    faults = at_most(_duplicates(shards))
    if index is not None:
        faults += at_most(_misplaced(shards, index))
    if report is not None:
        lost = {name for name, file in (index or {}).items() if file in shards.lost}
        faults += at_most(_missing(shards, report, lost))
        faults += at_most(_extra(shards, report))
        faults += at_most(_different(shards, report))
        faults += at_most(_altered(output, shards, report))
        if not shards.lost and shards.bytes != report.output_bytes:
            faults.append(f"the tensors have {shards.bytes} bytes but the report measured {report.output_bytes}")
    return faults


def value_faults(shards: Shards) -> list[str]:
    """Return what is wrong with the values, reading one tensor at a time: NaN, infinity, scales not positive.

    Codes and zero points need no such test: every pattern of bits is a code.
    """
    faults: list[str] = []
    for file, header in shards.headers.items():
        for name, info in header.items():
            try:
                with safe_open(info.shard, framework="pt") as opened:
                    faults += _wrong_values(name, opened.get_tensor(name))
            except (OSError, SafetensorError) as error:
                faults.append(f"{name} in {file} cannot be read: {error}")
    return at_most(faults)


def _duplicates(shards: Shards) -> Iterator[str]:
    for name, files in shards.places().items():
        if len(files) > 1:
            yield f"the tensor {name} is in {len(files)} shards: {', '.join(files)}"


def _misplaced(shards: Shards, index: Mapping[str, str]) -> Iterator[str]:
    """Tell where the index and the shards disagree."""
    for name, file in index.items():
        if file in shards.headers and name not in shards.headers[file]:
            yield f"{INDEX} places {name} in {file}, where it is not"
    for name, files in shards.places().items():
        if name not in index:
            yield f"the tensor {name} in {files[0]} is not in {INDEX}"


def _missing(shards: Shards, report: Report, lost: set[str]) -> Iterator[str]:
    places = shards.places()
    for name in report.tensors:
        if name not in places and name not in lost:
            yield f"the tensor {name} is missing"


def _extra(shards: Shards, report: Report) -> Iterator[str]:
    for name, files in shards.places().items():
        if name not in report.tensors:
            yield f"the tensor {name} in {files[0]} is extra: the report does not list it"


def _different(shards: Shards, report: Report) -> Iterator[str]:
    for header in shards.headers.values():
        for name, info in header.items():
            dtype, shape = report.tensors.get(name, (info.dtype, info.shape))
            if info.dtype != dtype:
                yield f"the tensor {name} has dtype {info.dtype}, not {dtype}"
            if info.shape != shape:
                yield f"the tensor {name} has shape {info.shape}, not {shape}"


def _altered(output: Path, shards: Shards, report: Report) -> Iterator[str]:
    for file, expected in report.sha256.items():
        if file in shards.headers and sha256(output / file) != expected:
            yield f"the shard {file} was altered: its SHA-256 is not the one in the report"


def _wrong_values(name: str, tensor: Tensor) -> Iterator[str]:
    if not tensor.is_floating_point():
        return
    bad = int(tensor.numel() - torch.isfinite(tensor).sum())
    if bad:
        yield f"the tensor {name} has {bad} values that are NaN or infinite"
    elif name.endswith(".weight_scale") and (bad := int((tensor <= 0).sum())):
        yield f"the tensor {name} has {bad} scales that are not positive"


def _payload(path: Path) -> int:
    """Return the size of a safetensors file without its header, which begins with its own length."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
