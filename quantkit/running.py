"""What the commands `quantize` and `prune` do with a recipe."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import display
from quantkit.errors import UsageError
from quantkit.interrupts import asked_once
from quantkit.units import parse_size

if TYPE_CHECKING:
    from quantkit.calibrate.team import Team


def run(  # noqa: PLR0913
    recipe: Any,  # noqa: ANN401  a Recipe, whose module waits for torch
    output: Path | None,
    *,
    team: "Team | None",
    device: str | None,
    memory: str | None,
    overwrite: bool,
    restart: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Do what a recipe says, or say what it would do; of several processes the first shows what came of it."""
    from quantkit.model.writer import refuse_existing
    from quantkit.pipeline import execute, prepare  # torch takes seconds to import: not for --help

    if not dry_run and output is None:
        raise UsageError("say where to write with -o DIRECTORY, or look first with --dry-run")
    leads = team is None or team.leads
    if output is not None and leads:
        refuse_existing(output, overwrite=overwrite)
    prepared = prepare(recipe, device, parse_size(memory), team)
    if dry_run or output is None:
        if leads:
            display.plan(prepared.plan, prepared.recipe, as_json=as_json)
        return
    with (
        display.QuantizeProgress(prepared.recipe, quiet=as_json or not leads) as progress,
        asked_once(display.warned if leads else lambda _: None) as stop,
    ):
        report = execute(prepared, output, overwrite=overwrite, restart=restart, progress=progress, stop=stop)
    if leads:
        display.quantized(output, report, as_json=as_json)
