"""Which linears a run prunes, how much of each, and what came of it in bytes."""

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from quantkit.calibrate.passes import Pass, Phase
from quantkit.core.masks import Sparsity
from quantkit.errors import UsageError
from quantkit.pruners._pruner import Pruner
from quantkit.workload import shape

CHUNK = 1 << 20
MOST_COMPRESSED = 256 * CHUNK  # of larger outputs every n-th chunk is compressed, and the rest estimated
LEVEL = 1  # of zlib, which then takes about as long and gains about as much as zstd does by default


def pruner_of(passes: Mapping[str, Pass]) -> Pruner | None:
    """Return the pass that prunes, None if no pass does."""
    found = [step for step in passes.values() if step.phase is Phase.PRUNE]
    assert all(isinstance(step, Pruner) for step in found)
    return found[0] if found else None  # type: ignore[return-value]


def assign(linears: Mapping[str, nn.Module], step: Pruner) -> dict[str, Sparsity]:
    """Return how much of each linear goes, by full module name, of those that the globs choose.

    Raises:
        UsageError: a glob that matches nothing, nothing left to prune, or N:M and a width that M does not divide.
    """
    example = next(iter(linears))
    for option in ("include", "exclude"):
        for glob in getattr(step, option):
            if not any(fnmatchcase(name, glob) for name in linears):
                raise UsageError(f"--{option} {glob!r} matches no linear that the run has; names look like {example}")
    chosen = [name for name in linears if not step.include or any(fnmatchcase(name, g) for g in step.include)]
    chosen = [name for name in chosen if not any(fnmatchcase(name, glob) for glob in step.exclude)]
    if not chosen:
        raise UsageError("--exclude leaves nothing to prune; leave out one of its globs")
    for name in chosen:
        rows, columns = shape(linears[name])
        try:
            step.asked.check_width(columns if isinstance(linears[name], nn.Linear) else rows)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from None
    return dict.fromkeys(chosen, step.asked)


def pruned_facts(
    shapes: Mapping[str, tuple[int, int]], sparsity: Mapping[str, Sparsity], zeros: Mapping[str, int], directory: Path
) -> dict[str, Any]:
    """Return what the report says of pruning.

    Args:
        shapes: of every linear of the run, by module name.
        sparsity: what was asked of each that is pruned.
        zeros: how many weights of each were dropped.
        directory: that of the written shards.
    """
    sizes = {name: shapes[name][0] * shapes[name][1] for name in zeros}
    return {
        "share": sum(zeros.values()) / max(sum(sizes.values()), 1),
        "linears": {
            name: {"asked": str(sparsity[name]), "zeros": zeros[name], "weights": sizes[name]} for name in zeros
        },
        **asdict(compressed(directory)),
    }


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """Bytes of all shards, as they are and compressed; `estimated` if only a part of them was."""

    bytes: int
    compressed_bytes: int
    estimated: bool
    compressor: str


def compressed(directory: Path) -> Compressed:
    """Return what the shards of a directory would take if a general compressor packed them, reading 1 MiB at a time."""
    paths = sorted(directory.glob("*.safetensors"))
    total = sum(path.stat().st_size for path in paths)
    every = -(-total // MOST_COMPRESSED) or 1
    name, pack = _compressor()
    taken = packed = 0
    for number, chunk in enumerate(_chunks(paths)):
        if number % every == 0:
            taken += len(chunk)
            packed += pack(chunk)
    return Compressed(
        bytes=total,
        compressed_bytes=round(packed * total / taken) if taken else 0,
        estimated=every > 1,
        compressor=name,
    )


def _compressor() -> tuple[str, Any]:
    """Return the name of the compressor at hand, and what gives the compressed size of some bytes."""
    try:
        import zstandard
    except ImportError:
        return f"zlib {LEVEL}", lambda data: len(zlib.compress(data, LEVEL))
    pack = zstandard.ZstdCompressor()
    return "zstd 3", lambda data: len(pack.compress(data))


def _chunks(paths: list[Path]) -> Iterator[bytes]:
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk
