"""`quantkit check`: reload what was written, and compare it with what was calibrated."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.ambient import usual_settings
from quantkit.calibrate.data import evaluation_windows, refuse_unknown_tokens
from quantkit.calibrate.text import Corpus, read_text
from quantkit.errors import ModelError, UsageError, one_line
from quantkit.evaluation.coverage import Coverage, coverage, report_faults, size_faults
from quantkit.evaluation.divergence import divergence
from quantkit.evaluation.documents import Documents, Report, Sample, at_most, read_documents, side_file_faults
from quantkit.evaluation.loading import Model, Tokenizer, context_length, load_model, quantize_activations, quiet
from quantkit.evaluation.manifest import REPORT
from quantkit.evaluation.shards import Shards, read_shards, shard_faults, value_faults
from quantkit.model import names
from quantkit.model.checkpoint import Checkpoint
from quantkit.model.device import pick_device
from quantkit.model.skeleton import Skeleton
from quantkit.resilience import scale_file, side_file

DEFAULT_TEXT, DEFAULT_SEQLEN = "embedded-test", 512
WORST_RATIO = 100.0  # perplexity over the original's: no usable model is that far off

# How far a logit may be from the recorded one: a share of the spread (standard deviation) of all logits, plus
# one of the largest. The stored weights are exactly those that were calibrated: storing them loses nothing.
#
# Float32 on both sides, measured on honest outputs (2, 3, 4, 8 bits; float32, float16, bfloat16; 5 and
# 6 layers): at most 1.6e-5 of the spread, nearly all of it from recording six digits; other kernels change at
# most 1e-5. The least damage tried, all scales of one linear off by one unit in the last place, changes 4e-3.
PRECISE = 2e-4
# bfloat16 on a GPU on either side, estimated by running the same models in bfloat16: up to 0.11
COARSE = 0.5
# Several schemes in one checkpoint: transformers then multiplies codes by scales in the model's dtype, which in a
# float32 model leaves out the rounding to 16 bits with which it was calibrated; at most 4e-3 (27 families, 2 blocks)
UNROUNDED = 2e-2
RECORDED = 1e-5  # check.json keeps six significant digits


@dataclass(frozen=True)
class CheckResult:
    """What a check found.

    Attributes:
        faults: one line per fault; empty for an output that is whole and computes what was calibrated.
        facts: what could be measured, for JSON; absent where damage prevented it, None where not finite:
            `source`, `scheme`, `method`: from the report;
            `shards`, `tensors`, `bytes`: what lies on disk, bytes without headers;
            `parameters`, `quantized_parameters`, `quantized_share`, `bits_per_weight`: of what is stored;
            `logit_difference`, `logit_tolerance`: the largest difference from the recorded logits, and the
            largest that is allowed; `logit_spread`: the standard deviation of all logits;
            with `against`: `against`, `text`, `windows`, `seqlen`, and of `Divergence` `tokens`, `kl`, `kl_median`,
            `kl_p99`, `kl_max` (nats per token), `top1_agreement`, `perplexity`, `reference_perplexity`.
    """

    faults: tuple[str, ...]
    facts: Mapping[str, Any]


@dataclass
class _Findings:
    faults: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


@usual_settings()
def check(  # noqa: PLR0913
    output: str | Path,
    *,
    against: str | None = None,
    text: str | None = None,
    seqlen: int | None = None,
    windows: int = 16,
    device: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> CheckResult:
    """Return what is wrong with `output`, a directory that quantkit wrote, and what is known about it.

    Checked are its documents, every tensor's presence, form, hash and values, the quantized share, and its
    logits after a reload with plain transformers, of the weights alone; the comparison with `against` quantizes
    activations too, where the scheme does. Damage never raises.

    Args:
        output: the directory.
        against: the original model, to compare predictions with on a text.
        text: that text, a name or a file; by default the embedded test text, which needs no network.
        seqlen: tokens per window of the text; by default 512, or the context where that is shorter.
        windows: how many windows, fewer if the text has no more.
        device: as in `load_model`.
        progress: told what is being done.

    Raises:
        ModelError: `output` is no directory that quantkit wrote, or the original cannot be loaded.
        UsageError, DataError, NetworkError: the device, the text or the original cannot be used as given.
    """
    output = Path(output)
    _refuse_stranger(output)
    pick_device(device)
    if windows < 1 or (seqlen is not None and seqlen < 2):
        raise UsageError(f"windows must be at least 1 and seqlen at least 2, not {windows} and {seqlen}")
    corpora = _read_for(against, text)
    say = progress or (lambda _: None)
    found = _Findings()
    documents = _check_files(output, found, say)
    say("reloading with transformers")
    model, tokenizer = _reload(output, device, found)
    if model is not None and documents.report is not None and documents.report.zeros:
        _check_zeros(model, documents.report.zeros, found)
    if model is not None and documents.sample is not None:
        _check_logits(model, documents.sample, _tolerance(model, documents), found)
    if model is not None and tokenizer is not None and against:
        say(f"comparing with {against}")
        found.facts |= {"against": against, "text": text or DEFAULT_TEXT}
        if quantization := documents.quantization:
            quantize_activations(model, next(iter(quantization.schemes.values())), dense=quantization.ignore)
        rows = _windows(corpora, tokenizer, model, seqlen, windows)
        _compare(model, load_model(against, device=device)[0], rows, found, say)
    return CheckResult(faults=tuple(dict.fromkeys(map(one_line, found.faults))), facts=_finite(found.facts))


def _check_zeros(model: Model, zeros: Mapping[str, int], found: _Findings) -> None:
    """Compare the zeros of the reloaded weights with those that were pruned; rounding may have made more."""
    faults, there = [], 0
    for name, expected in zeros.items():
        weight = model.get_submodule(name).weight
        counted = int((weight == 0).sum()) if isinstance(weight, Tensor) else 0
        there += counted
        if counted < expected:
            faults.append(f"{name} has {counted} weights that are zero, but {expected} were pruned")
    found.faults += at_most(faults)
    found.facts["zeros"] = there


def _read_for(against: str | None, text: str | None) -> list[Corpus]:
    """Return the text to compare on; a wrong name of it or of the original should not cost a whole check."""
    if against is None:
        return []
    names.resolve(against, weights=False)
    return read_text(text or DEFAULT_TEXT)


def _refuse_stranger(output: Path) -> None:
    if not output.is_dir():
        raise ModelError(f"the directory {output} does not exist; give one that `quantkit quantize` wrote")
    if not (output / REPORT).is_file():
        raise ModelError(
            f"{output} has no {REPORT}, by which outputs of quantize and prune are checked; give one of these, or "
            "judge it with quantkit evaluate"
        )


def _check_files(output: Path, found: _Findings, say: Callable[[str], None]) -> Documents:
    """Check everything that needs no running model."""
    say("reading documents and shards")
    documents, faults = read_documents(output)
    found.faults += faults
    shards, faults = read_shards(output, documents.index, documents.report)
    found.faults += faults
    if documents.report:
        found.faults += at_most(side_file_faults(output, documents.report))
    say("hashing shards")
    found.faults += shard_faults(output, shards, documents.index, documents.report)
    say("reading every tensor")
    found.faults += value_faults(shards)
    found.facts |= _file_facts(documents.report, shards)
    say("counting what is quantized")
    _check_coverage(output, documents, found)
    _check_protection(output, documents.report, found)
    return documents


def _file_facts(report: Report | None, shards: Shards) -> dict[str, Any]:
    reported = {"source": report.source, "scheme": report.scheme, "method": report.method} if report else {}
    return reported | {"shards": len(shards.headers), "tensors": len(shards.places()), "bytes": shards.bytes}


def _check_coverage(output: Path, documents: Documents, found: _Findings) -> None:
    if documents.quantization is None:
        return
    try:
        with quiet():
            skeleton = Skeleton(output, packed=True)
    except ModelError as error:
        found.faults.append(f"config.json describes no model that can be built: {error}")
        return
    try:
        checkpoint = Checkpoint(output)
        share = coverage(skeleton, checkpoint, documents.quantization)
        found.faults += share.faults
        if documents.report:
            found.faults += report_faults(share, documents.report)
            found.faults += size_faults(skeleton, checkpoint, documents.report)
        found.facts |= _share_facts(share)
    except ModelError as error:
        if not found.faults:  # a checkpoint that cannot be opened was told of already, shard by shard
            found.faults.append(str(error))


def _check_protection(output: Path, report: Report | None, found: _Findings) -> None:
    """Read what protects the weights, beside them; say of what the report has and the disk has not."""
    said = report.protection if report else ()
    for key, path in (("kind", side_file.path_of(output)), ("scales", scale_file.path_of(output))):
        if key in said and not path.is_file():
            found.faults.append(f"{path.relative_to(output)} is missing, though {REPORT} says it is there")
    try:
        bounds, scales = side_file.read(output, scale_file.guarded(output)), scale_file.read(output)
    except ModelError as error:
        found.faults.append(str(error))
        return
    if bounds is not None:
        found.facts |= {"bounds": bounds.kind, "bounds_bytes": bounds.bytes}
    if scales is not None:
        found.facts["guards"] = scales[0]


def _share_facts(share: Coverage) -> dict[str, Any]:
    return {
        "parameters": share.parameters,
        "quantized_parameters": share.quantized,
        "quantized_share": share.quantized / share.parameters,
        "bits_per_weight": share.stored_bits / share.quantized if share.quantized else None,
    }


def _reload(output: Path, device: str | None, found: _Findings) -> tuple[Model, Tokenizer] | tuple[None, None]:
    try:
        return load_model(output.absolute(), device=device, activations=False)
    except ModelError as error:
        found.faults.append(f"it cannot be loaded: {error}")
        return None, None


@torch.no_grad()
@quiet()
def _check_logits(model: Model, sample: Sample, share: float, found: _Findings) -> None:
    """Compare the logits at the recorded positions; `share` of the spread is how far they may be off."""
    try:
        logits = model(sample.tokens.to(model.device), use_cache=False).logits.float().cpu()
        difference = float((logits.gather(-1, sample.ids) - sample.logits).abs().max())
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        found.faults.append(f"the recorded tokens cannot be run: {' '.join(str(error).split())}")
        return
    tolerance = share * sample.spread + RECORDED * float(sample.logits.abs().max())
    found.facts |= {
        "logit_difference": difference,
        "logit_tolerance": tolerance,
        "logit_spread": sample.spread,
    }
    if not torch.isfinite(logits).all():
        found.faults.append("the reloaded model gives logits that are NaN or infinite")
    elif not difference <= tolerance:
        found.faults.append(
            f"the reloaded model's logits differ from the calibrated ones by {difference:.3g}, "
            f"more than the tolerance of {tolerance:.3g}"
        )


def _tolerance(model: Model, documents: Documents) -> float:
    """Return how far logits may be off, as a share of their spread."""
    report, quantization = documents.report, documents.quantization
    if model.device.type == "cuda" or (report is not None and report.device.startswith("cuda")):
        return COARSE
    mixed = quantization is not None and quantization.scheme is None
    return UNROUNDED if mixed and model.config.dtype == torch.float32 else PRECISE


def _windows(
    corpora: list[Corpus],
    tokenizer: Tokenizer,
    model: Model,
    seqlen: int | None,
    windows: int,
) -> Tensor:
    context = context_length(model)
    if seqlen and context and seqlen > context:
        raise UsageError(f"--seqlen {seqlen} is longer than the model's context of {context}")
    length = seqlen or min(DEFAULT_SEQLEN, context or DEFAULT_SEQLEN)
    rows = evaluation_windows(corpora, tokenizer, seqlen=length, windows=windows)
    refuse_unknown_tokens(rows, model.config.get_text_config().vocab_size)
    return rows


def _compare(
    model: Model,
    reference: Model,
    rows: Tensor,
    found: _Findings,
    say: Callable[[str], None],
) -> None:
    """Measure how far the predictions are from the original's."""
    measured = divergence(model, reference, rows, lambda done, total: say(f"window {done} of {total}"))
    facts = {name: value for name, value in asdict(measured).items() if name != "kl_histogram"}
    found.facts |= {"windows": rows.shape[0], "seqlen": rows.shape[1]} | facts
    ratio = measured.perplexity / measured.reference_perplexity
    if not (math.isfinite(measured.kl) and math.isfinite(ratio)):
        found.faults.append("the predictions on the text are NaN or infinite")
    elif ratio > WORST_RATIO:
        found.faults.append(
            f"its perplexity is {measured.perplexity:.4g}, {ratio:.0f} times the original's "
            f"{measured.reference_perplexity:.4g}; use more bits or smaller groups"
        )


def _finite(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts with None for what JSON cannot hold."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in facts.items()
    }
