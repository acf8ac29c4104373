"""One run from a recipe to a directory: everything is refused in `prepare`, everything is computed in `execute`."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from quantkit import material
from quantkit.calibrate.engine import CheckSample, Engine
from quantkit.calibrate.journal import Journal
from quantkit.calibrate.streams import Streams
from quantkit.calibrate.walk import BlockReport, Listener
from quantkit.conversion import export, further
from quantkit.errors import OutputError
from quantkit.evaluation.manifest import RECIPE, REPORT, tensor_manifest
from quantkit.host import peak_memory
from quantkit.keeping import Keeper, Shared
from quantkit.model.workspace import Workspace, clear_disk_errors
from quantkit.model.writer import Shards, Writer
from quantkit.output import Sink, as_json, write_side_files
from quantkit.planning import Plan
from quantkit.preparation import Prepared, identity, prepare, refuse_what_cannot_work
from quantkit.protection import NOTICE, SAMPLES, add_bounds
from quantkit.provenance import Timed, machine, tokens_sha256, versions
from quantkit.shares import with_samples
from quantkit.sparsities import pruned_facts

__all__ = ["Prepared", "Progress", "Silent", "execute", "peak_memory", "prepare"]


class Progress(Listener, Protocol):
    """Who wants to follow a run."""

    def stage(self, name: str) -> None:
        """A stage begins.

        'reading text' or 'writing text', 'downloading' or 'opening weights', 'verifying weights', 'measuring',
        'catching up' with an interrupted run, 'calibrating', 'distilling', 'writing', 'exporting' and the format.
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


def execute(
    prepared: Prepared,
    output: Path,
    *,
    overwrite: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Quantize and write `output`, with further formats in directories of their names in it; return the report.

    What is finished is kept in a hidden directory beside `output`, and the same recipe goes on there after whatever
    ended this process. The output is then the same to the last byte, but for the times in report.json.

    Of several processes the first does that; the others compute their share and return nothing.

    Args:
        prepared: the run.
        output: the directory to write, which appears whole or not at all.
        overwrite: replace an existing one, which is kept until the new one is whole.
        restart: forget what an interrupted run left, instead of going on behind it.
        progress: told what happens.
        stop: asked after each finished block whether to stop there.

    Raises:
        UsageError: it would need more memory than is free, or an interrupted run had another recipe.
        OutputError: `output` exists, is being written, would replace its own source, or the disk is too small or full.
        DataError, NetworkError: the calibration text cannot be had.
        ModelError: the weights are damaged, or not those that the interrupted run had.
        Stopped: `stop` returned true.
    """
    progress = progress or Silent()
    refuse_what_cannot_work(prepared, output, overwrite=overwrite)
    if not prepared.team.leads:
        return _follow(prepared, output)
    with Workspace(output) as place:
        if prepared.team.say(place.finished and not restart):
            return _finished(prepared, place)
        journal = Journal(place.run, identity(prepared), restart=restart)
        try:
            return _run(prepared, place, journal, progress, stop, overwrite=overwrite)
        except BaseException as error:
            if journal.begun and "--restart" not in str(error):  # which says that it cannot go on
                done = f", behind block {journal.finished - 1}" if journal.finished else ""
                error.add_note(f"the same command goes on{done}")
            raise


def _run(
    prepared: Prepared,
    place: Workspace,
    journal: Journal,
    progress: Progress,
    stop: Callable[[], bool],
    *,
    overwrite: bool,
) -> dict[str, Any]:
    """Do the run in its workspace, from where the journal ends."""
    progress.planned(prepared.plan)
    watch = Timed(progress)
    tokens = material.calibration(prepared, journal, watch)
    checkpoint, digests = material.weights(prepared, journal, watch)
    prepared = material.spend(prepared, checkpoint, tokens, journal, watch)
    prepared = material.share(prepared, checkpoint, tokens, journal, watch)
    watch.stage("calibrating")
    staged = any(not step.blocks_at_once for step in prepared.recipe.build_passes().values())
    with Writer(place.output, overwrite=overwrite, place=place, keep=_shards(journal, staged=staged)) as writer:
        sink = Sink(prepared.skeleton, checkpoint, writer.shards, rounds=prepared.plan.rounds)
        keeper = Keeper(
            journal,
            Sink(prepared.skeleton, checkpoint, _staging(place, journal)) if staged else sink,
            lambda: _keep_first(journal, tokens, digests),
            staged=staged,
            machine=machine(prepared.plan.device),
            watch=watch,
            stop=stop,
        )
        engine = material.engine(prepared, checkpoint, Streams(prepared.plan.stream_bytes, place.directory))
        result = keeper.result(sink)
        prepared.team.say(result is not None)
        reports, sample, whole = result or _calibrate(engine, tokens, prepared, sink, keeper, watch)
        watch.stage("writing")
        with engine.outer_weights() as changed:
            sink.emit_outer(changed)
        sink.copy_rest()
        hashes = writer.close_shards()
        write_side_files(writer, prepared.source.path, prepared.recipe, prepared.plan, prepared.rotation, sample)
        report = _report(prepared, reports, tokens, sink, hashes, keeper)
        report |= {"whole": whole, "source_sha256": digests, "measured": _measured(place, sink, engine, keeper)}
        writer.write_text(REPORT, as_json(report))
        _add_to_output(prepared, writer, report, tokens, watch)
        writer.finish()
    return report


def _add_to_output(prepared: Prepared, writer: Writer, report: dict[str, Any], tokens: Tensor, watch: Timed) -> None:
    """Make what is made of the whole packed checkpoint: bounds, further formats."""
    if prepared.recipe.resilience:
        watch.stage("bounding activations")
        device, choice = str(prepared.plan.device), prepared.recipe.resilience
        report["resilience"] = add_bounds(writer.directory, choice, tokens[:SAMPLES], device=device)
        report["notes"].append(NOTICE)
        writer.write_text(REPORT, as_json(report))
    for name in further(prepared.recipe.formats):
        watch.stage(f"exporting {name}")
        export(writer.directory, format=name)


def _follow(prepared: Prepared, output: Path) -> dict[str, Any]:
    """Compute this process's share of a run that another one writes."""
    team = prepared.team
    if team.say(None):  # it is finished
        return {}
    tokens = material.calibration(prepared, None, Silent())
    checkpoint, _ = material.weights(prepared, None, Silent())
    prepared = material.spend(prepared, checkpoint, tokens, None, Silent())
    prepared = material.share(prepared, checkpoint, tokens, None, Silent())
    if not team.say(None):  # only the writing is left
        beside = output.resolve().parent
        engine = material.engine(
            prepared, checkpoint, Streams(prepared.plan.stream_bytes, beside if beside.exists() else None)
        )
        engine = with_samples(engine, prepared.recipe, tokens)
        engine.run(_batches(prepared, tokens), lambda block: None, Silent(), None, Shared(team))  # noqa: ARG005
    return {}


def _batches(prepared: Prepared, tokens: Tensor) -> list[Tensor]:
    """Return this process's rows of every batch."""
    return [prepared.team.rows(batch) for batch in tokens.split(prepared.recipe.calibration.batch_size)]


def _calibrate(
    engine: Engine, tokens: Tensor, prepared: Prepared, sink: Sink, keeper: Keeper, watch: Timed
) -> tuple[list[BlockReport], CheckSample, dict[str, Any]]:
    """Walk over the blocks; return their reports, the check sample, and what passes over the whole model noted."""
    whole = dict[str, Any]()
    engine = with_samples(engine, prepared.recipe, tokens)
    reports, sample = engine.run(_batches(prepared, tokens), sink.emit, watch, whole, Shared(prepared.team, keeper))
    keeper.note_result(sample, whole, sink)
    return reports, sample, whole


def _finished(prepared: Prepared, place: Workspace) -> dict[str, Any]:
    """Return the report of an output that a process left in its place, and sweep up behind that process."""
    if (place.output / RECIPE).read_text(encoding="utf-8") != prepared.recipe.to_toml():
        raise OutputError(f"{place.output} exists; choose another -o, or replace it with --overwrite --restart")
    place.remove()
    report: dict[str, Any] = json.loads((place.output / REPORT).read_text(encoding="utf-8"))
    return report


def _shards(journal: Journal, *, staged: bool) -> int:
    """Return how many shards of the output an earlier process finished."""
    result = journal.recall("result")
    if result is not None:
        return int(result["shards"])
    return 0 if staged or not journal.finished else int(journal.block(journal.finished - 1)["shards"])


def _staging(place: Workspace, journal: Journal) -> Shards:
    """Return where finished blocks wait for passes over the whole model."""
    with clear_disk_errors(place.output):
        place.blocks.mkdir(exist_ok=True)
    shards = Shards(place.blocks, place.output)
    shards.keep(int(journal.block(journal.finished - 1)["shards"]) if journal.finished else 0)
    return shards


def _keep_first(journal: Journal, tokens: Tensor, hashes: Mapping[str, str]) -> None:
    """Keep what the blocks depend on, when the first of them is finished."""
    journal.note("source", dict(hashes))
    if journal.recall("tokens") is None:
        journal.note("tokens", {}, {"tokens": tokens})


def _report(
    prepared: Prepared,
    blocks: Sequence[BlockReport],
    tokens: Tensor,
    sink: Sink,
    hashes: Mapping[str, str],
    keeper: Keeper,
) -> dict[str, Any]:
    plan, recipe = prepared.plan, prepared.recipe
    return {
        "versions": versions(),
        "machine": machine(plan.device),
        "source": {"model": recipe.model, "id": prepared.source.id, "revision": prepared.source.revision},
        "scheme": plan.scheme,
        "method": " + ".join(recipe.passes),
        "formats": further(recipe.formats),
        "notes": list(plan.notes),
        "seed": recipe.seed,
        "device": str(plan.device),
        "calibration": {
            "text": recipe.calibration.text,
            "samples": len(tokens),
            "seqlen": plan.seqlen,
            "sha256": tokens_sha256(tokens),
        },
        "parameters": plan.parameters,
        "quantized_parameters": plan.quantized_parameters,
        "bits_per_weight": plan.bits_per_weight,
        "predicted": {
            "output_bytes": plan.output_bytes,
            "spilled_bytes": plan.spilled_bytes,
            "disk_bytes": plan.calibration_bytes,
            "memory_bytes": plan.memory_bytes,
            "memory_limit": plan.memory_limit,
            "device_bytes": plan.device_bytes,
            "seconds": plan.seconds,
        },
        "processes": prepared.team.size,
        "attempts": {"count": keeper.attempt, "identical": keeper.identical},
        "blocks": [asdict(block) for block in blocks],
        **({"allocation": plan.allocation.facts()} if plan.allocation else {}),
        **(
            {"sparsity": pruned_facts(plan.shapes, plan.sparsity, sink.zeros, sink.shards.directory)}
            if plan.sparsity
            else {}
        ),
        "sites": list(plan.schemes) if plan.rounds else [],
        "tensors": tensor_manifest(sink.written),
        "sha256": dict(hashes),
    }


def _measured(place: Workspace, sink: Sink, engine: Engine, keeper: Keeper) -> dict[str, Any]:
    """Return what a run took, by the names of what was predicted."""
    files = sum(path.stat().st_size for path in place.directory.rglob("*") if path.is_file())
    return {
        "output_bytes": sink.shards.bytes,
        "spilled_bytes": engine.streams.spilled,
        "disk_bytes": files + engine.streams.spilled,
        "memory_bytes": peak_memory(),
        "device_bytes": torch.cuda.max_memory_allocated(engine.device) if engine.device.type == "cuda" else 0,
        "seconds": keeper.seconds,
        "stages": keeper.watch.stages,
    }
