"""Further formats of a packed checkpoint, made from it exactly: its codes, scales and zero points are only stored anew.

A format whose exporter is `whole` is made by that exporter at once, any other linear by linear, so that no more than a
shard of the checkpoint is in memory.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit import methods
from quantkit.ambient import usual_settings
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import QuantScheme
from quantkit.errors import ModelError, OutputError, UsageError, nearest
from quantkit.evaluation.documents import Quantization
from quantkit.evaluation.manifest import CHECK, REPORT
from quantkit.exporters.compressed_tensors import CompressedTensors
from quantkit.model.checkpoint import BYTES, Checkpoint, side_files
from quantkit.model.writer import Writer, refuse_existing, refuse_full_disk
from quantkit.resilience import scale_file
from quantkit.untrusted import parse_json, read_document

MAIN = "compressed-tensors"  # what a run writes, and what all other formats are made from
_ENDS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight")
_TRANSPOSED = "Conv1D"  # GPT-2 stores its linears so


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was made: the format, the directory that holds it, its size on disk, and what runtimes will not do."""

    format: str
    output: Path
    bytes: int
    notices: tuple[str, ...]


def further(formats: Sequence[str]) -> list[str]:
    """Return the formats that are made after the run, each once."""
    return [name for name in dict.fromkeys(formats) if name != MAIN]


def notices(formats: Sequence[str], schemes: Mapping[str, QuantScheme], classes: Sequence[str]) -> Iterator[str]:
    """Yield what runtimes will not do with the formats; schemes and classes as of `CompressedTensors.config`."""
    for name in (MAIN, *further(formats)):
        yield from _exporter(name).notices(schemes, classes)


def refuse_unfit(
    formats: Sequence[str],
    schemes: Mapping[str, QuantScheme],
    shapes: Mapping[str, tuple[int, int]],
    classes: Sequence[str],
    model: Path,
) -> None:
    """Refuse formats that cannot hold what a run will make.

    Args:
        formats: their names.
        schemes: the schemes of all linears, by any name.
        shapes: module name → shape of every quantized weight.
        classes: names of the quantized module classes.
        model: the original model.

    Raises:
        UsageError, ModelError: the first that cannot, and why.
    """
    for name in (MAIN, *further(formats)):
        exporter = _exporter(name)
        exporter.check(schemes)
        if name == MAIN:
            continue
        _refuse_transposed(name, classes)
        if _is_whole(exporter):
            exporter.check_shapes(shapes)
            exporter.check_model(model)
            continue
        scheme = next(iter(schemes.values()))
        for linear, shape in shapes.items():
            try:
                exporter.layout(shape, scheme, "F16")
            except UsageError as error:
                raise UsageError(f"{linear}: {error}") from None


@usual_settings()
def export(
    output: str | Path,
    *,
    format: str,
    to: str | Path | None = None,
    overwrite: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Exported:
    """Write what `quantize` wrote in another format, exactly and without calibrating again.

    >>> quantkit.export("llama-7b-w4", format="gptq").output
    PosixPath('llama-7b-w4/gptq')

    Args:
        output: the directory that `quantize` wrote.
        format: `gptq`, `awq` or `gguf`.
        to: the directory to write, which appears whole or not at all; None: `output`/`format`.
        overwrite: replace an existing one.
        options: of the format, such as {"version": 1} of GPTQ.

    Raises:
        UsageError: an unknown format or option, or a format that cannot hold it.
        ModelError: `output` is no packed checkpoint of quantkit, or damaged.
        OutputError: the directory exists, holds `output`, or cannot be written.
    """
    exporter, source = _exporter(format, options), Path(output)
    target = source / format if to is None else Path(to)
    if format == MAIN:
        raise UsageError(f"{source} is {MAIN} already; name another format: {', '.join(_others())}")
    quantization = _quantization(source)
    exporter.check(quantization.schemes)
    _refuse_transposed(format, tuple(quantization.schemes))
    refuse_existing(target, overwrite=overwrite)
    if target.resolve() in (source.resolve(), *source.resolve().parents):
        raise OutputError(f"{target} holds the checkpoint that is being read; choose another -o")
    checkpoint = Checkpoint(source)
    refuse_full_disk(target, sum(BYTES.get(info.dtype, 1) * info.elements for info in checkpoint.tensors.values()))
    with Writer(target, overwrite=overwrite) as writer:
        if _is_whole(exporter):
            exporter.export(source, writer.directory)
        else:
            _write(checkpoint, quantization, exporter, writer)
        writer.finish()
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    told = [*exporter.notices(quantization.schemes, ("Linear",))]
    if protection := scale_file.beside(source):
        told.append(f"the {protection} of {source} are not part of it: it runs without them")
    return Exported(format=format, output=target, bytes=size, notices=tuple(told))


def _write(checkpoint: Checkpoint, quantization: Quantization, exporter: Any, writer: Writer) -> None:  # noqa: ANN401
    """Write everything of the new checkpoint; its shards hold what the old one's do."""
    source, shard = checkpoint.directory, None
    linears = {name.removesuffix(".weight_scale") for name in checkpoint if name.endswith(".weight_scale")}
    for name, info in checkpoint.tensors.items():
        if info.shard != shard:
            writer.flush()
            shard = info.shard
        linear, _, end = name.rpartition(".")
        if linear not in linears or end not in _ENDS:
            writer.add(name, checkpoint.load([name])[name])
        elif end == "weight_scale":  # each linear has one
            weight = _linear(checkpoint, linear, quantization)
            try:
                tensors = exporter.encode(weight)
            except UsageError as error:
                raise UsageError(f"{linear}: {error}") from None
            for own, tensor in tensors.items():
                writer.add(f"{linear}.{own}", tensor)
    for path in side_files(source, but=("config.json", REPORT, CHECK)):
        writer.copy(path)
    config = parse_json(read_document(source / "config.json"))
    config["quantization_config"] = exporter.config(quantization.schemes, ("Linear",), quantization.ignore)
    writer.write_text("config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    writer.close_shards()


def _linear(checkpoint: Checkpoint, name: str, quantization: Quantization) -> QuantizedTensor:
    scheme = quantization.scheme_of(name)
    if scheme is None:
        raise ModelError(f"config.json in {checkpoint.directory} gives {name} no scheme; the checkpoint is damaged")
    stored = {end: f"{name}.{end}" for end in _ENDS if f"{name}.{end}" in checkpoint}
    tensors = checkpoint.load(stored.values())
    try:
        weight = CompressedTensors().decode({end: tensors[stored[end]] for end in stored}, scheme)
    except ModelError as error:
        raise ModelError(f"{name} in {checkpoint.directory} cannot be unpacked as {scheme}: {error}") from error
    if not bool(torch.isfinite(weight.scale).all()):
        raise ModelError(f"{name} in {checkpoint.directory} has scales that are not finite; the checkpoint is damaged")
    return weight


def _quantization(source: Path) -> Quantization:
    try:
        return Quantization.parse(read_document(source / "config.json"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
        raise ModelError(
            f"{source} is no packed checkpoint that quantkit wrote; give the directory of a `quantkit quantize`"
        ) from error


def _exporter(name: str, options: Mapping[str, Any] | None = None) -> Any:  # noqa: ANN401  see CONTRIBUTING, "A format"
    """Return the exporter of a format, made with its options.

    Raises:
        UsageError: an unknown format, or an option that it does not have.
    """
    kind = methods.find("exporters", name)
    known = [field.name for field in fields(kind)] if is_dataclass(kind) else []
    for option in options or {}:
        if option not in known:
            raise UsageError(f"the format {name} has no option {option!r}{nearest(option, known) if known else ''}")
    return kind(**(options or {}))


def _is_whole(exporter: Any) -> bool:  # noqa: ANN401
    return bool(getattr(exporter, "whole", False))


def _others() -> list[str]:
    return further(methods.names("exporters"))


def _refuse_transposed(name: str, classes: Sequence[str]) -> None:
    if _TRANSPOSED in classes:
        raise UsageError(
            f"the linears of this model are stored transposed, with groups along the output features, which {name} "
            f"cannot hold; only {MAIN} can"
        )
