"""Reading a safetensors file once and learning two things: is every value finite, and what is the file's SHA-256.

The format leaves no gaps: eight bytes of length, the header, then one tensor behind the other. The bytes in file order
are therefore the file, and their digest is that of `sha256sum` and of the Hub (`lfs.oid`).
"""

import hashlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from quantkit.errors import ModelError
from quantkit.untrusted import parse_json

CHUNK = 2**24  # bytes in memory at a time, a multiple of the size of every dtype
# the safetensors names of the dtypes that can hold NaN or infinity
FLOATING = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verified_sha256(shard: Path, names: Collection[str]) -> str:
    """Return the SHA-256 of a safetensors file whose tensors `names` hold neither NaN nor infinity.

    Raises:
        ModelError: a value that is not finite, or a file that vanished, or changed since its header was read.
    """
    digest, buffer = hashlib.sha256(), bytearray(CHUNK)
    try:
        with shard.open("rb") as file:
            length = _take(file, 8)
            header = _take(file, int.from_bytes(length, "little"))
            digest.update(length + header)
            for name, dtype, size in _in_file_order(header):
                bad = 0
                for part in _parts(file, size, buffer):
                    digest.update(part)
                    if dtype in FLOATING and name in names:
                        bad += _not_finite(part, FLOATING[dtype])
                if bad:
                    raise ModelError(
                        f"{name} in {shard} has {bad} values that are NaN or infinite; "
                        "the checkpoint is damaged, download the model again"
                    )
            if file.read(1):
                raise EOFError("it is longer than its header says")
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"cannot read {shard}: {error}; download the model again") from error
    return digest.hexdigest()


def _take(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise EOFError("it is truncated")
    return data


def _in_file_order(header: bytes) -> Iterator[tuple[str, str, int]]:
    """Yield name, dtype and size in bytes of every tensor, in the order in which they lie in the file."""
    entries = {name: entry for name, entry in parse_json(header.decode()).items() if name != "__metadata__"}
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        yield name, entry["dtype"], end - begin


def _parts(file: BinaryIO, size: int, buffer: bytearray) -> Iterator[memoryview]:
    """Yield the next `size` bytes of the file in `buffer`, part after part."""
    while size:
        part = memoryview(buffer)[: min(size, len(buffer))]
        if file.readinto(part) < len(part):  # type: ignore[attr-defined]
            raise EOFError("it is truncated")
        yield part
        size -= len(part)


def _not_finite(part: memoryview, dtype: torch.dtype) -> int:
    values = torch.frombuffer(part, dtype=dtype)
    wide = values.float() if values.element_size() == 1 else values  # torch.isfinite does not know the eight-bit floats
    return int(values.numel() - torch.isfinite(wide).sum())
