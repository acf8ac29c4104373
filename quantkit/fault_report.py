"""What a fault campaign found: the metric's distribution at each rate, and which tensors the harm is due to."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, pvariance
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Row:
    """The trials of one rate, bit or tensor.

    Quantiles count NaN and infinity as the worst there is, and are None where they fall on one; the mean leaves these
    out. `low` and `high` hold the median with 95 % confidence, see `median_range`.

    Attributes:
        condition: the rate, the bit or the tensor.
        trials: how many were run.
        flips: bits changed in a trial, on average.
        median, p5, p95, low, high, mean: of the metric; p95 is towards the worse side.
        not_finite: share of trials whose metric is NaN or infinite.
        corrected, replaced: scales that the protection put right or replaced in a trial, on average.
    """

    condition: str
    trials: int
    flips: float
    median: float | None
    p5: float | None
    p95: float | None
    low: float | None
    high: float | None
    mean: float | None
    not_finite: float
    corrected: float
    replaced: float


@dataclass(frozen=True, kw_only=True)
class Blame:
    """A tensor, how many of its bits changed in all trials, and how much worse trials are in which it was hit.

    `harm` compares trials of one condition, those in which the tensor was hit with the others, by their mean distance
    from the metric without faults: on a logarithmic scale for perplexity, where NaN counts as `WORST` and nothing more.
    Of several conditions the mean, weighted by 1 / (1/hit + 1/others). Hit in all trials or in none, a tensor tells
    nothing; the sweep over tensors does.

    `error` is the standard error of `harm`. Among many tensors some are harmful by chance, which it tells apart: those
    come first whose harm is the largest multiple of it.
    """

    tensor: str
    flips: int
    harm: float
    error: float


WORST = math.log(1e6)


@dataclass(frozen=True, kw_only=True)
class FaultReport:
    """A campaign's result.

    Attributes:
        about: what was done: model, targets, protection, metric, baseline and so on.
        rows: one for each condition.
        blame: the most vulnerable tensors first.
        values: for each condition, the metric of each trial.
    """

    about: Mapping[str, Any]
    rows: tuple[Row, ...]
    blame: tuple[Blame, ...]
    values: Mapping[str, tuple[float, ...]]

    def facts(self) -> dict[str, Any]:
        """Return the JSON object; what is not finite is a string."""
        return {
            **self.about,
            "rows": [asdict(row) for row in self.rows],
            "tensors": [asdict(each) for each in self.blame],
            "values": {name: [v if math.isfinite(v) else str(v) for v in found] for name, found in self.values.items()},
        }


def summarize(
    about: Mapping[str, Any], labels: Sequence[str], trials: int, done: Mapping[tuple[str, int], Mapping[str, Any]]
) -> FaultReport:
    """Return the report of the finished trials."""
    higher = about["metric"] == "task"
    lines = {label: [done[label, number] for number in range(trials)] for label in labels}
    values = {label: tuple(float(line["value"]) for line in found) for label, found in lines.items()}
    return FaultReport(
        about=about,
        rows=tuple(_row(label, found, values[label], higher) for label, found in lines.items()),
        blame=tuple(_blame(list(lines.values()), float(about["baseline"]), higher)),
        values=values,
    )


def quantile(ordered: Sequence[float], share: float) -> float | None:
    """Return the value below which `share` of the ordered values are, None if it is not finite."""
    value = ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]
    return value if math.isfinite(value) else None


def from_good_to_bad(values: Sequence[float], *, higher: bool) -> list[float]:
    """Return the values ordered, what is not finite as infinity at the bad end."""
    finite = sorted((value for value in values if math.isfinite(value)), reverse=higher)
    return finite + [math.inf] * (len(values) - len(finite))


def _row(label: str, lines: Sequence[Mapping[str, Any]], values: Sequence[float], higher: bool) -> Row:
    ordered, count = from_good_to_bad(values, higher=higher), len(values)
    finite = [value for value in values if math.isfinite(value)]
    low, high = median_range(ordered)
    return Row(
        condition=label,
        trials=count,
        flips=sum(sum(line["flips"].values()) for line in lines) / count,
        median=quantile(ordered, 0.5),
        p5=quantile(ordered, 0.05),
        p95=quantile(ordered, 0.95),
        low=low,
        high=high,
        mean=sum(finite) / len(finite) if finite else None,
        not_finite=1 - len(finite) / count,
        corrected=sum(line["corrected"] for line in lines) / count,
        replaced=sum(line["replaced"] for line in lines) / count,
    )


def median_range(ordered: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the values between which the median is with 95 % confidence: order statistics, whatever the distribution.

    Ranks n/2 ± 1.96 √n/2, from the normal limit of the binomial number of values below the median.
    """
    half, middle = 0.98 * math.sqrt(len(ordered)), (len(ordered) - 1) / 2
    ranks = max(0, math.floor(middle - half)), min(len(ordered) - 1, math.ceil(middle + half))
    low, high = (ordered[rank] if math.isfinite(ordered[rank]) else None for rank in ranks)
    return low, high


def _blame(conditions: Sequence[Sequence[Mapping[str, Any]]], baseline: float, higher: bool) -> list[Blame]:
    found = []
    harms = [[harm(float(line["value"]), baseline, higher=higher) for line in lines] for lines in conditions]
    for name in {name for lines in conditions for line in lines for name in line["flips"]}:
        weight, total, variance = 0.0, 0.0, 0.0
        for lines, values in zip(conditions, harms, strict=True):
            hit = [value for line, value in zip(lines, values, strict=True) if name in line["flips"]]
            others = [value for line, value in zip(lines, values, strict=True) if name not in line["flips"]]
            if hit and others:
                precision = 1 / (1 / len(hit) + 1 / len(others))
                weight += precision
                total += precision * (fmean(hit) - fmean(others))
                variance += precision * pvariance(values)
        if weight:
            flips = sum(line["flips"].get(name, 0) for lines in conditions for line in lines)
            error = math.sqrt(variance) / weight
            found.append(Blame(tensor=name, flips=flips, harm=total / weight, error=error))
    return sorted(found, key=lambda each: (-each.harm / max(each.error, 1e-12), each.tensor))


def harm(value: float, baseline: float, *, higher: bool) -> float:
    """Return how far a metric is from that without faults; see `Blame`."""
    if higher:
        return baseline - value if math.isfinite(value) else baseline
    return min(WORST, max(0.0, math.log(value / baseline))) if math.isfinite(value) and value > 0 else WORST
