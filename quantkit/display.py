"""What a person sees: progress, tables, one-line errors. And what a program reads: one JSON object.

Progress goes to stderr and only to a terminal; results go to stdout.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from quantkit.pictures import bits_picture
from quantkit.units import human_size, human_time

if TYPE_CHECKING:
    from quantkit.calibrate.walk import BlockReport
    from quantkit.conversion import Exported
    from quantkit.planning import Plan
    from quantkit.recipe import Recipe

# what may happen to a block, by the name of the note, and what the block or model then has
_TROUBLE = {"fallback": "rounded to nearest", "diverged": "training diverged, its best pass was kept"}

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def warned(message: str) -> None:
    """Show what works, but not as well as it could, on one line beside the output."""
    _say(err, f"[bold yellow]warning:[/] {escape(message)}")


def failed(message: str, code: int, *, as_json: bool) -> None:
    """Show an error, on one line whatever a library put into the message."""
    message = " ".join(message.split())
    if as_json:
        print_json({"error": message, "exit_code": code})
    else:
        _say(err, f"[bold red]error:[/] {escape(message)}")


def plan(plan: "Plan", recipe: "Recipe", *, as_json: bool) -> None:
    """Show what a run would do."""
    if as_json:
        print_json(plan_facts(plan, recipe))
        return
    out.print(_plan_table(plan, recipe), "")
    out.print(_sites_table(plan), "")
    out.print(_presets_table(plan), "")
    print_notes(out, plan.notes)
    if plan.refusal:
        _say(out, f"[bold red]would be refused:[/] {escape(plan.refusal)}")


def plan_facts(plan: "Plan", recipe: "Recipe") -> dict[str, Any]:
    """Return the plan as the JSON object of `quantize --dry-run --json`."""
    text = recipe.calibration  # of all processes; the plan is that of one
    return {
        "model": recipe.model,
        "model_type": plan.model_type,
        "architecture": plan.architecture,
        "method": " + ".join(recipe.passes),
        "scheme": plan.scheme,
        "target_bpw": recipe.target_bpw,
        "bits_per_weight": plan.bits_per_weight,
        "blocks": plan.blocks,
        "parameters": plan.parameters,
        "quantized_parameters": plan.quantized_parameters,
        "sites": {name: list(shape) for name, shape in plan.shapes.items()},
        "dense": list(plan.dense),
        "calibration": {"text": text.text, "samples": text.samples, "seqlen": plan.seqlen},
        "device": str(plan.device),
        "output_bytes": plan.output_bytes,
        "spilled_bytes": plan.spilled_bytes,
        "disk_bytes": plan.disk_bytes,
        "memory_bytes": plan.memory_bytes,
        "memory_limit": plan.memory_limit,
        "device_bytes": plan.device_bytes,
        "seconds": plan.seconds,
        "presets": [asdict(cost) for cost in plan.presets],
        "refusal": plan.refusal,
        "notes": list(plan.notes),
    }


class Left(TimeRemainingColumn):
    """The time that is left, where it is known."""

    def render(self, task: Task) -> Text:
        """Return it, or nothing."""
        return Text("") if task.time_remaining is None else Text("left ", end="") + super().render(task)


class QuantizeProgress:
    """Follows a quantization on a terminal: the plan, a bar over the blocks with ETA, each block's error."""

    def __init__(self, recipe: "Recipe", *, quiet: bool) -> None:
        self.recipe = recipe
        self.counted = ""
        self.quiet = quiet or not (sys.stdout.isatty() and sys.stderr.isatty())
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            Left(),
            console=err,
            disable=self.quiet,
            transient=True,
        )
        self.task = self.bar.add_task("planning", total=None, count="")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def planned(self, plan: "Plan") -> None:
        """Show the plan in short."""
        if not self.quiet:
            self.bar.console.print(_plan_table(plan, self.recipe))
            print_notes(self.bar.console, plan.notes)

    def stage(self, name: str) -> None:
        """Name what is being done."""
        self.counted = name
        self.bar.reset(self.task, description=name, total=None, count="")

    def progress(self, done: float, total: int) -> None:
        """Move the bar."""
        count = f"block {min(int(done) + 1, total)} of {total}"
        if self.counted == "writing text":
            count = f"token {int(done):,} of {total:,}"
        elif self.counted == "distilling":  # all blocks at once
            count = f"{done / total:.0%}"
        self.bar.update(self.task, completed=done, total=total, count=count)

    def block(self, report: "BlockReport") -> None:
        """Show one block's error before and after."""
        if self.quiet:
            return
        change = report.error / report.error_rtn - 1 if report.error_rtn else 0.0
        notes = "".join(f"  [yellow]{name}: {report.notes[name]}[/]" for name in _TROUBLE if name in report.notes)
        learned = f" → {report.error:.3e} ({change:+.0%})" if report.error != report.error_rtn else ""
        self.bar.console.print(f"  block {report.index:>3}   error {report.error_rtn:.3e}{learned}{notes}")


@contextmanager
def status(text: str, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Show a spinner with a text that the yielded function replaces."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    with err.status(text) as spinner:
        yield spinner.update


def quantized(output: Path, report: Mapping[str, Any], *, as_json: bool) -> None:
    """Show what a run made."""
    if as_json:
        left_out = ("tensors", "sites", "sha256")
        print_json({"output": str(output), **{key: value for key, value in report.items() if key not in left_out}})
        return
    out.print(_result_table(output, report))
    if "allocation" in report:
        out.print(bits_picture(report["allocation"]["groups"]))
    print_notes(out, report["notes"])
    out.print(f"next: quantkit check {output}", markup=False)


def _result_table(output: Path, report: Mapping[str, Any]) -> Table:
    """One row per fact of a run's report."""
    measured, blocks = report["measured"], report["blocks"]
    before = sum(block["error_rtn"] for block in blocks) / len(blocks)
    after = sum(block["error"] for block in blocks) / len(blocks)
    table = facts_table(f"{output}")
    share = report["quantized_parameters"] / report["parameters"]
    table.add_row(
        "scheme",
        f"{report['scheme'].partition(',')[0]} by {report['method']}, {report['bits_per_weight']:.2f} bits per weight",
    )
    if share:
        table.add_row("quantized", f"{share:.1%} of {report['parameters']:,} parameters")
    for name, text in _pruned_rows(report.get("sparsity")):
        table.add_row(name, text)
    also = "".join(f", also as {name}" for name in report["formats"])
    table.add_row("size", f"{human_size(measured['output_bytes'])} of weights{also}")
    learned = f" → {after:.3e} kept ({after / before - 1:+.0%})" if before and after != before else ""
    table.add_row("block error", f"{before:.3e}{' rounding to nearest' * bool(share)}{learned}")
    for name, meaning in _TROUBLE.items():
        if affected := [str(block["index"]) for block in blocks if name in block["notes"]]:
            table.add_row(name, f"[yellow]{meaning} in block{'s' * (len(affected) > 1)} {', '.join(affected)}[/]")
    whole = report["whole"]
    if "divergence_after" in whole:
        before, after = whole["divergence_before"], whole["divergence_after"]
        change = f" ({after / before - 1:+.0%})" if before else ""
        table.add_row("divergence", f"{before:.3e} → {after:.3e} nats per token by distilling{change}")
    for name in _TROUBLE:
        if name in whole:
            table.add_row("distilling", f"[yellow]{name}: {whole[name]}[/]")
    table.add_row("took", f"{human_time(measured['seconds'])}, peak memory {_peak(report)}")
    return table


def _pruned_rows(facts: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    """Yield what is said of pruning, nothing if nothing was pruned."""
    if facts:
        yield "pruned", f"{facts['share']:.1%} of the weights of {len(facts['linears'])} linears"
        about = "about " * facts["estimated"]
        yield "compressed", f"{about}{human_size(facts['compressed_bytes'])} if {facts['compressor']} packs the files"


def checked(output: Path, faults: Sequence[str], facts: Mapping[str, Any], *, as_json: bool) -> None:
    """Show the result of a check."""
    if as_json:
        print_json({"output": str(output), "ok": not faults, "faults": list(faults), "facts": dict(facts)})
        return
    if facts:
        table = facts_table(f"{output}")
        for name, value in facts.items():
            table.add_row(name.replace("_", " "), _fact(name, value))
        out.print(table)
    for fault in faults:
        out.print(f"[bold red]fault:[/] {escape(fault)}")
    if not faults:
        out.print(f"[bold green]ok:[/] {escape(str(output))} is whole and computes what was calibrated")


def exported(made: "Sequence[Exported]", *, as_json: bool) -> None:
    """Show what was written in other formats."""
    if as_json:
        print_json({"exports": [{**asdict(each), "output": str(each.output)} for each in made]})
        return
    for each in made:
        out.print(f"{escape(each.format)}: {escape(str(each.output))}, {human_size(each.bytes)}")
        print_notes(out, each.notices)


def generated(prompt: str, text: str, *, as_json: bool) -> None:
    """Show a generated text."""
    if as_json:
        print_json({"prompt": prompt, "text": text})
    else:
        out.print(f"[dim]{escape(prompt)}[/]{escape(text)}")


def listed(kind: str, rows: Sequence[Mapping[str, str]], *, as_json: bool) -> None:
    """Show a list."""
    if as_json:
        print_json({kind: list(rows)})
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in rows[0]:
        table.add_column(column, no_wrap=column == next(iter(rows[0])))
    for row in rows:
        table.add_row(*(escape(cell) for cell in row.values()))
    Console(highlight=False).print(table)


def _peak(report: Mapping[str, Any]) -> str:
    measured, predicted = (human_size(report[when]["memory_bytes"]) for when in ("measured", "predicted"))
    return f"{measured} (predicted: {predicted})"


def _plan_table(plan: "Plan", recipe: "Recipe") -> Table:
    table = facts_table(f"{recipe.model}" + (f" @ {recipe.revision[:12]}" if recipe.revision else ""))
    text = recipe.calibration
    share = plan.quantized_parameters / plan.parameters
    method = ", ".join(f"{name} ({_options(step)})" for name, step in recipe.build_passes().items())
    described = f"described by {plan.architecture}.toml" if plan.architecture else "no architecture file"
    table.add_row("model", f"{plan.model_type}, {plan.blocks} blocks, {plan.parameters:,} parameters, {described}")
    table.add_row("method", escape(method.replace(" ()", "")))
    if plan.pruned:
        table.add_row("pruned", plan.pruned)
    most = "at most " if plan.budget and not plan.allocation else ""
    if plan.rounds:
        bits = f"{most}{plan.bits_per_weight:.2f} bits per weight with scales and zero points"
        table.add_row("scheme", f"{plan.scheme.partition(',')[0]}: {bits}")
        table.add_row("quantized", f"{len(plan.shapes)} linears, {share:.1%} of the parameters")
    table.add_row(
        "text",
        f"{escape(text.text)}, {text.samples} sequences of {plan.seqlen} tokens, {text.batch_size} per batch",
    )
    further = f", as much again as {' and '.join(plan.formats)}" if plan.formats else ""
    table.add_row("output", f"{most}{human_size(plan.output_bytes)} of weights{further}")
    if plan.spilled_bytes:
        table.add_row("disk", f"{human_size(plan.disk_bytes)}, {human_size(plan.spilled_bytes)} spilled")
    device = f", {human_size(plan.device_bytes)} on {plan.device}" if plan.device_bytes else f" on {plan.device}"
    table.add_row(
        "memory", f"about {human_size(plan.memory_bytes)} at the peak{device}; {human_size(plan.memory_limit)} allowed"
    )
    table.add_row("time", f"about {human_time(plan.seconds)}")
    return table


def _presets_table(plan: "Plan") -> Table:
    """What the presets would take, the one of the run marked; a run that is no preset is a row of its own."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("presets", "memory", *(("GPU memory",) if plan.device_bytes else ()), "time", ""):
        table.add_column(column, justify="left" if column in ("presets", "") else "right")
    rows: list[Any] = [(cost.name, cost, "this run" if cost.chosen else "", cost.fits) for cost in plan.presets]
    if not any(cost.chosen for cost in plan.presets):
        rows.append(("this run", plan, "this run", not plan.refusal))
    for name, cost, mark, fits in rows:
        device = (human_size(cost.device_bytes),) if plan.device_bytes else ()
        remarks = ", ".join(filter(None, (mark if mark != name else "", "" if fits else "[red]does not fit[/]")))
        cells = (name, human_size(cost.memory_bytes), *device, human_time(cost.seconds), remarks)
        table.add_row(*cells, style="bold" if mark else None)
    return table


def print_notes(console: Console, notes: Sequence[str]) -> None:
    """Print what one should know besides, one line each."""
    for note in notes:
        _say(console, f"[yellow]note:[/] {escape(note)}")


def _say(console: Console, text: str) -> None:
    """Print a sentence: one line for a program, broken between words on a terminal."""
    console.print(text, soft_wrap=not console.is_terminal)


def _sites_table(plan: "Plan") -> Table:
    """One row per kind of linear: the blocks repeat the same shapes."""
    kinds: dict[tuple[str, tuple[int, int]], int] = {}
    for name, shape in plan.shapes.items():
        local = ".".join("*" if part.isdecimal() else part for part in name.split("."))
        kinds[local, shape] = kinds.get((local, shape), 0) + 1
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("linears", "count", "shape", "scheme"):
        table.add_column(column, justify="left" if column in ("linears", "scheme") else "right")
    scheme = plan.scheme.partition(",")[0]
    for (local, (rows, columns)), count in kinds.items():
        table.add_row(local, str(count), f"{rows} × {columns}", scheme)
    return table


def facts_table(title: str) -> Table:
    """Return a table of two columns, a name and what is to be said, without a row yet."""
    table = Table(
        box=None,
        show_header=False,
        pad_edge=False,
        title=escape(title),
        title_justify="left",
        title_style="bold",
    )
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    return table


def _options(step: object) -> str:
    """Say what is not the method's default; recipe.toml spells out the rest."""
    values = {field.name: (getattr(step, field.name), field.default) for field in fields(step)}  # type: ignore[arg-type]
    return ", ".join(
        f"{name} {_said(value)}" for name, (value, default) in values.items() if value != default or name == "updates"
    )


def _said(value: object) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def _fact(name: str, value: object) -> str:
    if isinstance(value, int) and name.endswith("bytes"):
        return human_size(value)
    if isinstance(value, float):
        return f"{value:.1%}" if name.endswith("share") else f"{value:.6g}"
    return escape(f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))


def print_json(value: object) -> None:
    """Print the one object of `--json`."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
