"""The command line's verbs from Python: keyword arguments instead of flags, values and exceptions instead of text."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.ambient import usual_settings
from quantkit.calibrate.data import evaluation_windows, refuse_unknown_tokens
from quantkit.calibrate.team import Team
from quantkit.calibrate.text import Corpus, read_text
from quantkit.conversion import Exported, export, further
from quantkit.errors import ModelError, UsageError
from quantkit.evaluation import generate as generation
from quantkit.evaluation.check import CheckResult, check
from quantkit.evaluation.divergence import Divergence, divergence
from quantkit.evaluation.loading import Model, Tokenizer, context_length
from quantkit.evaluation.perplexity import Perplexity, perplexity
from quantkit.evaluation.runtimes import load_with, refuse_unknown_runtime
from quantkit.evaluation.scores import TaskScores
from quantkit.evaluation.vocabulary import refuse_other_tokens
from quantkit.keywords import make_recipe
from quantkit.model import names
from quantkit.personal.delta import apply
from quantkit.pipeline import Progress, execute, prepare
from quantkit.planning import Plan
from quantkit.pruned import Pruned, prune
from quantkit.recipe import Recipe
from quantkit.runtime import DEFAULT_RUNTIME, GENERATE_RUNTIME, packed_model
from quantkit.units import parse_size

__all__ = [
    "CheckResult",
    "Comparison",
    "Exported",
    "Pruned",
    "Quantized",
    "check",
    "compare",
    "evaluate",
    "evaluate_tasks",
    "export",
    "generate",
    "load",
    "make_recipe",
    "plan",
    "prune",
    "quantize",
]


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A finished run: where the model lies, the content of its report.json, and format → directory of further ones."""

    output: Path
    report: Mapping[str, Any]
    formats: Mapping[str, Path]


@usual_settings()
def quantize(  # noqa: PLR0913
    model: str | Path | Recipe,
    *,
    output: str | Path,
    overwrite: bool = False,
    restart: bool = False,
    device: str | None = None,
    memory: int | str | None = None,
    progress: Progress | None = None,
    **fields: Any,  # noqa: ANN401  checked by make_recipe's own signature
) -> Quantized:
    """Quantize a model and write it, packed, to `output`; an interrupted run of the same arguments goes on.

    >>> quantkit.quantize("llama-7b", wbits=4, output="llama-7b-w4")

    Args:
        model: a directory, a Hub id, an alias of the model zoo, or a whole recipe.
        output: the directory to write; it appears whole or not at all.
        overwrite: replace an existing output, which is kept until the new one is whole.
        restart: begin anew instead of going on behind what an interrupted run finished.
        device: `cpu`, `cuda`, `cuda:1`; None: a GPU if there is one.
        memory: the most host memory to take, bytes or `8GiB`; None: a share of what is free. The result is the same.
        progress: told what happens; None: nobody.
        fields: the keyword arguments of `make_recipe`, unless `model` is a recipe.

    Raises:
        QuantkitError: see `quantkit.errors`; nothing was written then.
    """
    recipe = model if isinstance(model, Recipe) else make_recipe(model, **fields)
    prepared = prepare(recipe, device, parse_size(memory))
    report = execute(prepared, Path(output), overwrite=overwrite, restart=restart, progress=progress)
    formats = {name: Path(output) / name for name in further(prepared.recipe.formats)}
    return Quantized(output=Path(output), report=report, formats=formats)


@usual_settings()
def plan(
    model: str | Path | Recipe,
    *,
    device: str | None = None,
    memory: int | str | None = None,
    **fields: Any,  # noqa: ANN401
) -> Plan:
    """Return what `quantize` with the same arguments would do: sites, sizes, memory, disk, time; computes nothing.

    Raises:
        QuantkitError: see `quantkit.errors`.
    """
    recipe = model if isinstance(model, Recipe) else make_recipe(model, **fields)
    return prepare(recipe, device, parse_size(memory)).plan


@usual_settings()
def load(  # noqa: PLR0913
    model: str | Path,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    revision: str | None = None,
    bounds: bool = True,
    delta: str | Path | None = None,
) -> Model:
    """Return a packed checkpoint as a transformers model whose linears compute from the packed codes.

    >>> model = quantkit.load("llama-7b-w4")
    >>> model.generate(**tokenizer("Once upon a time", return_tensors="pt"))

    It is an ordinary `PreTrainedModel`: `generate`, caches, batches and chat templates work as always; it is for
    inference, nothing in it is trained. No code that comes with a checkpoint is run.

    Args:
        model: a directory or Hub id of compressed-tensors (quantkit's and llm-compressor's), GPTQ or AWQ.
        device: `cpu`, `cuda`, `cuda:1`; None: a GPU if there is one.
        dtype: of activations and of what is not packed; None: float32 on a CPU, as stored on a GPU.
        device_map: `auto`, or module names and their devices, as accelerate has it; instead of `device`.
        revision: revision on the Hub.
        bounds: bound activations where `quantkit protect` left bounds beside the checkpoint.
        delta: what `personalize` wrote for this model.

    Raises:
        ModelError: not packed, not to be run packed, incomplete or damaged; a delta or bounds of another model.
        UsageError: a device or a map that cannot be used.
    """
    source = names.resolve(str(model), revision=revision)
    loaded = packed_model.load(source.path, device=device, dtype=dtype, device_map=device_map, bounds=bounds)
    if delta is not None:
        apply(loaded, source.path, delta)
    return loaded


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models on the same text, and on the same tasks if any were given."""

    divergence: Divergence
    tasks: TaskScores | None = None


@usual_settings()
def evaluate(  # noqa: PLR0913
    model: str | Path,
    *,
    text: str | Path = "wikitext2-test",
    seqlen: int = 1024,
    windows: int | None = None,
    bos: bool = False,
    against: str | Path | None = None,
    runtime: str = DEFAULT_RUNTIME,
    device: str | None = None,
    revision: str | None = None,
    delta: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    team: Team | None = None,
) -> Perplexity:
    """Return the perplexity of a model on a text, by the field's protocol.

    Args:
        model: a directory, a Hub id or an alias; quantized or not.
        text: a calibration name, or a file: .jsonl and .parquet hold documents, any other is one stream.
        seqlen: tokens per window.
        windows: use only the first ones; None: all.
        bos: put the tokenizer's BOS before every window.
        against: another model of the same tokens; its perplexity on the same windows is the `reference` of the result.
        runtime: `packed` keeps packed weights packed, `dense` unpacks them.
        device: as in `quantize`.
        revision: revision on the Hub.
        delta: what `personalize` wrote for the model, which is then run packed.
        progress: told (windows done, windows in all), for each model.
        team: processes that share the windows, see `Team.join`; None: this one alone.

    Raises:
        QuantkitError: see `quantkit.errors`.
    """
    _refuse_sizes(seqlen=(seqlen, 2), windows=(windows, 1))
    refuse_unknown_runtime(runtime)
    corpora = read_text(str(text))  # before the model: a missing file should not cost a load
    if against is not None:
        refuse_other_tokens(model, against, revision=revision)

    def measure(name: str | Path, revision: str | None, delta: str | Path | None) -> Perplexity:
        place = (team or Team()).device(device)
        loaded, tokenizer = load_with(runtime, name, revision=revision, device=place, delta=delta)
        return perplexity(loaded, _windows(corpora, loaded, tokenizer, seqlen, windows, bos), progress, team)

    measured = measure(model, revision, delta)
    return measured if against is None else replace(measured, reference=measure(against, None, None))


@usual_settings()
def evaluate_tasks(  # noqa: PLR0913
    model: str | Path,
    tasks: Sequence[str],
    *,
    against: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = "auto",
    bos: bool = False,
    include_path: str | Path | None = None,
    runtime: str = DEFAULT_RUNTIME,
    device: str | None = None,
    revision: str | None = None,
    delta: str | Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    team: Team | None = None,
) -> TaskScores:
    """Return what a model scores in tasks of lm-eval.

    >>> quantkit.evaluate_tasks("llama-7b-w4", ["hellaswag", "piqa"], against="llama-7b", limit=500)

    Args:
        model: a directory, a Hub id or an alias; quantized or not.
        tasks: names of tasks, groups or tags, or globs of them.
        against: another model; what it scores is the `reference` of the result, `flips` the answers that changed.
        limit: use only the first documents of each task; None: all.
        num_fewshot: examples in the prompt; None: as the task says.
        batch_size: requests at once; `auto` finds it.
        bos: put the tokenizer's BOS before every prompt.
        include_path: a directory of task files (.yaml), which come before those of lm-eval.
        runtime: `packed` keeps packed weights packed, `dense` unpacks them.
        device: as in `quantize`.
        revision: revision on the Hub.
        delta: as in `evaluate`.
        progress: told (what, requests answered, requests in all); 0 in all where they are not known.
        team: processes that share the documents, see `Team.join`; only the first gets the scores.

    Raises:
        QuantkitError: see `quantkit.errors`.
    """
    refuse_unknown_runtime(runtime)
    team = team or Team()
    say = progress or (lambda *_: None)
    ask = _task_runner(
        tasks, limit=limit, num_fewshot=num_fewshot, batch_size=batch_size, bos=bos, include_path=include_path, say=say
    )
    if against is not None:
        names.resolve(str(against), weights=False)  # a wrong name should not cost the model's scores

    def measure(name: str | Path, revision: str | None, delta: str | Path | None) -> TaskScores:
        say(f"loading {name}", 0, 0)
        loaded, tokenizer = load_with(runtime, name, revision=revision, device=team.device(device), delta=delta)
        return ask(str(name), loaded, tokenizer, team)

    measured = measure(model, revision, delta)
    return measured if against is None else replace(measured, reference=measure(against, None, None))


@usual_settings()
def compare(  # noqa: PLR0913
    model: str | Path,
    reference: str | Path,
    *,
    text: str | Path = "wikitext2-test",
    seqlen: int = 1024,
    windows: int | None = None,
    bos: bool = False,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = "auto",
    include_path: str | Path | None = None,
    runtime: str = DEFAULT_RUNTIME,
    device: str | None = None,
    revision: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Comparison:
    """Return how far a model's predictions are from those of a reference, usually its original.

    Both models are in memory at once. The arguments are those of `evaluate` and, if `tasks` are given, of
    `evaluate_tasks`; `revision` is the model's.

    Raises:
        QuantkitError: see `quantkit.errors`; ModelError if the tokens of the models differ.
    """
    _refuse_sizes(seqlen=(seqlen, 2), windows=(windows, 1))
    refuse_unknown_runtime(runtime)
    say = progress or (lambda *_: None)
    corpora = read_text(str(text))
    refuse_other_tokens(model, reference, revision=revision)
    ask = tasks and _task_runner(
        tasks, limit=limit, num_fewshot=num_fewshot, batch_size=batch_size, bos=bos, include_path=include_path, say=say
    )
    say(f"loading {model}", 0, 0)
    loaded, tokenizer = load_with(runtime, model, revision=revision, device=device)
    say(f"loading {reference}", 0, 0)
    original, original_tokenizer = load_with(runtime, reference, device=device)
    rows = _windows(corpora, loaded, tokenizer, seqlen, windows, bos)
    if not rows.equal(_windows(corpora, original, original_tokenizer, seqlen, windows, bos)):
        raise ModelError(f"the tokenizers of {model} and {reference} split the text differently; compare one family")
    measured = divergence(loaded, original, rows, lambda done, total: say("comparing windows", done, total))
    if not ask:
        return Comparison(divergence=measured)
    scores = ask(str(model), loaded, tokenizer)
    others = ask(str(reference), original, original_tokenizer)
    return Comparison(divergence=measured, tasks=replace(scores, reference=others))


@usual_settings()
def generate(  # noqa: PLR0913
    model: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    runtime: str = GENERATE_RUNTIME,
    device: str | None = None,
    revision: str | None = None,
    delta: str | Path | None = None,
) -> str:
    """Return how a model continues `prompt`; greedy at temperature 0.

    `runtime` and `delta` are as in `evaluate`; the default is packed, which is faster and smaller.

    Raises:
        QuantkitError: see `quantkit.errors`.
    """
    loaded, tokenizer = load_with(runtime, model, revision=revision, device=device, delta=delta)
    return generation.generate(
        loaded, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
    )


def _refuse_sizes(**sizes: tuple[int | None, int]) -> None:
    """Raise UsageError for a number that is below its least value; None is none."""
    for name, (value, least) in sizes.items():
        if value is not None and value < least:
            raise UsageError(f"{name} must be at least {least}, not {value}")


def _windows(
    corpora: Sequence[Corpus], model: Model, tokenizer: Tokenizer, seqlen: int, windows: int | None, bos: bool
) -> Tensor:
    context = context_length(model)
    if context and seqlen > context:
        raise UsageError(f"--seqlen {seqlen} is longer than the model's context; pass --seqlen {context}")
    rows = evaluation_windows(corpora, tokenizer, seqlen=seqlen, windows=windows, bos=bos)
    refuse_unknown_tokens(rows, model.config.get_text_config().vocab_size)
    return rows


def _task_runner(  # noqa: PLR0913
    tasks: Sequence[str],
    *,
    limit: int | None,
    num_fewshot: int | None,
    batch_size: int | str,
    bos: bool,
    include_path: str | Path | None,
    say: Callable[[str, int, int], None],
) -> Callable[..., TaskScores]:
    """Return what a model, named for the progress, scores in the tasks; what cannot be run is refused now."""
    if isinstance(tasks, str) or not tasks:
        raise UsageError("name at least one task, in a list" if not tasks else f"tasks must be a list, not {tasks!r}")
    _refuse_sizes(limit=(limit, 1), num_fewshot=(num_fewshot, 0))
    if batch_size != "auto":
        if not isinstance(batch_size, int):
            raise UsageError(f"batch_size must be a positive number or auto, not {batch_size!r}")
        _refuse_sizes(batch_size=(batch_size, 1))
    from quantkit.evaluation import harness  # lm-eval takes seconds to import

    say("reading tasks", 0, 0)
    folder = Path(include_path) if include_path is not None else None
    found = harness.find_tasks(tasks, include_path=folder, num_fewshot=num_fewshot)

    def ask(name: str, model: Model, tokenizer: Tokenizer, team: Team | None = None) -> TaskScores:
        def told(done: int, total: int) -> None:
            say(f"asking {name}", done, total)

        say(f"asking {name}", 0, 0)
        return harness.run(
            model, tokenizer, found, limit=limit, batch_size=batch_size, bos=bos, progress=told, team=team
        )

    return ask
