"""What a run works with: its tokens, its source's weights, and the losses by which a budget of bits is spent.

Each is taken from the journal where an earlier process has it. Of several processes the first finds it out and has the
journal, the others are told.
"""

from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from quantkit.allocation import Losses
from quantkit.calibrate.data import calibration_tokens, load_tokenizer, refuse_unknown_tokens
from quantkit.calibrate.engine import Engine
from quantkit.calibrate.journal import Journal
from quantkit.calibrate.memory import release_freed
from quantkit.calibrate.self_text import sample_tokens
from quantkit.calibrate.sensitivity import SHRINK, Sensitivity
from quantkit.calibrate.streams import Streams
from quantkit.calibrate.team import Team
from quantkit.calibrate.text import SELF, read_text
from quantkit.calibrate.walk import Listener
from quantkit.core.masks import Sparsity
from quantkit.errors import DataError, ModelError
from quantkit.evaluation.loading import load_model
from quantkit.exporters.compressed_tensors import CompressedTensors
from quantkit.model import names
from quantkit.model.checkpoint import Checkpoint, fingerprint
from quantkit.preparation import Prepared
from quantkit.shares import allocated
from quantkit.sparsities import pruner_of
from quantkit.workload import writing_batch


def calibration(prepared: Prepared, journal: Journal | None, progress: Listener) -> Tensor:
    """Return the calibration tokens, as many as asked for unless fewer are allowed."""
    team = prepared.team
    tokens = team.give({"tokens": _calibration(prepared, journal, progress)} if journal else None)["tokens"]
    team.refuse_uneven(len(tokens), prepared.recipe.calibration.batch_size)
    return tokens


def _calibration(prepared: Prepared, journal: Journal, progress: Listener) -> Tensor:
    if journal.recall("tokens") is not None:
        return journal.tensors("tokens")["tokens"]
    wanted, seqlen = prepared.recipe.calibration, prepared.plan.seqlen
    if wanted.text == SELF:
        tokens = _own_text(prepared, progress)
        journal.note("tokens", {}, {"tokens": tokens})
        return tokens
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
    refuse_unknown_tokens(tokens, prepared.skeleton.config.get_text_config().vocab_size)
    return tokens


def _own_text(prepared: Prepared, progress: Listener) -> Tensor:
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


def weights(prepared: Prepared, journal: Journal | None, progress: Listener) -> tuple[Checkpoint, dict[str, str]]:
    """Return the source's weights, all of them read once, and the SHA-256 of its files.

    Of the processes on a machine the first one fetches and reads them; the others return no digests.

    Raises:
        NetworkError: they cannot be fetched.
        ModelError: one is missing, a value is not finite, or they are not those of the interrupted run.
    """
    progress.stage("downloading" if prepared.source.id else "opening weights")
    return prepared.team.in_turn(lambda: _weights(prepared, journal, progress))


def _weights(prepared: Prepared, journal: Journal | None, progress: Listener) -> tuple[Checkpoint, dict[str, str]]:
    checkpoint = Checkpoint(names.resolve(prepared.recipe.model, revision=prepared.recipe.revision).path)
    prepared.skeleton.refuse_incomplete(checkpoint)
    if prepared.team.local_rank:
        return checkpoint, {}
    progress.stage("verifying weights")
    digests, before = fingerprint(checkpoint.directory) | checkpoint.verify(), journal and journal.recall("source")
    if before not in (None, digests):
        raise ModelError(
            f"the weights in {checkpoint.directory} are not those that the interrupted run had; --restart begins anew"
        )
    return checkpoint, digests


def spend(
    prepared: Prepared, checkpoint: Checkpoint, tokens: Tensor, journal: Journal | None, progress: Listener
) -> Prepared:
    """Return the run with its budget of bits, if it has one, spent by measured losses."""
    plan = prepared.plan
    if not plan.budget:
        return prepared
    ties, schemes = plan.budget.ties, plan.budget.schemes
    rows: Any = None
    if journal:
        rows = journal.recall("losses")
        if rows is None:
            losses = _measured(prepared, checkpoint, tokens, progress)
            rows = [[losses[tie][scheme] for scheme in schemes] for tie in ties]
            journal.note("losses", rows)
    rows = prepared.team.say(rows)
    spent = plan.spend({tie: dict(zip(schemes, row, strict=True)) for tie, row in zip(ties, rows, strict=True)})
    CompressedTensors().check(spent.schemes)
    return replace(prepared, plan=spent)


def _measured(prepared: Prepared, checkpoint: Checkpoint, tokens: Tensor, progress: Listener) -> Losses:
    """Return what each group of linears loses at each width."""
    progress.stage("measuring")
    plan = prepared.plan
    assert plan.budget is not None
    learns = any(step.learns for step in prepared.recipe.build_passes().values())
    return Sensitivity(
        skeleton=prepared.skeleton,
        checkpoint=checkpoint,
        ties=plan.budget.ties,
        schemes=plan.budget.schemes,
        shrink=SHRINK if learns else (1.0,),  # what does not learn does not clip either
        scale_dtype=plan.scale_dtype,
        device=plan.device,
    ).run(tokens, progress.progress)


def share(
    prepared: Prepared, checkpoint: Checkpoint, tokens: Tensor, journal: Journal | None, progress: Listener
) -> Prepared:
    """Return the run with the share that each linear loses, where the pass that prunes does not say the same of all."""
    step = pruner_of(prepared.recipe.build_passes())
    if step is None or step.allocation == "uniform":
        return prepared
    shares: Any = None
    if journal:
        shares = journal.recall("shares")
        if shares is None:
            progress.stage("measuring")
            whole = engine(replace(prepared, team=Team()), checkpoint, Streams())
            found = allocated(step.allocation, whole, tokens, progress.progress)
            shares = {name: asdict(sparsity) for name, sparsity in found.items()}
            journal.note("shares", shares)
    shares = prepared.team.say(shares)
    sparsity = {name: Sparsity(**facts) for name, facts in shares.items()}
    return replace(prepared, plan=replace(prepared.plan, sparsity=sparsity))


def engine(prepared: Prepared, checkpoint: Checkpoint, streams: Streams) -> Engine:
    """Return what walks over the blocks."""
    return Engine(
        skeleton=prepared.skeleton,
        checkpoint=checkpoint,
        passes=list(prepared.recipe.build_passes().values()),
        schemes=prepared.plan.schemes,
        scale_dtype=prepared.plan.scale_dtype,
        device=prepared.plan.device,
        seed=prepared.recipe.seed,
        rotation=prepared.rotation,
        sparsity=prepared.plan.sparsity,
        team=prepared.team,
        streams=streams,
    )
