"""The commands `personalize` and `merge`: a packed model learns from examples, and the result becomes a part of it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit import display, scoreboard
from quantkit.errors import UsageError
from quantkit.failures import alone, errors
from quantkit.flags import Device, Json, Output, Overwrite, Restart
from quantkit.pruning_command import given, settings


def personalize(
    model: Output,
    data: Annotated[Path, typer.Argument(help="Examples: a .jsonl, .json, .csv, .tsv or .parquet file.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The .safetensors file to write.")] = None,
    train: Annotated[
        str | None, typer.Option(help="What may change: bias, norm, scales, soft-prompt, lora. (default: bias)")
    ] = None,
    gradient: Annotated[
        str | None,
        typer.Option(
            help="How the gradient is had: backprop, dp, mezo, dp-mezo, subspace-zo, dice. (default: backprop)"
        ),
    ] = None,
    objective: Annotated[
        str | None, typer.Option(help="What is minimised: lm, classification, metric. (default: lm)")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Updates. (default: 500)")] = None,
    lr: Annotated[
        float | None,
        typer.Option(help="Learning rate. (default: that of what is trained; for forward passes, found from the loss)"),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples of an update. (default: 8)")] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Examples that are in the model at once; the result is the same. (default: all)")
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="sgd, momentum or adam. (default: adam; for mezo and subspace-zo, sgd)")
    ] = None,
    schedule: Annotated[str | None, typer.Option(help="constant, linear or cosine. (default: constant)")] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps over which the learning rate rises. (default: 0)")] = None,
    decay: Annotated[float | None, typer.Option(help="Weight decay. (default: 0)")] = None,
    validation: Annotated[
        float | None, typer.Option(help="Share of the examples kept apart to find the best step. (default: 0.1)")
    ] = None,
    validate_every: Annotated[int | None, typer.Option(help="Steps between validations. (default: 50)")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Validations without a better one that end the run. (default: none do)")
    ] = None,
    seqlen: Annotated[
        int | None, typer.Option(help="Most tokens of an example. (default: the context, at most 512)")
    ] = None,
    cut: Annotated[bool, typer.Option("--cut", help="Cut examples that are longer instead of refusing them.")] = False,
    score: Annotated[
        str | None, typer.Option(help="Tokens that count: answer (where there is one) or all. (default: answer)")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="What stands around a sentence, e.g. 'Review: {sentence} It was'.")
    ] = None,
    word: Annotated[
        list[str] | None, typer.Option(metavar="LABEL=WORD", help="The word of a label, one token; repeatable.")
    ] = None,
    column: Annotated[
        list[str] | None, typer.Option(metavar="NAME=COLUMN", help="Which column is NAME, text=story; repeatable.")
    ] = None,
    sampling: Annotated[
        str | None, typer.Option(help="poisson or shuffled batches. (default: poisson where privacy needs it)")
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="The privacy budget; the noise follows from it.")] = None,
    delta: Annotated[float | None, typer.Option("--delta", "--dp-delta", help="The other half of it, as 1e-5.")] = None,
    noise: Annotated[float | None, typer.Option(help="Noise of private gradients, instead of --epsilon.")] = None,
    journal: Annotated[
        Path | None, typer.Option(help="Also write the journal of mezo to this file: it tells of the examples.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other option of what was chosen; repeatable."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random. (default: 0)")] = None,
    device: Device = None,
    overwrite: Overwrite = False,
    restart: Restart = False,
    as_json: Json = False,
) -> None:
    """Let a packed MODEL learn from DATA; what it learned is a small file, and the model stays as it is.

    quantkit personalize llama-7b-w4 mine.jsonl --train bias --steps 200 -o mine.safetensors

    quantkit generate llama-7b-w4 --delta mine.safetensors --prompt "Dear"
    """
    with errors(as_json), alone():
        if output is None:
            raise UsageError("say where the delta goes: -o delta.safetensors")
        chosen: dict[str, Any] = {
            "train": train,
            "gradient": gradient,
            "objective": objective,
            "steps": steps,
            "lr": lr,
        }
        chosen |= {"batch_size": batch_size, "micro_batch": micro_batch, "optimizer": optimizer, "schedule": schedule}
        chosen |= {"warmup": warmup, "decay": decay, "validation": validation, "validate_every": validate_every}
        chosen |= {"patience": patience, "seqlen": seqlen, "score": score, "template": template, "seed": seed}
        chosen |= {"epsilon": epsilon, "delta": delta, "device": device}
        chosen |= {"sampling": sampling, "noise": noise, "journal": journal}
        chosen |= {"words": _pairs("--word", word), "columns": _pairs("--column", column)}
        options = settings({}, [_quoted(text) for text in set_ or []])
        from quantkit import personalization

        with scoreboard.learning(quiet=as_json) as tell:
            made = personalization.personalize(
                model,
                data,
                output=output,
                **given(chosen),
                cut=cut,
                options=options,
                overwrite=overwrite,
                restart=restart,
                progress=tell,
            )
        scoreboard.personalized(made.output, made.report, as_json=as_json)


def merge(
    model: Output,
    delta: Annotated[Path, typer.Argument(help="What `quantkit personalize` wrote for it.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory to write; it appears whole or not at all.")
    ] = None,
    round_: Annotated[
        bool, typer.Option("--round", help="Round to the model's dtype what is not exact in it.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write MODEL with what DELTA learned as a part of it, where that is exact: bias, norm and scales."""
    with errors(as_json), alone():
        if output is None:
            raise UsageError("say where the merged model goes: -o DIRECTORY")
        from quantkit import merging

        with display.status("merging", quiet=as_json):
            made = merging.merge(model, delta, output=output, rounded=round_, overwrite=overwrite)
        scoreboard.merged(made, as_json=as_json)


def replay(
    model: Output,
    journal: Annotated[Path, typer.Argument(help="What `quantkit personalize --journal` wrote.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The .safetensors file to write.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write the delta that a run of forward passes came to, from its JOURNAL alone: no data, no forward pass."""
    with errors(as_json), alone():
        if output is None:
            raise UsageError("say where the delta goes: -o delta.safetensors")
        from quantkit import personalization

        with display.status("replaying", quiet=as_json):
            made = personalization.replay(model, journal, output=output, overwrite=overwrite)
        scoreboard.replayed(made.output, made.report, as_json=as_json)


def _quoted(text: str) -> str:
    """Return NAME=VALUE with quotes around globs, which are then texts."""
    name, equals, value = text.partition("=")
    return f"{name}{equals}'{value}'" if any(sign in value for sign in "*?,") and value[0] not in "['\"" else text


def _pairs(flag: str, values: list[str] | None) -> dict[str, Any] | None:
    """Return what a repeatable NAME=VALUE says."""
    if values is None:
        return None
    for value in values:
        if "=" not in value:
            raise UsageError(f"{flag} {value!r} is not of the form NAME=VALUE")
    return dict(value.split("=", 1) for value in values)
