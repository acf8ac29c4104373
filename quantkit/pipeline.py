"""One run from a recipe to a directory: everything is refused in `prepare`, everything is computed in `execute`."""

import json
import platform
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from quantkit.calibrate.data import calibration_tokens, load_tokenizer
from quantkit.calibrate.engine import BlockReport, CheckSample, Engine, Listener
from quantkit.calibrate.passes import Window
from quantkit.calibrate.sensitivity import SHRINK, Sensitivity
from quantkit.calibrate.text import read_text
from quantkit.errors import DataError, OutputError
from quantkit.evaluation.manifest import CHECK, RECIPE, REPORT, check_document, tensor_manifest
from quantkit.exporters.compressed_tensors import CompressedTensors
from quantkit.model import names
from quantkit.model.checkpoint import INDEX, Checkpoint
from quantkit.model.device import pick_device
from quantkit.model.names import Source
from quantkit.model.skeleton import Skeleton
from quantkit.model.writer import Writer, refuse_existing, refuse_full_disk
from quantkit.planning import Plan, make_plan
from quantkit.recipe import Recipe

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack")
_WRITTEN = {"config.json", INDEX, RECIPE, REPORT, CHECK}
_PACKAGES = ("quantkit", "torch", "transformers", "safetensors", "compressed-tensors")


class Progress(Listener, Protocol):
    """Who wants to follow a run."""

    def stage(self, name: str) -> None:
        """A stage begins: 'reading text', 'downloading', 'verifying weights', 'measuring', 'calibrating', 'writing'."""

    def planned(self, plan: Plan) -> None:
        """The plan stands; nothing has been computed yet."""


class Silent:
    """A Progress that shows nothing."""

    def stage(self, name: str) -> None:
        """Ignore."""

    def planned(self, plan: Plan) -> None:
        """Ignore."""

    def progress(self, done: float, total: int) -> None:
        """Ignore."""

    def block(self, report: BlockReport) -> None:
        """Ignore."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that nothing speaks against: recipe, source, skeleton, plan."""

    recipe: Recipe
    source: Source
    skeleton: Skeleton
    plan: Plan


def prepare(recipe: Recipe, device: str | None = None) -> Prepared:
    """Look at the model without its weights and refuse what cannot work.

    Raises:
        UsageError, ModelError, NetworkError: see `names.resolve`, `Skeleton`, `make_plan`.
    """
    recipe.build_passes()
    source = names.resolve(recipe.model, revision=recipe.revision, weights=False)
    recipe = replace(recipe, revision=source.revision)
    skeleton = Skeleton(source.path)
    plan = make_plan(skeleton, recipe, pick_device(device))
    CompressedTensors().check(plan.schemes)
    return Prepared(recipe=recipe, source=source, skeleton=skeleton, plan=plan)


def execute(
    prepared: Prepared, output: Path, *, overwrite: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Quantize and write `output`; return the report.

    Raises:
        OutputError: `output` exists, would replace its own source, or the disk is too small or full.
        DataError, NetworkError: the calibration text cannot be had.
        ModelError: the weights are damaged.
    """
    progress = progress or Silent()
    started = time.monotonic()
    refuse_existing(output, overwrite=overwrite)
    _refuse_source(output, prepared.source.path)
    refuse_full_disk(output, prepared.plan.output_bytes)
    progress.planned(prepared.plan)
    progress.stage("reading text")
    tokens = _tokens(prepared)
    progress.stage("downloading" if prepared.source.id else "opening weights")
    source = names.resolve(prepared.recipe.model, revision=prepared.recipe.revision)
    checkpoint = Checkpoint(source.path)
    progress.stage("verifying weights")
    for _ in checkpoint.verify_finite():
        pass
    if prepared.plan.budget:
        progress.stage("measuring")
        prepared = _spend(prepared, checkpoint, tokens, progress)
    progress.stage("calibrating")
    with Writer(output, overwrite=overwrite) as writer:
        sink = _Sink(prepared, checkpoint, writer)
        reports, sample = _engine(prepared, checkpoint).run(
            tokens.split(prepared.recipe.calibration.batch_size), sink.emit, progress
        )
        progress.stage("writing")
        sink.copy_rest()
        hashes = writer.close_shards()
        report = _report(prepared, reports, tokens, sink, hashes, time.monotonic() - started)
        _write_side_files(prepared, writer, report, sample)
        writer.finish()
    return report


def _spend(prepared: Prepared, checkpoint: Checkpoint, tokens: Tensor, progress: Progress) -> Prepared:
    """Return the run with its budget of bits spent by measured losses."""
    plan = prepared.plan
    assert plan.budget is not None
    learns = any(step.learns for step in prepared.recipe.build_passes().values())
    losses = Sensitivity(
        skeleton=prepared.skeleton,
        checkpoint=checkpoint,
        ties=plan.budget.ties,
        schemes=plan.budget.schemes,
        shrink=SHRINK if learns else (1.0,),  # what does not learn does not clip either
        scale_dtype=plan.scale_dtype,
        device=plan.device,
    ).run(tokens, progress.progress)
    spent = plan.spend(losses)
    CompressedTensors().check(spent.schemes)
    return replace(prepared, plan=spent)


def _engine(prepared: Prepared, checkpoint: Checkpoint) -> Engine:
    return Engine(
        skeleton=prepared.skeleton,
        checkpoint=checkpoint,
        passes=list(prepared.recipe.build_passes().values()),
        schemes=prepared.plan.schemes,
        scale_dtype=prepared.plan.scale_dtype,
        device=prepared.plan.device,
    )


class _Sink:
    """Encodes finished windows into the writer, then copies everything that no window replaced."""

    def __init__(self, prepared: Prepared, checkpoint: Checkpoint, writer: Writer) -> None:
        self.prepared, self.checkpoint, self.writer = prepared, checkpoint, writer
        self.replaced: set[str] = set()
        self.written: dict[str, tuple[str, tuple[int, ...]]] = {}

    def emit(self, window: Window) -> None:
        """Write the packed tensors of a window under the names that the source gave its weights."""
        exporter, skeleton = CompressedTensors(), self.prepared.skeleton
        for site in window.sites:
            stored = skeleton.stored_name(f"{site.name}.weight", self.checkpoint)
            assert stored is not None, f"{site.name} was loaded but is not in the checkpoint"
            assert site.quantized is not None, f"{site.name} was not rounded"
            self.replaced.add(stored)
            prefix = stored.removesuffix("weight")
            scale = "BF16" if site.scale_dtype == torch.bfloat16 else "F16"
            rows, columns = site.weight.shape
            for end, entry in exporter.layout((rows, columns), site.scheme, scale).items():
                self.written[prefix + end] = entry
            for end, tensor in exporter.encode(site.quantized).items():
                self.writer.add(prefix + end, tensor)
        self.writer.flush()

    def copy_rest(self) -> None:
        """Copy every other tensor of the source, known to the model or not, byte for byte."""
        dropped = _tied_duplicate(self.prepared.skeleton, self.checkpoint)
        for name, info in self.checkpoint.tensors.items():
            if name not in self.replaced and name != dropped:
                self.writer.add(name, self.checkpoint.load([name])[name])
                self.written[name] = (info.dtype, info.shape)


def _tied_duplicate(skeleton: Skeleton, checkpoint: Checkpoint) -> str | None:
    """Return the stored name of a head that repeats tied embeddings, which loaders then need not reconcile."""
    head, embedding = skeleton.model.get_output_embeddings(), skeleton.model.get_input_embeddings()
    if not skeleton.config.get_text_config().tie_word_embeddings or head is None:
        return None
    of = {id(module): name for name, module in skeleton.model.named_modules()}
    stored = [skeleton.stored_name(f"{of[id(module)]}.weight", checkpoint) for module in (head, embedding)]
    if None in stored or stored[0] == stored[1]:
        return None
    pair = [checkpoint.load([name])[name] for name in stored if name]
    return stored[0] if torch.equal(*pair) else None


def _tokens(prepared: Prepared) -> Tensor:
    """Return the calibration tokens, as many as asked for unless fewer are allowed."""
    wanted, seqlen = prepared.recipe.calibration, prepared.plan.seqlen
    tokenizer = load_tokenizer(prepared.source.path)
    tokens = calibration_tokens(
        read_text(wanted.text), tokenizer, samples=wanted.samples, seqlen=seqlen, seed=prepared.recipe.seed
    )
    if not len(tokens) or (len(tokens) < wanted.samples and not wanted.allow_short):
        way = "lower --seqlen" if not len(tokens) else f"pass --samples {len(tokens)} or --allow-short"
        raise DataError(
            f"{wanted.text} gives {len(tokens)} sequences of {seqlen} tokens, not {wanted.samples}; "
            f"{way}, or give more text"
        )
    vocabulary = prepared.skeleton.config.get_text_config().vocab_size
    if int(tokens.max()) >= vocabulary:
        raise DataError(
            f"the tokenizer gives token {int(tokens.max())} but the model's vocabulary ends at {vocabulary - 1}"
        )
    return tokens


def _write_side_files(prepared: Prepared, writer: Writer, report: Mapping[str, Any], sample: CheckSample) -> None:
    for path in sorted(prepared.source.path.iterdir()):
        if path.name.startswith(".") or path.suffix in _WEIGHTS or path.name in _WRITTEN:
            continue
        if path.name.endswith(".index.json") or (path.is_dir() and _holds_weights(path)):
            continue
        writer.copy(path)
    config = json.loads((prepared.source.path / "config.json").read_text(encoding="utf-8"))
    plan = prepared.plan
    config["quantization_config"] = CompressedTensors().config(plan.schemes, plan.classes, plan.dense)
    writer.write_text("config.json", _json(config))
    writer.write_text(RECIPE, prepared.recipe.to_toml())
    writer.write_text(REPORT, _json(report))
    writer.write_text(CHECK, json.dumps(check_document(sample.tokens, sample.logits)) + "\n")


def _report(
    prepared: Prepared,
    blocks: Sequence[BlockReport],
    tokens: Tensor,
    sink: _Sink,
    hashes: Mapping[str, str],
    seconds: float,
) -> dict[str, Any]:
    plan, recipe = prepared.plan, prepared.recipe
    return {
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "source": {"model": recipe.model, "id": prepared.source.id, "revision": prepared.source.revision},
        "scheme": plan.scheme,
        "method": list(recipe.passes)[-1],
        "notes": list(plan.notes),
        "seed": recipe.seed,
        "device": str(plan.device),
        "calibration": {"text": recipe.calibration.text, "samples": len(tokens), "seqlen": plan.seqlen},
        "parameters": plan.parameters,
        "quantized_parameters": plan.quantized_parameters,
        "bits_per_weight": plan.bits_per_weight,
        "predicted": {
            "output_bytes": plan.output_bytes,
            "memory_bytes": plan.memory_bytes,
            "device_bytes": plan.device_bytes,
            "seconds": plan.seconds,
        },
        "measured": {
            "output_bytes": sink.writer.bytes,
            "memory_bytes": peak_memory(),
            "device_bytes": torch.cuda.max_memory_allocated(plan.device) if plan.device.type == "cuda" else 0,
            "seconds": seconds,
        },
        "blocks": [asdict(block) for block in blocks],
        **({"allocation": plan.allocation.facts()} if plan.allocation else {}),
        "sites": list(plan.schemes),
        "tensors": tensor_manifest(sink.written),
        "sha256": dict(hashes),
    }


def peak_memory() -> int:
    """Return the peak resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _refuse_source(output: Path, source: Path) -> None:
    target, model = output.resolve(), source.resolve()
    if target == model or target in model.parents:
        raise OutputError(f"{output} holds the model that is being read; choose another -o")
    if model in target.parents:
        raise OutputError(f"{output} lies inside the model that is being read; choose another -o")


def _holds_weights(directory: Path) -> bool:
    return any(path.suffix in _WEIGHTS for path in directory.rglob("*"))


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
