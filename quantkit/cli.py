"""The command line: parse, call `quantkit.api`, show. Nothing is computed here.

Exit codes: 0 success, 1 a bug in quantkit, 2 usage, 3 model, 4 text, 5 network, 6 output, 7 faults found by `check`,
8 another process of the run ended, 130 interrupted. Errors are one line on stderr; with `--json` they are the one
object on stdout.
"""

import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit import display, faults_command, judging, personalize_command, protect_command, pruning_command
from quantkit.errors import CheckFailure, UsageError, nearest
from quantkit.failures import OneLine, alone, errors, launched
from quantkit.flags import (
    AllowShort,
    Device,
    DryRun,
    Json,
    Memory,
    Output,
    Overwrite,
    RecipeFile,
    Restart,
    Revision,
    Seed,
    Seqlen,
    SourceModel,
    Sparsity,
    Target,
)
from quantkit.pruning_command import given, settings
from quantkit.running import run

app = typer.Typer(
    name="quantkit",
    cls=OneLine,
    help="Make a trained language model small, without retraining.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def quantize(
    model: SourceModel = None,
    output: Target = None,
    wbits: Annotated[int | None, typer.Option(help="Bits per weight, 2 to 8. (default: 4)")] = None,
    target_bpw: Annotated[
        float | None,
        typer.Option(
            help="Instead of --wbits: most bits per weight on average, scales included, e.g. 3.25."
            " The bits of each linear are chosen by its measured loss; implies --symmetric."
        ),
    ] = None,
    group_size: Annotated[
        str | None,
        typer.Option(help="Weights that share a scale, or `channel` for one scale per row. (default: 128)"),
    ] = None,
    symmetric: Annotated[
        bool | None, typer.Option("--symmetric/--asymmetric", help="No zero points. (default: asymmetric)")
    ] = None,
    abits: Annotated[
        int | None,
        typer.Option(help="Bits of activations (inputs of linears; Q, K, V), 2 to 8; 16: not quantized. (default: 16)"),
    ] = None,
    kv_bits: Annotated[
        int | None, typer.Option("--kv-bits", help="Bits of keys and values, 2 to 8. (default: those of --abits)")
    ] = None,
    symmetric_activations: Annotated[
        bool | None,
        typer.Option(
            "--symmetric-activations/--asymmetric-activations",
            help="Activations have no zero points, as vLLM computes them. (default: asymmetric)",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="How much work it is worth: fast, balanced, best or paper. (default: balanced)"),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Instead of --preset: one method, as published. See quantkit list methods.")
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="Glob of linears that stay dense, e.g. '*.down_proj'; repeatable."),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text to learn from: a name (`quantkit list calibrations`; self: written by the model), a .jsonl,"
            " .parquet or .toml file, or any other file as plain text."
            " (default: default; embedded for methods that do not learn)"
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Calibration sequences. (default: 128; 4 for methods that do not learn)")
    ] = None,
    seqlen: Seqlen = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per update. (default: 1)")] = None,
    allow_short: AllowShort = None,
    updates: Annotated[
        int | None, typer.Option(help="Updates for each window of blocks. (default: the preset's)")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Blocks that are optimised together. (default: the preset's, 1 or 2)")
    ] = None,
    let: Annotated[
        bool | None,
        typer.Option("--let/--no-let", help="Learn equivalent transforms. (default: where activations are quantized)"),
    ] = None,
    lwc_lr: Annotated[float | None, typer.Option(help="Learning rate of the clipping. (default: the preset's)")] = None,
    aug_loss: Annotated[
        bool | None,
        typer.Option("--aug-loss/--no-aug-loss", help="Second loss term. (default: paper at 2 bits and W4A4)"),
    ] = None,
    prune: Annotated[
        str | None, typer.Option(help="Prune first, with this method: quantkit list pruners. (default: none)")
    ] = None,
    sparsity: Sparsity = None,
    rotate: Annotated[
        bool | None,
        typer.Option("--rotate/--no-rotate", help="Rotate the residual stream, folded into weights. (default: no)"),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any other hyper-parameter; `distill.updates=0` means that of one pass; repeatable.",
        ),
    ] = None,
    resilience: Annotated[
        str | None,
        typer.Option(help="Bound activations against flipped bits: hybrid, layer, neuron or ranger; see protect."),
    ] = None,
    seed: Seed = None,
    device: Device = None,
    memory: Memory = None,
    revision: Revision = None,
    format_: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="Formats besides compressed-tensors, with commas: gptq,gguf; each is written to OUTPUT/<format>.",
        ),
    ] = None,
    recipe: RecipeFile = None,
    overwrite: Overwrite = False,
    restart: Restart = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Quantize MODEL block by block and write packed safetensors that load in transformers and vLLM.

    quantkit quantize llama-7b --wbits 4 -o llama-7b-w4

    quantkit quantize tiny --wbits 3 --group-size 32 --calibration embedded --seqlen 128 -o tiny-w3

    A run that was cut off, by whatever, goes on behind its last finished block when the same command is started again.
    """
    with errors(as_json), launched() as team:
        scheme = {
            "bits": wbits,
            "symmetric": symmetric,
            "target_bpw": target_bpw,
            "activation_bits": abits,
            "activation_symmetric": symmetric_activations,
            "kv_bits": kv_bits,
        }
        text = {
            "text": calibration,
            "samples": samples,
            "seqlen": seqlen,
            "batch_size": batch_size,
            "allow_short": allow_short,
        }
        learning = {"updates": updates, "window": window, "let": let, "lwc_lr": lwc_lr, "aug_loss": aug_loss}
        pruning = {"sparsity": sparsity}
        chosen = _recipe(
            model,
            recipe,
            {
                **given({**scheme, **text, "rotate": rotate, "seed": seed, "revision": revision}),
                **({"ignore": tuple(ignore)} if ignore else {}),
                **({"formats": _formats(format_)} if format_ else {}),
                **({"resilience": _resilience(resilience)} if resilience else {}),
                **({"group_size": _group_size(group_size)} if group_size else {}),
            },
            method=method,
            preset=preset,
            prune=prune,
            options=settings(given({**learning, **pruning}), set_ or []),
        )
        run(
            chosen,
            output,
            team=team,
            device=device,
            memory=memory,
            overwrite=overwrite,
            restart=restart,
            dry_run=dry_run,
            as_json=as_json,
        )


@app.command()
def check(
    output: Output,
    against: Annotated[
        str | None, typer.Option(help="The original model: adds KL divergence and perplexity of both.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="Text for --against: a calibration name or a file. (default: embedded-test)"),
    ] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens per window for --against. (default: up to 512)")] = None,
    windows: Annotated[int, typer.Option(help="Windows for --against.")] = 16,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Reload OUTPUT and verify every tensor, the quantized share, and the logits that were calibrated."""
    with errors(as_json), alone():
        from quantkit.evaluation.check import check as run

        with display.status("checking", quiet=as_json) as say:
            result = run(
                output,
                against=against,
                text=text,
                seqlen=seqlen,
                windows=windows,
                device=device,
                progress=say,
            )
        display.checked(output, result.faults, result.facts, as_json=as_json)
        if result.faults:
            raise typer.Exit(CheckFailure.exit_code)


@app.command()
def export(
    output: Output,
    format_: Annotated[str, typer.Option("--format", help="gptq, awq or gguf, or several with commas.")],
    to: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory to write. (default: OUTPUT/<format>)")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Option of the format: version=1 of gptq; repeatable."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write OUTPUT in another format too, exactly and without calibrating again."""
    with errors(as_json), alone():
        from quantkit import api

        formats, options = _formats(format_), settings({}, set_ or [])
        if to is not None and len(formats) > 1:
            raise UsageError(f"-o {to} is the place of one format, not of {len(formats)}; leave out one of them")
        made = []
        for name in formats:
            with display.status(f"exporting {name}", quiet=as_json):
                made.append(api.export(output, format=name, to=to, overwrite=overwrite, options=options))
        display.exported(made, as_json=as_json)


app.command()(pruning_command.prune)
app.command()(protect_command.protect)
app.command()(faults_command.faults)
app.command()(personalize_command.personalize)
app.command()(personalize_command.merge)
app.command()(personalize_command.replay)
for command in (judging.evaluate, judging.compare, judging.generate):
    app.command()(command)
app.command(
    "lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)(judging.lm_eval)


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="methods, pruners, presets, models, calibrations or formats.")],
    as_json: Json = False,
) -> None:
    """List what there is: methods, pruners, presets, models (aliases), calibrations (texts) or formats."""
    with errors(as_json):
        from quantkit import catalogue

        if what not in catalogue.KINDS:
            raise UsageError(f"cannot list {what!r}{nearest(what, catalogue.KINDS)}")
        display.listed(what, catalogue.rows(what), as_json=as_json)


def _version(show: bool) -> None:
    if show:
        from importlib.metadata import version

        typer.echo(f"quantkit {version('quantkit')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _recipe(model: str | None, file: Path | None, changes: dict[str, Any], **how: Any) -> Any:  # noqa: ANN401
    """Return the recipe of the flags: the defaults, or a file's, with the flags that were given changed."""
    from quantkit.recipe import Recipe, from_defaults, with_changes

    if file is not None:
        return with_changes(Recipe.from_toml(file, model), changes, **how)
    if model is not None:
        return from_defaults(model, changes, **how)
    raise UsageError("name a model: quantkit quantize MODEL -o DIRECTORY (quantkit list models shows aliases)")


def _resilience(kind: str) -> Any:  # noqa: ANN401  a Resilience, whose module waits for torch
    from quantkit.resilience.choice import Resilience

    return Resilience.parse(kind)


def _formats(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",")))


def _group_size(text: str) -> int | None:
    if text == "channel":
        return None
    if not text.isdecimal() or int(text) == 0:
        raise UsageError(f"--group-size must be a positive number or `channel`, not {text!r}")
    return int(text)


def main() -> None:
    """Run the command line; a request to terminate cleans up as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except BrokenPipeError:  # `quantkit list models | head`
        sys.stderr.close()
        sys.exit(0)


__all__ = ["app", "main"]
