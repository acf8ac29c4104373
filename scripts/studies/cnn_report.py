"""Tables and the plot of the study of bounded activations."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot

Rows = Sequence[Mapping[str, Any]]
SHOWN = ("none", "ranger", "layer", "hybrid", "neuron")
ORDER = (("none", "ranger"), ("ranger", "layer"), ("layer", "hybrid"))  # what ProAct claims of high rates
COLOURS = {"none": "#666666", "ranger": "#c8553d", "layer": "#e0a030", "hybrid": "#2a7f62", "neuron": "#3d6fb4"}


def tables(rows: Rows) -> str:
    """Return every table as Markdown."""
    return "\n\n".join((accuracies(rows), claims(rows), made(rows)))


def accuracies(rows: Rows) -> str:
    """Return mean accuracy and its 95 % band, a row for each protection."""
    rates = list(rows[0]["points"])
    body = [
        (row["name"], f"{100 * row['clean']:.1f}", *(_point(row["points"][rate]) for rate in rates)) for row in rows
    ]
    return _markdown(("protection", "no faults", *(f"{float(rate):.0e}" for rate in rates)), body)


def claims(rows: Rows) -> str:
    """Return, for each rate, whether the order holds: bands apart, means in order, or not."""
    by_name = {row["name"]: row for row in rows}
    rates = list(rows[0]["points"])
    body = []
    for worse, better in ORDER:
        if worse in by_name and better in by_name:
            pairs = ((by_name[worse]["points"][rate], by_name[better]["points"][rate]) for rate in rates)
            body.append((f"{worse} < {better}", *(verdict(*pair) for pair in pairs)))
    return _markdown(("order", *(f"{float(rate):.0e}" for rate in rates)), body)


def verdict(worse: Sequence[float], better: Sequence[float]) -> str:
    """Return in a word how two means with half widths of their bands compare."""
    if worse[0] + worse[1] < better[0] - better[1]:
        return "yes"
    if better[0] + better[1] < worse[0] - worse[1]:
        return "reversed"
    return "bands overlap"


def made(rows: Rows) -> str:
    """Return how thresholds were found, what they take, and what faults in them alone do."""
    body = [
        (
            row["name"],
            row["method"],
            ", ".join(f"{factor:.2f}" for factor in row.get("factors", [])) or "–",
            f"{row['damage']:+.2f}",
            f"{row['bytes']:,}",
            _point(row["bounds_alone"]),
        )
        for row in rows
        if row["bounds_alone"]
    ]
    heads = ("protection", "method", "thresholds, share of the largest", "points lost, held out", "bytes")
    return _markdown((*heads, "accuracy, 1e-3 in thresholds alone"), body)


def plot(rows: Rows, path: Path) -> None:
    """Draw accuracy against the rate, with its bands."""
    mpl.rcParams.update({"svg.hashsalt": "quantkit", "font.size": 10})
    figure, axes = pyplot.subplots(figsize=(6.4, 3.8))
    for row in rows:
        if row["name"] in SHOWN:
            rates = [float(rate) for rate in row["points"]]
            middle = [100 * point[0] for point in row["points"].values()]
            width = [100 * point[1] for point in row["points"].values()]
            colour = COLOURS[row["name"]]
            axes.plot(rates, middle, marker="o", markersize=3, color=colour, label=row["name"])
            low, high = ([m + sign * w for m, w in zip(middle, width, strict=True)] for sign in (-1, 1))
            axes.fill_between(rates, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set(xscale="log", xlabel="share of bits flipped", ylabel="accuracy, %", ylim=(0, 102))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _point(point: Sequence[float]) -> str:
    return f"{100 * point[0]:.1f} ± {100 * point[1]:.1f}"


def _markdown(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
