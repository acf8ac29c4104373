"""A figure of fault campaigns: the metric against the rate of faults, several protections in one."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quantkit.errors import OutputError, UsageError
from quantkit.untrusted import parse_json, read_document

_NEEDED = ("rows", "protection", "targets", "metric", "sweep", "baseline")
_COLOURS = (
    "#444444",
    "#1f77b4",
    "#ff7f0e",
    "#2ca02c",
    "#d62728",
    "#9467bd",
    "#8c564b",
    "#e377c2",
    "#17becf",
    "#bcbd22",
)
ENDINGS = (".svg", ".png", ".pdf")
_SALT = "quantkit"  # so that the same figure is the same file


def read_results(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the JSON objects of campaigns.

    Raises:
        UsageError: a file that is no such object, or campaigns that do not belong into one figure.
    """
    found = []
    for file in files:
        try:
            facts = parse_json(read_document(file))
            if not all(name in facts for name in _NEEDED):
                raise ValueError(f"it lacks {', '.join(name for name in _NEEDED if name not in facts)}")
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"{file} is no result of quantkit faults ({error}); give the files of --output") from error
        found.append(facts)
    for facts, file in zip(found, files, strict=True):
        if facts["sweep"] == "tensors":
            raise UsageError(f"{file} is a sweep over tensors, of which there is a table and no figure")
        if any(facts[name] != found[0][name] for name in ("sweep", "metric")):
            raise UsageError(f"{file} and {files[0]} are of different sweeps or metrics; draw them apart")
    return found


def refuse_undrawable(figure: Path) -> None:
    """Raise UsageError or OutputError if there is no matplotlib, or `figure` could not be written."""
    if find_spec("matplotlib") is None:
        raise UsageError("figures need matplotlib; install it with pip install 'quantkit[study]'")
    if figure.suffix not in ENDINGS:
        raise UsageError(f"--plot {figure} cannot be drawn; use {', '.join(ENDINGS)}")
    if not figure.absolute().parent.is_dir():
        raise OutputError(f"--plot {figure} cannot be written: {figure.absolute().parent} does not exist")


def draw(results: Sequence[Mapping[str, Any]], figure: Path, labels: Sequence[str] = ()) -> None:
    """Draw campaigns into an SVG, PNG or PDF: medians with their 95 % confidence, the worse 5 %, what is not finite.

    Raises:
        UsageError, OutputError: see `refuse_undrawable`; the disk is full.
    """
    refuse_undrawable(figure)
    from matplotlib import rc_context  # an extra of its own, which takes a second to import
    from matplotlib.figure import Figure

    heights = (3, 2, 1) if results[0]["metric"] == "perplexity" else (3, 1)  # a part of it is drawn larger
    drawing = Figure(figsize=(9, 1.6 * sum(heights)), layout="constrained")
    *above, below = drawing.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    top = _top(results)
    for number, facts in enumerate(results):
        label = labels[number] if labels else name_of(facts)
        style = {"color": _COLOURS[number % len(_COLOURS)], "label": label}
        for axes in above:
            _curve(axes, facts, style, top)
        _lost(below, facts, style)
    _describe(above, below, results)
    try:
        with rc_context({"svg.hashsalt": _SALT}):
            drawing.savefig(figure, metadata={"Date": None} if figure.suffix == ".svg" else None)
    except OSError as error:
        raise OutputError(f"--plot {figure} cannot be written: {error.strerror}; give another file") from error


def name_of(facts: Mapping[str, Any]) -> str:
    """Return what protects the model of a campaign."""
    kinds = [f"{kind} {name}" for name, kind in facts["protection"].items() if kind]
    return " + ".join(kinds) or "no protection"


def _top(results: Sequence[Mapping[str, Any]]) -> float:
    """Return where what is not finite is drawn: above everything that is."""
    values = [row[name] for facts in results for row in facts["rows"] for name in ("median", "p95", "high")]
    return 3 * max((value for value in values if value is not None), default=1.0)


def _places(facts: Mapping[str, Any]) -> list[float]:
    return [float(row["condition"]) for row in facts["rows"]]


def _curve(axes: Any, facts: Mapping[str, Any], style: dict[str, Any], top: float) -> None:  # noqa: ANN401
    rows, places = facts["rows"], _places(facts)
    worst = 0.0 if facts["metric"] == "task" else top

    def column(name: str) -> list[float]:
        return [worst if row[name] is None else row[name] for row in rows]

    axes.plot(places, column("median"), marker="o", markersize=3, **style)
    axes.fill_between(places, column("low"), column("high"), color=style["color"], alpha=0.15, linewidth=0)
    axes.plot(places, column("p95"), color=style["color"], linewidth=0.9, linestyle=":")


def _lost(axes: Any, facts: Mapping[str, Any], style: dict[str, Any]) -> None:  # noqa: ANN401
    axes.plot(_places(facts), [100 * row["not_finite"] for row in facts["rows"]], marker="o", markersize=3, **style)


def _describe(above: Sequence[Any], below: Any, results: Sequence[Mapping[str, Any]]) -> None:  # noqa: ANN401
    facts, baselines = results[0], [each["baseline"] for each in results]
    rates = facts["sweep"] == "rates"
    if facts["metric"] == "perplexity":
        above[0].set_yscale("log")
        above[1].set_ylim(0.99 * min(baselines), 1.12 * max(baselines))
        above[1].set_ylabel("the same, near what\nit is without faults")
    if rates and all(float(row["condition"]) > 0 for row in facts["rows"]):
        above[0].set_xscale("log")
    above[0].set_ylabel(f"{facts.get('task') or facts['metric']}, median (band: 95 %)\ndotted: worst 5 %")
    below.set_ylabel("NaN or Inf, %")
    below.set_ylim(-3, 103)
    below.set_xlabel(
        f"probability that a bit of {', '.join(facts['targets'])} is hit" if rates else "bit of a value that is flipped"
    )
    above[0].legend(fontsize=8, loc="upper left")
    for axes in (*above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    for axes in above:
        axes.axhline(baselines[0], color="black", linewidth=0.5)
