"""Tables and plots of the study, beside the figures that it published."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot
from matplotlib.axes import Axes
from rnn_graphs import FAMILIES, PROPERTIES, pearson
from rnn_training import KINDS

Finished = Sequence[tuple[dict[str, Any], dict[str, Any]]]

TARGETS = {"ih": "input-to-hidden", "hh": "hidden-to-hidden", "both": "both"}
SAFE = 0.01  # a level is safe if no level up to it costs more accuracy than this
# arXiv 2407.20601 and its repository, in the order of KINDS
PUBLISHED_SAFE = {"ih": (70, 70, 70, 80), "hh": (80, 70, 90, 90), "both": (80, 70, 60, 80)}
PUBLISHED_MEANS = {"ws": (0.893, 0.829, 0.976, 0.984), "ba": (0.842, 0.728, 0.916, 0.928)}
PUBLISHED_CORRELATIONS = {
    "nodes": (0.40, 0.44, 0.44, 0.49),
    "edges": (0.38, 0.43, 0.42, 0.49),
    "source nodes": (0.35, 0.47, 0.57, 0.74),
    "density": (0.29, 0.15, 0.29, 0.34),
    "diameter": (-0.23, -0.27, -0.32, -0.20),
    "average shortest path": (-0.27, -0.25, -0.36, -0.23),
    "degree variance": (-0.28, -0.26, -0.39, -0.58),
    "closeness variance": (-0.46, -0.39, -0.51, -0.67),
    "node betweenness variance": (-0.49, -0.41, -0.56, -0.52),
    "edge betweenness variance": (-0.34, -0.30, -0.44, -0.26),
}


def tables(finished: Finished) -> str:
    """Return every table that there is something for, as Markdown."""
    parts = (dense, accuracies, safe, means, correlations)
    return "\n\n".join(text for part in parts if (text := part(finished)))


def dense(finished: Finished) -> str:
    """Return how well the dense networks do and how long they were trained."""
    rows = [
        (KINDS[job["kind"]], str(len(run["accuracies"])), _share(run["accuracies"][-1]))
        for job, run in finished
        if job["part"] == "train"
    ]
    blind = {run["memoryless"] for job, run in finished if job["part"] == "train"}
    note = f"\n\nThe last letter alone gives {_share(max(blind))}." if blind else ""
    return _markdown(("network", "epochs", "test accuracy"), rows) + note if rows else ""


def accuracies(finished: Finished) -> str:
    """Return accuracies right after pruning and after the first and the last epoch with the mask, a row per level."""
    rows = []
    for target, name in TARGETS.items():
        for percent in _levels(finished):
            runs = [_pruned(finished, kind, target, percent) for kind in KINDS]
            rows.append((f"{name} {percent} %", *map(_path, runs)))
    return _markdown(("pruned", *KINDS.values()), rows) if rows else ""


def safe(finished: Finished) -> str:
    """Return the highest safe level, right after pruning and after one epoch, beside the published ones."""
    if not _levels(finished):
        return ""
    rows = []
    for target, name in TARGETS.items():
        for place, after in ((1, "right after"), (2, "one epoch later")):
            rows.append((f"{name}, {after}", *(_level(finished, kind, target, place) for kind in KINDS)))
        rows.append((f"{name}, published", *(f"{level} %" for level in PUBLISHED_SAFE[target])))
    return _markdown(("safe level", *KINDS.values()), rows)


def means(finished: Finished) -> str:
    """Return mean accuracies of the random structures by family, with their number, beside the published ones."""
    if not _graphs(finished):
        return ""
    rows = []
    for family, name in FAMILIES.items():
        found = [[run["accuracy"] for _, run in _graphs(finished, kind, family)] for kind in KINDS]
        rows.append((name, *(f"{_share(sum(runs) / len(runs))} of {len(runs)}" if runs else "–" for runs in found)))
        rows.append((f"{name}, published", *(f"{mean:.3f} of 100" for mean in PUBLISHED_MEANS[family])))
    return _markdown(("mean accuracy", *KINDS.values()), rows)


def correlations(finished: Finished) -> str:
    """Return Pearson correlations of graph properties with accuracy, ours and the published ones."""
    rows = []
    for name in PROPERTIES if _graphs(finished) else ():
        cells = []
        for kind, published in zip(KINDS, PUBLISHED_CORRELATIONS[name], strict=True):
            runs = [run for _, run in _graphs(finished, kind)]
            own = pearson([run["properties"][name] for run in runs], [run["accuracy"] for run in runs])
            cells.append(f"{own:+.2f} ({published:+.2f})")
        rows.append((name, *cells))
    return _markdown(("correlation with accuracy (published)", *KINDS.values()), rows) if rows else ""


def plots(finished: Finished, directory: Path) -> list[Path]:
    """Draw what there is into `directory` and return the files."""
    directory.mkdir(parents=True, exist_ok=True)
    mpl.rcParams |= {
        "svg.hashsalt": "quantkit",
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.grid": True,
        "grid.alpha": 0.3,
    }
    drawn = []
    for name, draw, wanted in (
        ("levels", _draw_levels, _levels(finished)),
        ("recovery", _draw_recovery, _levels(finished)),
        ("graphs", _draw_graphs, _graphs(finished)),
    ):
        if wanted:
            figure, axes = pyplot.subplots(1, len(KINDS), figsize=(12, 3.2), sharey=True, layout="constrained")
            for panel, kind in zip(axes, KINDS, strict=True):
                panel.set_title(KINDS[kind])
                draw(panel, finished, kind)
            axes[0].set_ylabel("test accuracy")
            figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
            path = directory / f"rnn-pruning-{name}.svg"
            figure.savefig(path, metadata={"Date": None})
            pyplot.close(figure)
            drawn.append(path)
    return drawn


def _draw_levels(panel: Axes, finished: Finished, kind: str) -> None:
    for colour, (target, name) in zip(("C0", "C1", "C2"), TARGETS.items(), strict=True):
        runs = {level: _pruned(finished, kind, target, level) for level in _levels(finished)}
        found = {level: run for level, run in runs.items() if run}
        panel.plot([*found], [run[1] for run in found.values()], f"{colour}o--", label=f"{name}, right after", ms=3)
        panel.plot([*found], [run[2] for run in found.values()], f"{colour}s-", label="one epoch later", ms=3)
    panel.set_xlabel("pruned, %")


def _draw_recovery(panel: Axes, finished: Finished, kind: str) -> None:
    for colour, (target, percent) in enumerate((t, p) for t in ("both", "hh") for p in (80, 90, 100)):
        run = _pruned(finished, kind, target, percent)
        if run:
            panel.plot(range(len(run) - 1), run[1:], f"C{colour}.-", label=f"{TARGETS[target]} {percent} %")
    panel.set_xlabel("epochs with the mask")


def _draw_graphs(panel: Axes, finished: Finished, kind: str) -> None:
    for colour, (family, name) in enumerate(FAMILIES.items()):
        runs = [run for _, run in _graphs(finished, kind, family)]
        sources = [run["properties"]["source nodes"] for run in runs]
        panel.plot(sources, [run["accuracy"] for run in runs], f"C{colour}o", label=name, ms=4, alpha=0.7)
    panel.set_xlabel("source nodes")


def _levels(finished: Finished) -> list[int]:
    return sorted({job["percent"] for job, _ in finished if job["part"] == "prune"})


def _pruned(finished: Finished, kind: str, target: str, percent: int) -> list[float]:
    """Return the accuracies of one configuration: dense, right after pruning, after each epoch; none if unfinished."""
    wanted = {"part": "prune", "kind": kind, "target": target, "percent": percent}
    return next((run["accuracies"] for job, run in finished if job == wanted), [])


def _graphs(finished: Finished, kind: str | None = None, family: str | None = None) -> Finished:
    return [
        (job, run)
        for job, run in finished
        if job["part"] == "graph" and kind in (None, job["kind"]) and family in (None, job["family"])
    ]


def _path(run: Sequence[float]) -> str:
    """Return `after pruning → after one epoch`, and the last epoch where there were more."""
    if not run:
        return "–"
    last = f" → {_share(run[-1])} ({len(run) - 2})" if len(run) > 3 else ""
    return f"{_share(run[1])} → {_share(run[2])}{last}"


def _level(finished: Finished, kind: str, target: str, place: int) -> str:
    best = "none"
    for percent in _levels(finished):
        run = _pruned(finished, kind, target, percent)
        if not run or run[place] < run[0] - SAFE:
            break
        best = f"{percent} %"
    return best


def _share(value: float) -> str:
    return f"{value:.3f}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
