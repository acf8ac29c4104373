"""What a person sees of a fault campaign."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from quantkit.display import facts_table, out, print_json
from quantkit.units import human_time

if TYPE_CHECKING:
    from quantkit.campaign import FaultPlan
    from quantkit.fault_report import FaultReport, Row

MOST = 10  # tensors that are shown


def planned(model: str, plan: "FaultPlan", *, as_json: bool) -> None:
    """Show what a campaign will cost."""
    if as_json:
        print_json({"model": model, **vars(plan)})
        return
    table = facts_table(model)
    bits = ", ".join(f"{count:,} of {target}" for target, count in plan.bits.items()) or "none that are stored"
    table.add_row("bits", bits)
    table.add_row("without faults", f"{plan.baseline:.6g}")
    table.add_row("trials", f"{plan.trials:,} of {plan.conditions} kinds, {plan.finished:,} of them finished")
    table.add_row("time", f"about {human_time(plan.seconds)}")
    out.print(table)


def reported(report: "FaultReport", *, as_json: bool) -> None:
    """Show what a campaign found: a row for each rate, bit or tensor, and the most vulnerable tensors."""
    if as_json:
        print_json(report.facts())
        return
    about, wide = report.about, Console(highlight=False)
    out.print(escape(_heading(about)))
    wide.print(_rows(report))
    harmful = [each for each in report.blame[:MOST] if each.harm > 0]
    if about["sweep"] != "tensors" and harmful:
        table = Table(box=None, pad_edge=False, header_style="bold", title="most vulnerable", title_justify="left")
        for column in ("tensor", "flips", "harm where hit"):
            table.add_column(column, justify="left" if column == "tensor" else "right")
        for each in harmful:
            table.add_row(escape(each.tensor), f"{each.flips:,}", f"{each.harm:.3g} ± {each.error:.2g}")
        wide.print(table)


def _heading(about: Mapping[str, Any]) -> str:
    kinds = [f"{kind} {name}" for name, kind in about["protection"].items() if kind]
    fault = about["fault"]["kind"] + (f" of {about['fault']['length']}" if about["fault"]["kind"] == "burst" else "")
    what = about["task"] or "perplexity"
    return (
        f"{about['model']}: {what} {about['baseline']:.4g} without faults; {fault} in {', '.join(about['targets'])}; "
        f"protection: {', '.join(kinds) or 'none'}"
    )


def _rows(report: "FaultReport") -> Table:
    by_tensor = report.about["sweep"] == "tensors"
    rows = (
        sorted(report.rows, key=_badness, reverse=report.about["metric"] != "task")[:MOST] if by_tensor else report.rows
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ({"rates": "rate", "bits": "bit"}.get(report.about["sweep"], "tensor"), "flips", "median"):
        table.add_column(column, justify="left" if column == "tensor" else "right")
    for column in ("mean of finite", "best 5 %", "worst 5 %", "NaN or Inf", "repaired"):
        table.add_column(column, justify="right")
    for row in rows:
        numbers = (_number(value) for value in (row.median, row.mean, row.p5, row.p95))
        repaired = f"{row.corrected + row.replaced:.3g}" if report.about["protection"]["scales"] else ""
        table.add_row(escape(row.condition), f"{row.flips:.3g}", *numbers, f"{row.not_finite:.0%}", repaired)
    return table


def _badness(row: "Row") -> tuple[float, float]:
    return row.not_finite, row.mean if row.mean is not None else float("inf")


def _number(value: float | None) -> str:
    return "NaN/Inf" if value is None else f"{value:.4g}"
