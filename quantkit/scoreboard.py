"""What a person sees of evaluations and comparisons, and their JSON objects."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from quantkit.display import Left, err, facts_table, out, print_json, print_notes
from quantkit.errors import OutputError
from quantkit.units import human_size, human_time

if TYPE_CHECKING:
    from quantkit.api import Comparison
    from quantkit.evaluation.divergence import Divergence
    from quantkit.evaluation.perplexity import Perplexity
    from quantkit.evaluation.scores import Score, TaskScores
    from quantkit.merging import Merged

Facts = Mapping[str, Any]
_BAR = 40  # characters of the longest bar of the histogram


@contextmanager
def counting(*, quiet: bool) -> Iterator[Callable[..., None]]:
    """Show a bar with the time that is left; the yielded function is told (what, done, in all), 0 if not known.

    A fourth argument is text that stands beside the count.
    """
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"))
    disabled = quiet or not sys.stderr.isatty()
    with Progress(*columns, TimeElapsedColumn(), Left(), console=err, disable=disabled, transient=True) as bar:

        def tell(what: str, done: int, total: int, beside: str = "") -> None:
            if not bar.tasks or bar.tasks[0].description != what:
                for task in bar.task_ids:
                    bar.remove_task(task)
                bar.add_task(what, total=None, count="")
            count = ", ".join(filter(None, (f"{done:,} of {total:,}" if total else "", beside)))
            bar.update(bar.task_ids[0], completed=done, total=total or None, count=count)

        tell("starting", 0, 0)

        yield tell


@contextmanager
def learning(*, quiet: bool) -> Iterator[Callable[[Facts], None]]:
    """Show a bar over the steps; the yielded function is told the facts of `personal.loop.Loop.told`."""
    with counting(quiet=quiet) as tell:

        def told(facts: Facts) -> None:
            shown = "" if facts["validation"] is None else f", validation {facts['validation']:.4g}"
            what = f"loss {facts['loss']:.4g}{shown}, memory {human_size(facts['memory_bytes'])}"
            tell("personalizing", facts["step"], facts["steps"], what)

        yield told


def personalized(output: Path, report: Facts, *, as_json: bool) -> None:
    """Show what a personalization came to."""
    if as_json:
        print_json({"output": str(output), **report})
        return
    table = facts_table(f"{output}")
    table.add_row("trained", f"{report['train']}, {report['parameters']:,} parameters, by {report['gradient']}")
    table.add_row("examples", f"{report['examples']:,}, and {report['validation_examples']:,} to validate with")
    table.add_row("steps", f"{report['updates']['optimizer']}, learning rate {report['updates']['rate']:.3g}")
    if report["validations"]:
        first, best = report["validations"][0][1], min(loss for _, loss in report["validations"])
        table.add_row("validation", f"{first:.4g} → {best:.4g} at step {report['best_step']}")
    table.add_row("privacy", escape(str(report.get("ledger", "none"))))
    table.add_row("size", human_size(report["bytes"]))
    steps = f"{report['steps']:,} steps, {report['forwards']:,} forward passes"
    table.add_row(
        "took", f"{human_time(report['seconds'])}, {steps}, peak memory {human_size(report['peak_memory_bytes'])}"
    )
    out.print(table)
    if report["stopped"]:
        print_notes(out, [report["stopped"]])


def replayed(output: Path, report: Facts, *, as_json: bool) -> None:
    """Show what a journal came to."""
    if as_json:
        print_json({"output": str(output), **report})
    else:
        how = f"{report['steps']:,} steps of {report['gradient']} done again"
        out.print(f"{escape(str(output))}: {how}, {human_size(report['bytes'])}")


def merged(made: "Merged", *, as_json: bool) -> None:
    """Show what a merge wrote."""
    output, size, tensors = str(made.output), made.bytes, len(made.changed)
    if as_json:
        print_json({"output": output, "bytes": size, "changed_tensors": tensors, "notices": list(made.notices)})
    else:
        out.print(f"{escape(output)}: {human_size(size)}, {tensors} tensors differ from the base")
        print_notes(out, made.notices)


def refuse_output(file: Path | None) -> None:
    """Raise OutputError if a result could not be written to `file`; a file that exists is replaced."""
    if file is None:
        return
    if file.is_dir():
        raise OutputError(f"--output {file} is a directory; give a file to write the JSON object to")
    if not file.absolute().parent.is_dir():
        raise OutputError(f"--output {file} cannot be written: the directory {file.absolute().parent} does not exist")


def evaluated(  # noqa: PLR0913
    model: str,
    against: str | None,
    where: Facts,
    result: "Perplexity",
    *,
    runtime: str,
    as_json: bool,
    output: Path | None = None,
) -> None:
    """Show a perplexity, and beside it that of another model on the same windows."""
    facts: dict[str, Any] = {"model": model, **where, "runtime": runtime, **_perplexity(result)}
    if result.reference is not None:
        facts["against"] = {"model": against, **_perplexity(result.reference)}
    if _put(facts, as_json=as_json, output=output):
        return
    of = f"{where['text']}, {result.windows} windows of {where['seqlen']}, {result.tokens:,} tokens scored"
    if result.reference is None:
        out.print(f"{escape(model)}: perplexity [bold]{result.perplexity:.4f}[/] ({escape(of)})")
        return
    table = Table(box=None, pad_edge=False, show_header=False, title=escape(of), title_justify="left")
    for name, each in ((model, result), (str(against), result.reference)):
        change = f"{result.perplexity / result.reference.perplexity - 1:+.2%}" if each is result else ""
        table.add_row(escape(name), f"perplexity [bold]{each.perplexity:.4f}[/]", change)
    out.print(table)


def scored(  # noqa: PLR0913
    model: str,
    against: str | None,
    result: "TaskScores",
    options: Facts,
    *,
    runtime: str,
    as_json: bool,
    output: Path | None = None,
) -> None:
    """Show what a model scores in tasks; `options` are those of the run, for the JSON object."""
    facts = {
        "model": model,
        **({"against": against} if against else {}),
        "runtime": runtime,
        **options,
        **_task_facts(result),
    }
    if _put(facts, as_json=as_json, output=output):
        return
    _print_scores(model, against, result)


def compared(
    model: str, reference: str, result: "Comparison", options: Facts, *, as_json: bool, output: Path | None = None
) -> None:
    """Show how far a model is from a reference."""
    measured = result.divergence
    facts = {"model": model, "reference": reference, **options, **_divergence_facts(measured)}
    if result.tasks is not None:
        facts |= _task_facts(result.tasks)
    if _put(facts, as_json=as_json, output=output):
        return
    table = facts_table(f"{model} against {reference}")
    where = f"{options['text']}, windows of {options['seqlen']}, {measured.tokens:,} tokens predicted"
    table.add_row("text", escape(where))
    change = measured.perplexity / measured.reference_perplexity - 1
    perplexities = f"{measured.perplexity:.4f}, the reference's {measured.reference_perplexity:.4f} ({change:+.2%})"
    table.add_row("perplexity", perplexities)
    table.add_row("top-1", f"the same token is the likeliest at {measured.top1_agreement:.2%} of the positions")
    spread = f"median {measured.kl_median:.3g}, 99th percentile {measured.kl_p99:.3g}, largest {measured.kl_max:.3g}"
    table.add_row("divergence", f"mean [bold]{measured.kl:.3g}[/], {spread} nats per token")
    out.print(table, "", _histogram(measured))
    if result.tasks is not None:
        out.print("")
        _print_scores(model, reference, result.tasks)


def _perplexity(result: "Perplexity") -> dict[str, Any]:
    return {name: value for name, value in asdict(result).items() if name != "reference"}


def _divergence_facts(measured: "Divergence") -> dict[str, Any]:
    from quantkit.evaluation.divergence import EDGES

    counts = list(measured.kl_histogram)
    return {**asdict(measured), "kl_histogram": {"edges": list(EDGES), "counts": counts}}


def _task_facts(result: "TaskScores") -> dict[str, Any]:
    """Return scores and flips as the JSON object has them."""
    rows = []
    for score, other in result.pairs():
        row = {name: value for name, value in asdict(score).items() if name != "right"}
        if other is not None:
            row["against"] = {"value": other.value, "stderr": other.stderr}
            row["difference"] = score.value - other.value
        rows.append(row)
    flips = [{**asdict(each), "share": each.share} for each in result.flips]
    return {"tasks": rows, **({"flips": flips} if result.reference else {}), "notes": _notes(result)}


def _print_scores(model: str, against: str | None, result: "TaskScores") -> None:
    # no terminal, no width to fit: a file gets one line per row
    console = out if out.is_terminal else Console(highlight=False, width=1000)
    console.print(_scores_table(model, against, result))
    print_notes(out, _notes(result))


def _notes(result: "TaskScores") -> list[str]:
    """Return the notes of both models, those that are the same once."""
    return list(dict.fromkeys([*result.notes, *(result.reference.notes if result.reference else ())]))


def _scores_table(model: str, against: str | None, result: "TaskScores") -> Table:
    """One row per metric; lost and won are the answers that turned from right to wrong and from wrong to right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("task", overflow="fold", min_width=8)
    table.add_column("metric", no_wrap=True)
    compared_with = (_last_part(against), "change", "lost", "won") if against else ()
    for name in ("n", _last_part(model), *compared_with):
        table.add_column(escape(name), justify="right", overflow="fold")
    flips = {(each.task, each.metric, each.filter): each for each in result.flips}
    for score, other in result.pairs():
        cells = [escape(_task_name(score)), _metric_name(score), f"{score.samples:,}", _value(score)]
        if other is not None:
            turned = flips.get(score.key)
            difference = score.value - other.value
            cells += [_value(other), "+" * (difference >= 0) + _number(difference)]
            cells += [str(turned.to_wrong), str(turned.to_right)] if turned else []
        table.add_row(*cells)
    return table


def _histogram(measured: "Divergence") -> Table:
    """One row per decade of the divergence, with a bar for the share of positions in it."""
    from quantkit.evaluation.divergence import EDGES

    edges = [f"{edge:g}".replace("e-0", "e-") for edge in EDGES]
    names = [f"below {edges[0]}", *(f"{low} to {high}" for low, high in pairwise(edges)), f"{edges[-1]} and more"]
    counts = measured.kl_histogram
    seen = [index for index, count in enumerate(counts) if count]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("nats", justify="right")
    table.add_column("positions", justify="right")
    table.add_column("")
    for index in range(seen[0], seen[-1] + 1):
        bar = "█" * round(_BAR * counts[index] / max(counts)) or ("▏" if counts[index] else "")
        table.add_row(names[index], f"{counts[index] / measured.tokens:.1%}", f"[cyan]{bar}[/]")
    return table


def _task_name(score: "Score") -> str:
    return f"{score.task} ({score.num_fewshot}-shot)" if score.num_fewshot else score.task


def _metric_name(score: "Score") -> str:
    better = {True: " ↑", False: " ↓", None: ""}[score.higher_is_better]
    filtered = "" if score.filter == "none" else f", {score.filter}"
    return escape(f"{score.metric}{filtered}{better}")


def _value(score: "Score") -> str:
    return f"[bold]{_number(score.value)}[/]" + (f" ± {_number(score.stderr)}" if score.stderr is not None else "")


def _number(value: float) -> str:
    if abs(value) < 100:  # most metrics are shares
        return f"{value:.4f}"
    return f"{value:.1f}" if abs(value) < 1e5 else f"{value:.4g}"


def _last_part(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2]


def _put(facts: Facts, *, as_json: bool, output: Path | None) -> bool:
    """Write and print the JSON object as asked; return whether that is all there is to be shown."""
    if output is not None:
        try:
            output.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"--output {output} cannot be written: {error.strerror}") from error
    if as_json:
        print_json(facts)
    return as_json
