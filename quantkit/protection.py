"""The verb `protect`: bounds on the activations of a packed checkpoint, written beside it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from quantkit.ambient import usual_settings
from quantkit.calibrate.data import calibration_tokens, load_tokenizer, refuse_unknown_tokens
from quantkit.calibrate.memory import release_freed
from quantkit.calibrate.self_text import sample_tokens
from quantkit.calibrate.text import read_text
from quantkit.errors import DataError, ModelError, OutputError, UsageError
from quantkit.evaluation.loading import context_length, load_model
from quantkit.evaluation.manifest import REPORT
from quantkit.model.checkpoint import Checkpoint
from quantkit.model.device import pick_device
from quantkit.model.skeleton import Skeleton, read_config
from quantkit.model.writer import whole
from quantkit.resilience import scale_file, side_file
from quantkit.resilience.choice import Resilience
from quantkit.resilience.places import Bounds, find_places
from quantkit.resilience.transformers import bound_transformer
from quantkit.runtime import packed_model
from quantkit.untrusted import parse_json, read_document

SAMPLES, SEQLEN = 24, 256
TEXT, SELF = "default", "self"
NOTICE = (
    "the bounds are applied by quantkit.load and --runtime packed; transformers, vLLM and other formats of the model "
    "run without them"
)


@dataclass(frozen=True, kw_only=True)
class Protected:
    """A protected output: where it lies, the file of its bounds, and how they were found."""

    output: Path
    file: Path
    facts: Mapping[str, Any]


@usual_settings()
def protect(  # noqa: PLR0913
    output: str | Path,
    *,
    resilience: str | Resilience = "hybrid",
    method: str | None = None,
    form: str | None = None,
    budget: str | float | None = None,
    margin: float | None = None,
    calibration: str | Path | None = None,
    samples: int = SAMPLES,
    seqlen: int | None = None,
    seed: int = 0,
    scales: str | None = None,
    device: str | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Protected:
    """Bound the activations of a packed model: find thresholds and write them to `output`/resilience/.

    >>> quantkit.protect("llama-7b-w4", resilience="hybrid", budget="0.5%")

    Args:
        output: the directory of a packed checkpoint; its weights are not touched.
        resilience: `hybrid`, `layer`, `neuron` or `ranger`; or a whole choice, which then says all up to `margin`.
        method: `progressive` (the default), `joint` or `profiled`.
        form: `clamp` (the default), `zero` or `smooth`.
        budget: how many per cent of perplexity the bounds may cost, 0.5 or "0.5%".
        margin: what the largest value that was seen is multiplied by, to begin with.
        calibration: a name, a file, or `self`; None: the text that the output was calibrated on, else `default`.
        samples: sequences, of which one half decides what is accepted.
        seqlen: tokens in a sequence; None: 256, or the model's context where that is shorter.
        seed: of what is drawn from the text.
        scales: what protects the scales besides, see `protect_scales`; None: nothing.
        device: as in `quantize`.
        overwrite: replace bounds that are there.
        progress: told what is being done.

    Raises:
        UsageError: a choice, a size or a device that cannot be used.
        ModelError: not packed, damaged, or of a family whose places for bounds are not known.
        DataError, NetworkError: the text cannot be had, or is too short.
        OutputError: there are bounds, or the disk cannot be written; nothing was changed.
    """
    directory, say = Path(output), progress or (lambda _: None)
    if not isinstance(resilience, Resilience):
        resilience = Resilience.parse(resilience, method=method, form=form, budget=budget, margin=margin)
    _refuse(directory, resilience, overwrite=overwrite)
    if scales is not None:
        scale_file.refuse(directory, scales, overwrite=overwrite)
    pick_device(device)
    if samples < 2 or (seqlen is not None and seqlen < 2):
        raise UsageError(f"samples and seqlen must be at least 2, not {samples} and {seqlen}")
    tokens = _tokens(directory, calibration, (samples, seqlen, seed), device, say)
    facts = add_bounds(directory, resilience, tokens, device=device, progress=say)
    if scales is not None:
        facts |= {"scales": protect_scales(directory, scales, overwrite=overwrite).facts}
    _note(directory, facts)
    return Protected(output=directory, file=side_file.path_of(directory), facts=facts)


def protect_scales(output: str | Path, kind: str = "secded", *, overwrite: bool = False) -> Protected:
    """Protect the scales of a packed model against flipped bits: write what repairs them to `output`/resilience/.

    >>> quantkit.protect_scales("llama-7b-w4", "secded64")

    Args:
        output: the directory of a packed checkpoint; its weights are not touched.
        kind: `secded`, `secded64`, `copy`, `parity` or `clamp`, see `resilience.scales`.
        overwrite: replace a protection that is there.

    Raises:
        UsageError: an unknown kind, or scales that cannot be protected.
        ModelError: a checkpoint that cannot be read.
        OutputError: there is a protection, or the disk cannot be written; nothing was changed.
    """
    directory = Path(output)
    scale_file.refuse(directory, kind, overwrite=overwrite)
    file = scale_file.write(directory, kind)
    facts = {"kind": kind, "bytes": file.stat().st_size}
    _note(directory, {"scales": facts})
    return Protected(output=directory, file=file, facts=facts)


def refuse_unprotectable(skeleton: Skeleton, choice: Resilience) -> None:
    """Raise ModelError or UsageError for a model whose places are not known, or a method that needs faults."""
    if choice.way == "interval":
        raise UsageError(
            "the method interval measures under faults, which the command line does not; choose progressive, joint or "
            "profiled, or call quantkit.bound_module"
        )
    find_places(skeleton.model)


def add_bounds(
    directory: Path,
    choice: Resilience,
    tokens: Tensor,
    *,
    device: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Find bounds for the packed checkpoint in `directory` on `tokens`, write them beside it, and return the facts.

    Methods that train need the weights unpacked; `profiled` runs them packed.
    """
    progress("loading the model")
    if choice.way == "profiled":
        model = packed_model.load(directory, device=device, bounds=False)
    else:
        model = load_model(directory, device=device)[0]
    progress("finding thresholds")
    bounds = bound_transformer(model, tokens, choice, tick=lambda done: progress(f"finding thresholds: {done:.0%}"))
    del model
    release_freed()
    side_file.write(directory, bounds, Checkpoint(directory))
    return facts_of(bounds) | {"samples": len(tokens), "seqlen": tokens.shape[1]}


def facts_of(bounds: Bounds) -> dict[str, Any]:
    """Return what reports say of bounds."""
    count = len(bounds.thresholds)
    return {"kind": bounds.kind, "form": bounds.form, "places": count, "bytes": bounds.bytes, **bounds.facts}


def _refuse(directory: Path, choice: Resilience, *, overwrite: bool) -> None:
    if not directory.is_dir():
        raise ModelError(f"the directory {directory} does not exist; give one that `quantkit quantize` wrote")
    if getattr(read_config(directory), "quantization_config", None) is None:
        raise ModelError(f"{directory} is not packed, and only packed models are run with bounds; quantize it first")
    if side_file.path_of(directory).exists() and not overwrite:
        raise OutputError(f"{directory} has bounds; replace them with --overwrite")
    refuse_unprotectable(Skeleton(directory, packed=True), choice)
    Checkpoint(directory)


def _tokens(
    directory: Path,
    calibration: str | Path | None,
    sizes: tuple[int, int | None, int],
    device: str | None,
    say: Callable[[str], None],
) -> Tensor:
    """Return the calibration text as (samples, seqlen) tokens."""
    samples, wanted, seed = sizes
    name = str(calibration or _own_text(directory))
    corpora = None if name == SELF else read_text(name)
    tokenizer = load_tokenizer(directory)
    context = context_length(Skeleton(directory, packed=True).model)
    seqlen = wanted or min(SEQLEN, context or SEQLEN)
    if context and seqlen > context:
        raise UsageError(f"--seqlen {seqlen} is longer than the model's context of {context}")
    if corpora is None:
        say("writing text")
        model = load_model(directory, device=device)[0]
        return sample_tokens(
            model, tokenizer, samples=samples, seqlen=seqlen, seed=seed, at_once=samples, progress=lambda *_: None
        )
    tokens = calibration_tokens(corpora, tokenizer, samples=samples, seqlen=seqlen, seed=seed)
    if len(tokens) < samples:
        raise DataError(f"{name} has {len(tokens)} sequences of {seqlen} tokens, not {samples}; lower --samples")
    refuse_unknown_tokens(tokens, read_config(directory).get_text_config().vocab_size)
    return tokens


def _own_text(directory: Path) -> str:
    """Return the name of the text that an output of quantkit was calibrated on."""
    try:
        return str(parse_json(read_document(directory / REPORT))["calibration"]["text"])
    except (OSError, ValueError, KeyError, TypeError):
        return TEXT


def _note(directory: Path, facts: Mapping[str, Any]) -> None:
    """Say in report.json, where there is one, that the output is protected."""
    path = directory / REPORT
    try:
        report = parse_json(read_document(path))
    except (OSError, ValueError):
        return
    with whole(path) as partial:
        partial.write_text(
            json.dumps(report | {"resilience": {**report.get("resilience", {}), **facts}}, indent=2, ensure_ascii=False)
            + "\n",
            encoding="utf-8",
        )
