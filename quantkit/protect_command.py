"""The command `protect`: bounds on the activations of a packed model."""

from typing import Annotated, Any

import typer
from rich.markup import escape

from quantkit import display
from quantkit.failures import alone, errors
from quantkit.flags import Device, Json, Output, Seed

Kind = Annotated[
    str,
    typer.Option(
        "--resilience",
        help="hybrid: a threshold for each place, one for each neuron in the last block; layer: the former alone;"
        " neuron: the latter everywhere; ranger: the largest value that was seen; none: no bounds, with --scales.",
    ),
]


def protect(
    output: Output,
    resilience: Kind = "hybrid",
    method: Annotated[
        str | None,
        typer.Option(help="progressive: block after block; joint: all at once; profiled. (default: progressive)"),
    ] = None,
    form: Annotated[
        str | None, typer.Option(help="clamp: too large values saturate; zero: they become 0; smooth. (default: clamp)")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="How much perplexity the bounds may cost, in per cent. (default: 0.5%)")
    ] = None,
    margin: Annotated[
        float | None, typer.Option(help="The largest value that was seen is multiplied by this first. (default: 1)")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Text: a name, a file, or self. (default: what OUTPUT was calibrated on)")
    ] = None,
    samples: Annotated[int, typer.Option(help="Sequences; one half decides what is accepted.")] = 24,
    seqlen: Annotated[int | None, typer.Option(help="Tokens in a sequence. (default: 256, or the context)")] = None,
    seed: Seed = None,
    scales: Annotated[
        str | None,
        typer.Option(
            help="Protect scales besides: secded (6 bits a scale; a flip is put right), secded64 (2 bits), copy (16.5),"
            " parity (1; a flip is seen), clamp (nearly none). (default: they are not)"
        ),
    ] = None,
    device: Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace bounds that are there.")] = False,
    as_json: Json = False,
) -> None:
    """Bound the activations of OUTPUT, so that a flipped bit in a weight or a scale does not become NaN.

    quantkit protect llama-7b-w4 --resilience hybrid --budget 0.5%

    Writes OUTPUT/resilience/bounds.safetensors; quantkit.load and --runtime packed apply it.
    """
    with errors(as_json), alone():
        from quantkit import protection  # torch takes seconds to import: not for --help

        if resilience == "none" and scales is not None:
            _show_scales(protection.protect_scales(output, scales, overwrite=overwrite), as_json=as_json)
            return
        with display.status("protecting", quiet=as_json) as say:
            made = protection.protect(
                output,
                resilience=resilience,
                method=method,
                form=form,
                budget=budget,
                margin=margin,
                calibration=calibration,
                samples=samples,
                seqlen=seqlen,
                seed=seed or 0,
                scales=scales,
                device=device,
                overwrite=overwrite,
                progress=say,
            )
        _show(made, as_json=as_json)


def _show(made: object, *, as_json: bool) -> None:
    from quantkit.protection import NOTICE, Protected

    assert isinstance(made, Protected)
    facts = made.facts
    if as_json:
        display.print_json({"output": str(made.output), "file": str(made.file), "notice": NOTICE, **facts})
        return
    table = display.facts_table(f"{made.file}")
    table.add_row("bounds", f"{facts['kind']}, {facts['form']}, by {facts['method']}")
    table.add_row("thresholds", f"{facts['bytes'] // 4:,} at {facts['places']} places, {facts['bytes']:,} bytes")
    table.add_row("perplexity", f"{facts['damage']:+.3f} % on held-out text, at most {facts['budget']:g} % allowed")
    if "scales" in facts:
        table.add_row("scales", f"{facts['scales']['kind']}, {facts['scales']['bytes']:,} bytes")
    display.out.print(table)
    display.print_notes(display.out, [NOTICE])


def _show_scales(made: Any, *, as_json: bool) -> None:  # noqa: ANN401  a Protected, whose module waits for torch
    if as_json:
        display.print_json({"output": str(made.output), "file": str(made.file), **made.facts})
    else:
        display.out.print(f"{escape(str(made.file))}: {made.facts['kind']}, {made.facts['bytes']:,} bytes")
