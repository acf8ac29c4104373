"""The commands that judge and use a model: `evaluate`, `compare`, `generate` and `lm-eval`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit import display, scoreboard
from quantkit.errors import UsageError
from quantkit.failures import alone, errors, launched
from quantkit.flags import AnyRuntime, Delta, Device, Json, Model, Revision, Runtime
from quantkit.runtime import DEFAULT_RUNTIME, GENERATE_RUNTIME

TEXT, SEQLEN = "wikitext2-test", 1024

Text = Annotated[
    str | None,
    typer.Option(
        help=f"A calibration name (quantkit list calibrations) or a text, .jsonl or .parquet file. (default: {TEXT})"
    ),
]
Seqlen = Annotated[int | None, typer.Option(help=f"Tokens per window. (default: {SEQLEN})")]
Windows = Annotated[int | None, typer.Option(help="Use only the first N windows. (default: all)")]
Bos = Annotated[
    bool, typer.Option("--bos", help="Put the tokenizer's BOS before every window or prompt (Gemma needs it).")
]
Limit = Annotated[int | None, typer.Option(help="Use only the first N documents of each task. (default: all)")]
Fewshot = Annotated[
    int | None, typer.Option("--num-fewshot", help="Examples in the prompts. (default: as the task says)")
]
BatchSize = Annotated[str | None, typer.Option(help="Requests of a task at once, or auto. (default: auto)")]
IncludePath = Annotated[
    Path | None, typer.Option(help="Directory of task files (.yaml), which come before those of lm-eval.")
]
File = Annotated[Path | None, typer.Option("--output", help="Write the JSON object to this file, too.")]


def evaluate(
    model: Model,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="Tasks of lm-eval instead of a text: hellaswag,piqa,lambada_openai; repeatable."),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Another model, usually the original: both, and the difference.")
    ] = None,
    text: Text = None,
    seqlen: Seqlen = None,
    windows: Windows = None,
    limit: Limit = None,
    num_fewshot: Fewshot = None,
    batch_size: BatchSize = None,
    include_path: IncludePath = None,
    bos: Bos = False,
    delta: Delta = None,
    runtime: AnyRuntime = None,
    device: Device = None,
    revision: Revision = None,
    output: File = None,
    as_json: Json = False,
) -> None:
    """Print the perplexity of a model, quantized or not, by the field's protocol; or what it scores in tasks.

    Of the perplexity: one stream of text, windows that do not overlap, the last partial one dropped, loss in float32.
    A text file is one stream as it is; in a .jsonl every document starts with the tokenizer's BOS where it has one.
    """
    with errors(as_json), launched() as team:
        leads = team is None or team.leads
        of_tasks = _of_tasks(limit, num_fewshot, batch_size, include_path)
        named = _split(tasks)
        if named:
            _refuse_given("a text, not for --tasks", text=text, seqlen=seqlen, windows=windows)
        else:
            _refuse_given("--tasks", **of_tasks)
        scoreboard.refuse_output(output if leads else None)
        from quantkit import api

        runtime = runtime or (DEFAULT_RUNTIME if delta is None else GENERATE_RUNTIME)
        how: dict[str, Any] = {"team": team, "against": against, "bos": bos, "runtime": runtime, "device": device}
        how |= {"delta": delta}
        shown: dict[str, Any] = {"runtime": runtime, "as_json": as_json, "output": output}
        with scoreboard.counting(quiet=as_json or not leads) as tell:
            if named:
                scores = api.evaluate_tasks(model, named, **of_tasks, **how, revision=revision, progress=tell)
            else:
                where = _where(text, seqlen, windows)
                measured = api.evaluate(
                    model, **where, **how, revision=revision, progress=lambda *count: tell("evaluating", *count)
                )
        if not leads:
            return
        if named:
            scoreboard.scored(model, against, scores, _said(of_tasks), **shown)
        else:
            scoreboard.evaluated(model, against, where, measured, **shown)


def compare(
    model: Model,
    reference: Annotated[str, typer.Argument(help="The model it is held against, usually its original.")],
    text: Text = None,
    seqlen: Seqlen = None,
    windows: Windows = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="Tasks of lm-eval besides the text: hellaswag,piqa,lambada_openai; repeatable."),
    ] = None,
    limit: Limit = None,
    num_fewshot: Fewshot = None,
    batch_size: BatchSize = None,
    include_path: IncludePath = None,
    bos: Bos = False,
    runtime: Runtime = DEFAULT_RUNTIME,
    device: Device = None,
    revision: Revision = None,
    output: File = None,
    as_json: Json = False,
) -> None:
    """Print how far MODEL's predictions are from REFERENCE's: divergence, agreement, perplexities, flipped answers."""
    with errors(as_json), alone():
        of_tasks = _of_tasks(limit, num_fewshot, batch_size, include_path)
        named = _split(tasks)
        if not named:
            _refuse_given("--tasks", **of_tasks)
        scoreboard.refuse_output(output)
        from quantkit import api

        how: dict[str, Any] = {**_where(text, seqlen, windows), "bos": bos, "runtime": runtime}
        with scoreboard.counting(quiet=as_json) as tell:
            result = api.compare(
                model, reference, **how, tasks=named, **of_tasks, device=device, revision=revision, progress=tell
            )
        options = {**how, **(_said(of_tasks) if named else {})}
        scoreboard.compared(model, reference, result, options, as_json=as_json, output=output)


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; higher samples.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    delta: Delta = None,
    runtime: Runtime = GENERATE_RUNTIME,
    device: Device = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Continue a prompt with a model, quantized or not."""
    with errors(as_json), alone():
        from quantkit import api

        with display.status("loading", quiet=as_json):
            text = api.generate(
                model,
                prompt,
                max_new_tokens=tokens,
                temperature=temperature,
                seed=seed,
                device=device,
                revision=revision,
                runtime=runtime,
                delta=delta,
            )
        display.generated(prompt, text, as_json=as_json)


def lm_eval(context: typer.Context) -> None:
    """Run lm-eval's own command line, which then knows --model quantkit --model_args pretrained=OUT,runtime=packed."""
    with errors(as_json=False), launched():
        from quantkit.evaluation import harness

        harness.shell(context.args)


def _of_tasks(
    limit: int | None, num_fewshot: int | None, batch_size: str | None, include_path: Path | None
) -> dict[str, Any]:
    """Return the options of tasks that were given."""
    if batch_size is not None and batch_size != "auto" and not batch_size.isdecimal():
        raise UsageError(f"--batch-size must be a positive number or auto, not {batch_size!r}")
    size = int(batch_size) if batch_size is not None and batch_size != "auto" else batch_size
    return _given(limit=limit, num_fewshot=num_fewshot, batch_size=size, include_path=include_path)


def _split(tasks: list[str] | None) -> list[str]:
    if tasks is None:
        return []
    named = [name.strip() for given in tasks for name in given.split(",")]
    if not all(named):
        raise UsageError(f"--tasks {','.join(tasks)!r} has an empty name; give names with commas between them")
    return named


def _refuse_given(what: str, **options: Any) -> None:  # noqa: ANN401
    for name in _given(**options):
        raise UsageError(f"--{name.replace('_', '-')} is for {what}; leave one out")


def _where(text: str | None, seqlen: int | None, windows: int | None) -> dict[str, Any]:
    return {"text": text or TEXT, "seqlen": SEQLEN if seqlen is None else seqlen, "windows": windows}


def _said(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of tasks for the JSON object."""
    folder = options.get("include_path")
    return {
        "limit": options.get("limit"),
        "batch_size": options.get("batch_size", "auto"),
        "include_path": str(folder) if folder else None,
    }


def _given(**values: Any) -> dict[str, Any]:  # noqa: ANN401
    return {name: value for name, value in values.items() if value is not None}
