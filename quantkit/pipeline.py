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
from quantkit.calibrate.engine import CheckSample, Engine
from quantkit.calibrate.memory import release_freed
from quantkit.calibrate.self_text import sample_tokens
from quantkit.calibrate.sensitivity import SHRINK, Sensitivity
from quantkit.calibrate.text import SELF, read_text
from quantkit.calibrate.walk import BlockReport, Listener
from quantkit.conversion import export, further, refuse_unfit
from quantkit.errors import DataError, OutputError, UsageError
from quantkit.evaluation.loading import load_model
from quantkit.evaluation.manifest import CHECK, RECIPE, REPORT, check_document, tensor_manifest
from quantkit.exporters.compressed_tensors import CompressedTensors
from quantkit.model import names
from quantkit.model.block import Block
from quantkit.model.checkpoint import SAFETENSORS_DTYPES, TORCH_DTYPES, Checkpoint, side_files
from quantkit.model.device import pick_device
from quantkit.model.names import Source
from quantkit.model.rotation import Rotation
from quantkit.model.skeleton import Skeleton
from quantkit.model.writer import Writer, refuse_existing, refuse_full_disk
from quantkit.planning import Plan, make_plan
from quantkit.recipe import Recipe
from quantkit.shares import allocated, refuse_too_large, with_samples
from quantkit.sparsities import pruned_facts, pruner_of
from quantkit.workload import writing_batch

_WRITTEN = {"config.json", RECIPE, REPORT, CHECK}
_PACKAGES = ("quantkit", "torch", "transformers", "safetensors", "compressed-tensors")


class Progress(Listener, Protocol):
    """Who wants to follow a run."""

    def stage(self, name: str) -> None:
        """A stage begins.

        'reading text' or 'writing text', 'downloading' or 'opening weights', 'verifying weights', 'measuring',
        'calibrating', 'distilling', 'writing', 'exporting' and the format.
        """

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
    """A run that nothing speaks against: recipe, source, skeleton, plan, and the rotation if there is one."""

    recipe: Recipe
    source: Source
    skeleton: Skeleton
    plan: Plan
    rotation: Rotation | None = None


def prepare(recipe: Recipe, device: str | None = None) -> Prepared:
    """Look at the model without its weights and refuse what cannot work.

    Raises:
        UsageError, ModelError, NetworkError: see `names.resolve`, `Skeleton`, `make_plan`, `conversion.refuse_unfit`.
    """
    recipe.build_passes()
    source = names.resolve(recipe.model, revision=recipe.revision, weights=False)
    recipe = replace(recipe, revision=source.revision)
    skeleton = Skeleton(source.path)
    plan = make_plan(skeleton, recipe, pick_device(device))
    _refuse_formats(recipe, source, plan)
    refuse_too_large(plan, recipe)
    rotation = Rotation.of(skeleton, recipe.seed) if recipe.rotate else None
    return Prepared(recipe=recipe, source=source, skeleton=skeleton, plan=plan, rotation=rotation)


def execute(
    prepared: Prepared, output: Path, *, overwrite: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Quantize and write `output`, then its further formats into directories of their names; return the report.

    Raises:
        UsageError: it would need more memory than is free.
        OutputError: `output` exists, would replace its own source, or the disk is too small or full.
        DataError, NetworkError: the calibration text cannot be had.
        ModelError: the weights are damaged.
    """
    progress = progress or Silent()
    started = time.monotonic()
    _refuse_what_cannot_work(prepared, output, overwrite=overwrite)
    progress.planned(prepared.plan)
    tokens = _tokens(prepared, progress)
    progress.stage("downloading" if prepared.source.id else "opening weights")
    source = names.resolve(prepared.recipe.model, revision=prepared.recipe.revision)
    checkpoint = Checkpoint(source.path)
    progress.stage("verifying weights")
    for _ in checkpoint.verify_finite():
        pass
    prepared = _share(_spend(prepared, checkpoint, tokens, progress), checkpoint, tokens, progress)
    progress.stage("calibrating")
    with Writer(output, overwrite=overwrite) as writer:
        sink = _Sink(prepared, checkpoint, writer)
        dropped = _tied_duplicate(prepared.skeleton, checkpoint)
        batches, whole = tokens.split(prepared.recipe.calibration.batch_size), dict[str, Any]()
        engine = with_samples(_engine(prepared, checkpoint), prepared.recipe, batches)
        reports, sample = engine.run(batches, sink.emit, progress, whole)
        progress.stage("writing")
        with engine.outer_weights() as changed:
            sink.emit_outer(changed)
        sink.copy_rest(dropped)
        hashes = writer.close_shards()
        report = _report(prepared, reports, tokens, sink, hashes, time.monotonic() - started) | {"whole": whole}
        _write_side_files(prepared, writer, report, sample)
        writer.finish()
    _export(prepared.recipe, output, progress)
    return report


def _export(recipe: Recipe, output: Path, progress: Progress) -> None:
    """Write the further formats of a finished output."""
    for name in further(recipe.formats):
        progress.stage(f"exporting {name}")
        export(output, format=name)


def _refuse_formats(recipe: Recipe, source: Source, plan: Plan) -> None:
    if not plan.rounds:
        return
    schemes = {str(each): each for each in plan.budget.schemes} if plan.budget else plan.schemes
    refuse_unfit(recipe.formats, schemes, plan.shapes, plan.classes, source.path)


def _refuse_what_cannot_work(prepared: Prepared, output: Path, *, overwrite: bool) -> None:
    refuse_existing(output, overwrite=overwrite)
    _refuse_source(output, prepared.source.path)
    # other formats of the same codes have about the same size
    refuse_full_disk(output, prepared.plan.output_bytes * (1 + len(further(prepared.recipe.formats))))
    if prepared.plan.refusal:
        raise UsageError(prepared.plan.refusal)


def _spend(prepared: Prepared, checkpoint: Checkpoint, tokens: Tensor, progress: Progress) -> Prepared:
    """Return the run with its budget of bits, if it has one, spent by measured losses."""
    plan = prepared.plan
    if not plan.budget:
        return prepared
    progress.stage("measuring")
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


def _share(prepared: Prepared, checkpoint: Checkpoint, tokens: Tensor, progress: Progress) -> Prepared:
    """Return the run with the share that each linear loses, where the pass that prunes does not say the same of all."""
    step = pruner_of(prepared.recipe.build_passes())
    if step is None or step.allocation == "uniform":
        return prepared
    progress.stage("measuring")
    found = allocated(step.allocation, _engine(prepared, checkpoint), tokens, progress.progress)
    return replace(prepared, plan=replace(prepared.plan, sparsity=found))


def _engine(prepared: Prepared, checkpoint: Checkpoint) -> Engine:
    return Engine(
        skeleton=prepared.skeleton,
        checkpoint=checkpoint,
        passes=list(prepared.recipe.build_passes().values()),
        schemes=prepared.plan.schemes,
        scale_dtype=prepared.plan.scale_dtype,
        device=prepared.plan.device,
        seed=prepared.recipe.seed,
        sparsity=prepared.plan.sparsity,
        rotation=prepared.rotation,
    )


class _Sink:
    """Encodes finished blocks into the writer, then copies everything that no block replaced."""

    def __init__(self, prepared: Prepared, checkpoint: Checkpoint, writer: Writer) -> None:
        self.prepared, self.checkpoint, self.writer = prepared, checkpoint, writer
        self.replaced: set[str] = set()
        self.written: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.zeros: dict[str, int] = {}  # of what was pruned

    def emit(self, block: Block) -> None:
        """Write the tensors that were made of a block under the names that the source gave them."""
        exporter, skeleton = CompressedTensors(), self.prepared.skeleton
        self.zeros |= {site.name: int((~site.mask).sum()) for site in block.sites if site.mask is not None}
        for site in block.sites if self.prepared.plan.rounds else ():
            stored = skeleton.stored_name(site.parameter, self.checkpoint)
            assert stored is not None, f"{site.name} was loaded but is not in the checkpoint"
            assert site.quantized is not None, f"{site.name} was not rounded"
            self.replaced.add(stored)
            prefix = stored.removesuffix("weight")
            scale = "BF16" if site.scale_dtype == torch.bfloat16 else "F16"
            rows, columns = site.quantized.codes.shape
            for end, entry in exporter.layout((rows, columns), site.scheme, scale).items():
                self.written[prefix + end] = entry
            for end, tensor in exporter.encode(site.quantized).items():
                self.writer.add(prefix + end, tensor)
        for name in sorted(block.changed):
            stored = skeleton.stored_name(f"{block.name}.{name}", self.checkpoint)
            assert stored is not None, f"{name} was loaded but is not in the checkpoint"
            info = self.checkpoint.tensors[stored]
            self.replaced.add(stored)
            self.written[stored] = (info.dtype, info.shape)
            self.writer.add(stored, block.module.get_parameter(name).to(TORCH_DTYPES[info.dtype]))
        self.writer.flush()

    def emit_outer(self, changed: Mapping[str, Tensor]) -> None:
        """Write parameters from outside the blocks; a head that was tied gets a tensor of its own."""
        for name, tensor in changed.items():
            stored = self.prepared.skeleton.stored_name(name, self.checkpoint) or name
            self.replaced.add(stored)
            self.written[stored] = (SAFETENSORS_DTYPES[tensor.dtype], tuple(tensor.shape))
            self.writer.add(stored, tensor)

    def copy_rest(self, dropped: str | None) -> None:
        """Copy every other tensor of the source but `dropped`, known to the model or not, byte for byte."""
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


def _tokens(prepared: Prepared, progress: Progress) -> Tensor:
    """Return the calibration tokens, as many as asked for unless fewer are allowed."""
    wanted, seqlen = prepared.recipe.calibration, prepared.plan.seqlen
    if wanted.text == SELF:
        return _own_text(prepared, progress)
    progress.stage("reading text")
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


def _own_text(prepared: Prepared, progress: Progress) -> Tensor:
    """Return calibration tokens that the model writes; the whole model is in memory meanwhile."""
    recipe, plan = prepared.recipe, prepared.plan
    progress.stage("writing text")
    model, tokenizer = load_model(recipe.model, revision=recipe.revision, device=str(plan.device))
    tokens = sample_tokens(
        model,
        tokenizer,
        samples=recipe.calibration.samples,
        seqlen=plan.seqlen,
        seed=recipe.seed,
        at_once=writing_batch(prepared.skeleton, plan.seqlen),
        progress=progress.progress,
    )
    del model
    release_freed()
    return tokens


def _write_side_files(prepared: Prepared, writer: Writer, report: Mapping[str, Any], sample: CheckSample) -> None:
    for path in side_files(prepared.source.path, but=_WRITTEN):
        writer.copy(path)
    config = json.loads((prepared.source.path / "config.json").read_text(encoding="utf-8"))
    plan = prepared.plan
    if prepared.rotation:  # said even where it is the family's default
        config["tie_word_embeddings"] = False
    if plan.rounds:
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
        "method": " + ".join(recipe.passes),
        "formats": further(recipe.formats),
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
        **(
            {"sparsity": pruned_facts(plan.shapes, plan.sparsity, sink.zeros, sink.writer.directory)}
            if plan.sparsity
            else {}
        ),
        "sites": list(plan.schemes) if plan.rounds else [],
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


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
