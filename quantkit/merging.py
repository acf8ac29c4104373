"""`merge`: what a personalization learned becomes a part of a packed checkpoint, which plain transformers loads.

Merged are values that the checkpoint has a place for, each exactly: biases, where the family's configuration allows
them, gains of norms, and quantization scales. The packed codes are copied as they are.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.ambient import usual_settings
from quantkit.errors import ModelError, OutputError, UsageError
from quantkit.evaluation.manifest import CHECK, REPORT
from quantkit.model import names
from quantkit.model.checkpoint import BYTES, Checkpoint, side_files
from quantkit.model.skeleton import Skeleton
from quantkit.model.writer import Writer, refuse_existing, refuse_full_disk
from quantkit.personal.choices import find
from quantkit.personal.delta import Delta, base_hash
from quantkit.resilience import scale_file
from quantkit.runtime import packed_model
from quantkit.runtime.linear import PackedLinear
from quantkit.untrusted import parse_json, read_document

MERGED = "personalization.json"  # what was merged, beside the weights
FLAGS = ("attention_bias", "mlp_bias")  # of configurations; true: the linears have biases
PACKED = ("weight_scale", "qweight", "weight_packed", "weight")  # one of these is stored for each linear


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What was written: where, its size, the tensors that differ from the base's, and what somebody should know."""

    output: Path
    bytes: int
    changed: tuple[str, ...]
    notices: tuple[str, ...] = ()


@usual_settings()
def merge(
    model: str | Path,
    delta: str | Path,
    *,
    output: str | Path,
    rounded: bool = False,
    overwrite: bool = False,
) -> Merged:
    """Write the packed checkpoint `model` with what `delta` learned as a part of it.

    >>> quantkit.merge("llama-7b-w4", "mine.safetensors", output="llama-7b-mine")

    Args:
        model: the packed checkpoint that the delta was made for.
        delta: what `personalize` wrote.
        output: the directory to write, which appears whole or not at all.
        rounded: round to the model's dtype what is not exact in it instead of refusing it.
        overwrite: replace an existing one.

    Raises:
        UsageError: what was learned has no place in the checkpoint, or not exactly.
        ModelError: the delta was made for another model.
        DataError: the delta is damaged.
        OutputError: the directory exists or cannot be written.
    """
    target, source = Path(output), names.resolve(str(model)).path
    learned = Delta.read(Path(delta))
    if reason := find("parameters", learned.trainable).unmergeable:
        raise UsageError(f"{learned.trainable} cannot be merged: {reason}; use it with --delta")
    refuse_existing(target, overwrite=overwrite)
    if target.resolve() in (source, *source.parents):
        raise OutputError(f"{target} holds the checkpoint that is being read; choose another -o")
    learned.refuse_other_base(base_hash(source), source)
    checkpoint, config = Checkpoint(source), parse_json(read_document(source / "config.json"))
    config, changed = _changed(learned, checkpoint, config, rounded=rounded)
    sizes = [BYTES.get(info.dtype, 1) * info.elements for info in checkpoint.tensors.values()]
    refuse_full_disk(target, sum(sizes) + sum(4 * tensor.numel() for tensor in changed.values()))
    with Writer(target, overwrite=overwrite) as writer:
        for name, tensor in _all(checkpoint, changed, writer):
            writer.add(name, tensor)
        for path in side_files(source, but=("config.json", REPORT, CHECK, MERGED)):
            writer.copy(path)
        writer.write_text("config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        told = {"base": learned.base, "train": learned.trainable, "ledger": learned.ledger, "report": learned.report}
        writer.write_text(MERGED, json.dumps(told, indent=2, ensure_ascii=False) + "\n")
        writer.close_shards()
        writer.finish()
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    protection = scale_file.beside(source)
    notices = (f"the {protection} of {source} are not part of it; run quantkit protect on it",) if protection else ()
    return Merged(output=target, bytes=size, changed=tuple(sorted(changed)), notices=notices)


def _changed(
    learned: Delta, checkpoint: Checkpoint, config: dict[str, Any], *, rounded: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the configuration of the merged model, and the tensors that differ, by stored name."""
    loaded = packed_model.load(checkpoint.directory, device="cpu")
    learned.settle(loaded)
    if learned.trainable == "scales":
        skeleton = Skeleton(checkpoint.directory, packed=True)
        return config, {s: v for name in learned.tensors for s, v in _scale(name, loaded, skeleton, checkpoint)}
    config, skeleton = _with_flags(config, learned.tensors)
    found = dict(_values(learned.tensors, skeleton, checkpoint))
    dtype = skeleton.config.dtype or torch.float32
    unfit = sum(int((value != value.to(dtype).float()).sum()) for value in found.values())
    if unfit and not rounded:
        raise UsageError(
            f"the model is stored in {str(dtype).removeprefix('torch.')}, in which {unfit:,} of the learned values are "
            "not exact; use the delta with --delta, or round them with --round"
        )
    return config, {name: value.to(dtype) for name, value in found.items()}


def _scale(name: str, loaded: nn.Module, skeleton: Skeleton, checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Yield stored name and value of the scales of one linear."""
    linear = loaded.get_submodule(name.removesuffix(".scale"))
    assert isinstance(linear, PackedLinear)
    stored = skeleton.stored_name(f"{name.removesuffix('.scale')}.weight_scale", checkpoint)
    if stored is None:
        raise UsageError("scales are merged into checkpoints of compressed-tensors alone; use the delta with --delta")
    before, new = checkpoint.load([stored])[stored], linear.unpack().scale
    if new.to(before.dtype).float().ne(new.float()).any():
        raise UsageError(f"the scales of {name} are stored in {before.dtype}, in which the learned ones are not exact")
    yield stored, new.to(before.dtype).view_as(before)


def _values(tensors: Mapping[str, Tensor], skeleton: Skeleton, checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Yield stored name and value of biases and gains, and zeros for biases that come along with them."""
    for name, value in tensors.items():
        yield skeleton.stored_name(name, checkpoint) or _beside(name, skeleton, checkpoint), value
    for name, parameter in skeleton.model.named_parameters():
        absent = name.endswith(".bias") and name not in tensors and not skeleton.stored_name(name, checkpoint)
        if absent:
            yield _beside(name, skeleton, checkpoint), torch.zeros(parameter.shape)


def _beside(name: str, skeleton: Skeleton, checkpoint: Checkpoint) -> str:
    """Return the name under which a new bias is stored: beside its weight."""
    owner = name.removesuffix(".bias")
    for end in PACKED:
        if stored := skeleton.stored_name(f"{owner}.{end}", checkpoint):
            return f"{stored.removesuffix(end)}bias"
    raise ModelError(f"{checkpoint.directory} has no weight for {owner}; it is incomplete")


def _with_flags(config: dict[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], Skeleton]:
    """Return the configuration, changed so that the model has every tensor, and the empty model of it.

    Raises:
        UsageError: the family has no place for one.
    """
    allowed = [flag for flag in FLAGS if flag in config or hasattr(_skeleton(config).config, flag)]
    options = [{}, *({flag: True} for flag in allowed), dict.fromkeys(allowed, True)]
    for flags in options:
        made = _skeleton({**config, **flags})
        missing = set(tensors) - {name for name, _ in made.model.named_parameters(remove_duplicate=False)}
        if not missing:
            return {**config, **flags}, made
    raise UsageError(
        f"models of the type {config.get('model_type')} have no place for {min(missing)}; use the delta with --delta, "
        "or train the linears alone that may have a bias, with --set include=GLOB"
    )


def _skeleton(config: Mapping[str, Any]) -> Skeleton:
    with TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return Skeleton(Path(directory), packed=True)


def _all(checkpoint: Checkpoint, changed: Mapping[str, Tensor], writer: Writer) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the merged checkpoint; a shard holds what the base's does, the last one what is new."""
    shard = None
    for name, info in checkpoint.tensors.items():
        if info.shard != shard:
            writer.flush()
            shard = info.shard
        yield name, changed[name] if name in changed else checkpoint.load([name])[name]
    yield from ((name, tensor) for name, tensor in changed.items() if name not in checkpoint)
