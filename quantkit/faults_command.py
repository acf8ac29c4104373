"""The command `faults`: flip bits of a packed model, and show how much that harms it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit import scoreboard
from quantkit.errors import UsageError
from quantkit.failures import alone, errors
from quantkit.flags import Device, Json, Seed

Restart = Annotated[bool, typer.Option("--restart", help="Begin anew, whatever the journal beside --output has.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say how many bits there are and how long it takes.")]


def faults(
    outputs: Annotated[
        list[Path], typer.Argument(help="A directory that `quantkit quantize` wrote; or results, to draw with --plot.")
    ],
    rate: Annotated[
        str, typer.Option(help="Probabilities with which each bit is hit, with commas.")
    ] = "1e-7,1e-6,1e-5,1e-4",
    trials: Annotated[int, typer.Option(help="Trials for each rate, bit or tensor.")] = 100,
    target: Annotated[
        str,
        typer.Option(help="Of codes,scales,zeros,norms,embeddings,dense,bounds,kv,activations; what is hit."),
    ] = "codes,scales",
    fault: Annotated[str, typer.Option(help="flip, stuck0, stuck1 or burst.")] = "flip",
    burst: Annotated[int, typer.Option(help="Bits of a burst.")] = 2,
    sweep: Annotated[
        str,
        typer.Option(
            help="rates; bits: one hit at each bit of a value in turn; tensors: one hit in each tensor in turn."
        ),
    ] = "rates",
    metric: Annotated[str, typer.Option(help="perplexity, or task with --task.")] = "perplexity",
    text: Annotated[str, typer.Option(help="What perplexity is of: a name or a file.")] = "embedded-test",
    seqlen: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    windows: Annotated[int, typer.Option(help="Windows.")] = 4,
    bos: Annotated[bool, typer.Option("--bos", help="Put the tokenizer's BOS before every window or prompt.")] = False,
    task: Annotated[str | None, typer.Option(help="A task of lm-eval, whose first score is the metric.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first N documents of the task.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Directory of task files (.yaml).")] = None,
    seed: Seed = None,
    jobs: Annotated[int, typer.Option(help="Processes, each with the model in its memory.")] = 1,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the JSON object here; what is finished is kept beside it."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a figure (.svg): needs matplotlib.")] = None,
    device: Device = None,
    restart: Restart = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Flip bits of OUTPUT's packed tensors in memory, trial after trial, and show what that does to its perplexity.

    quantkit faults llama-7b-w4 --target scales --rate 1e-6,1e-5 -o faults.json

    quantkit faults --plot faults.svg unprotected.json hybrid.json

    Nothing on the disk is changed. A campaign that was cut off goes on with the same command and --output.
    """
    with errors(as_json), alone():
        scoreboard.refuse_output(output)
        if plot is not None:
            from quantkit import fault_plot

            fault_plot.refuse_undrawable(plot)
        if plot is not None and all(path.suffix == ".json" for path in outputs):
            fault_plot.draw(fault_plot.read_results(outputs), plot)
            return
        if len(outputs) > 1:
            raise UsageError("give one directory; several results (.json) are for --plot alone")
        how = {
            "fault": fault,
            "burst": burst,
            "sweep": sweep,
            "metric": metric,
            "text": text,
            "seqlen": seqlen,
            "windows": windows,
            "bos": bos,
            "task": task,
            "limit": limit,
            "include_path": str(include_path) if include_path else None,
            "seed": seed or 0,
            "jobs": jobs,
            "output": output,
            "device": device,
            "restart": restart,
            "dry_run": dry_run,
            "rates": _rates(rate),
            "trials": trials,
            "targets": _names(target),
        }
        _run(outputs[0], plot, how, as_json=as_json)


def _run(model: Path, plot: Path | None, how: dict[str, Any], *, as_json: bool) -> None:
    from quantkit import campaign, fault_tables

    with scoreboard.counting(quiet=as_json) as tell:
        result = campaign.faults(model, progress=tell, **how)
    if isinstance(result, campaign.FaultPlan):
        fault_tables.planned(str(model), result, as_json=as_json)
        return
    if plot is not None:
        from quantkit import fault_plot

        fault_plot.draw([result.facts()], plot)
    fault_tables.reported(result, as_json=as_json)


def _rates(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--rate takes numbers with commas, not {text!r}") from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))
