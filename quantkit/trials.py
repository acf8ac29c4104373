"""Trials of a fault campaign: draw faults, let them happen, measure, put every bit back.

A trial is decided by the campaign's seed, its own number and its condition, and by nothing else, so any process may run
it, in any order. The same number has the same bits hit whatever protects the model, which makes protections comparable.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from quantkit.calibrate.data import evaluation_windows, load_tokenizer, refuse_unknown_tokens
from quantkit.calibrate.text import read_text
from quantkit.errors import UsageError, nearest
from quantkit.evaluation.loading import Model, Tokenizer, context_length
from quantkit.evaluation.perplexity import perplexity
from quantkit.resilience.flips import Fault, draw, draw_exactly, generator, refuse_rate
from quantkit.resilience.passing import PASSING
from quantkit.runtime.stored import STORED, open_stored

Sweep = Literal["rates", "bits", "tensors"]
SWEEPS: tuple[str, ...] = get_args(Sweep)
TARGETS = (*STORED, *PASSING)
Measure = Callable[[Model, Tokenizer], float]


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """What is done to which model, and how its harm is measured.

    Attributes:
        model: a packed checkpoint.
        targets: of `TARGETS`.
        rates: probabilities with which each bit is hit, for the sweep over rates.
        sweep: `rates`; `bits`: one hit at one bit of a value, bit after bit; `tensors`: one hit, tensor after tensor.
        fault: what happens to a bit.
        trials: for each rate, bit or tensor.
        metric: `perplexity` or `task`.
        text, seqlen, windows, bos: what perplexity is of, as in `evaluate`.
        task, limit, include_path: of lm-eval.
        seed: of everything random.
        device: where the model is run.
    """

    model: Path
    targets: tuple[str, ...] = ("codes", "scales")
    rates: tuple[float, ...] = (1e-7, 1e-6, 1e-5, 1e-4)
    sweep: str = "rates"
    fault: Fault = field(default_factory=Fault)
    trials: int = 100
    metric: str = "perplexity"
    text: str = "embedded-test"
    seqlen: int = 256
    windows: int = 4
    bos: bool = False
    task: str | None = None
    limit: int | None = None
    include_path: str | None = None
    seed: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        for target in self.targets:
            if target not in TARGETS:
                raise UsageError(f"unknown target {target!r}{nearest(target, TARGETS, otherwise=_all(TARGETS))}")
        if self.sweep not in SWEEPS:
            raise UsageError(f"unknown sweep {self.sweep!r}{nearest(self.sweep, SWEEPS)}")
        if not self.targets or not self.rates:
            raise UsageError("give at least one target and one rate")
        for rate in self.rates:
            refuse_rate(rate)
        for name, value, least in (
            ("trials", self.trials, 1),
            ("windows", self.windows, 1),
            ("seqlen", self.seqlen, 2),
        ):
            if value < least:
                raise UsageError(f"{name} must be at least {least}, not {value}")
        self._refuse_metric()
        if self.sweep != "rates" and set(self.targets) & set(PASSING):
            raise UsageError(f"a sweep over {self.sweep} is of stored tensors; leave out {' and '.join(PASSING)}")

    def _refuse_metric(self) -> None:
        if self.metric not in ("perplexity", "task"):
            raise UsageError(f"unknown metric {self.metric!r}{nearest(self.metric, ('perplexity', 'task'))}")
        if (self.metric == "task") != (self.task is not None):
            raise UsageError("--metric task needs --task NAME, and only it does")


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One point of a sweep: a rate, or one hit at a bit of a value, or one hit in a tensor."""

    rate: float | None = None
    bit: int | None = None
    tensor: str | None = None

    @property
    def label(self) -> str:
        """What it is, in a table and in files."""
        return f"{self.rate:g}" if self.rate is not None else self.tensor or str(self.bit)


class Laboratory:
    """A model under faults and the measure of its harm; see `Campaign`."""

    def __init__(self, campaign: Campaign, measure: Measure | None = None) -> None:
        """Load the model and measure it without faults; `measure` takes the place of the campaign's metric.

        Raises:
            UsageError: a target that the model does not have, text that does not suit it.
            ModelError, DataError: see `open_stored`, `read_text`.
        """
        corpora = read_text(campaign.text) if campaign.metric == "perplexity" and measure is None else []
        self.campaign = campaign
        self.stored = open_stored(campaign.model, device=campaign.device)
        self._refuse_absent_targets()
        self.tokenizer = load_tokenizer(campaign.model)
        self.measure = measure or (self._perplexity(corpora) if campaign.metric == "perplexity" else _task(campaign))
        self.clean = self.stored.digest()
        self.baseline = self._value()

    def conditions(self) -> list[Condition]:
        """Return the points of the sweep."""
        if self.campaign.sweep == "rates":
            return [Condition(rate=rate) for rate in self.campaign.rates]
        if self.campaign.sweep == "tensors":
            return [Condition(tensor=name) for name in self._parts() if self.stored.parts[name].guards is None]
        widths = {self.stored.parts[name].bits.width for name in self._parts() if not self.stored.parts[name].guards}
        return [Condition(bit=bit) for bit in range(max(widths))]

    def run(self, condition: Condition, number: int) -> dict[str, Any]:
        """Return what a trial gave, as one line of a journal; afterwards every bit is as it was."""
        start, campaign = time.perf_counter(), self.campaign
        outcome = self.stored.hit(self._drawn(condition, number), campaign.fault)
        passing = tuple(target for target in campaign.targets if target in PASSING)
        try:
            if passing:
                key = campaign.seed, number
                with self.stored.passing.faulty(passing, float(condition.rate or 0), campaign.fault, *key):
                    value = self._value()
            else:
                value = self.baseline if outcome.harmless else self._value()
        finally:
            self.stored.restore()
        return {
            "condition": condition.label,
            "trial": number,
            "value": value if math.isfinite(value) else str(value),
            "flips": dict(outcome.flips),
            "corrected": outcome.corrected,
            "replaced": outcome.replaced,
            "seconds": round(time.perf_counter() - start, 4),
        }

    def is_restored(self) -> bool:
        """Return whether every bit that is stored or computed from is what it was."""
        return self.stored.digest() == self.clean

    def bits(self) -> dict[str, int]:
        """Return how many stored bits each target has."""
        counts: dict[str, int] = {}
        for name in self._parts():
            part = self.stored.parts[name]
            counts[part.target] = counts.get(part.target, 0) + part.bits.total
        return counts

    def _parts(self) -> list[str]:
        return [name for name, part in self.stored.parts.items() if part.target in self.campaign.targets]

    def _drawn(self, condition: Condition, number: int) -> dict[str, Tensor]:
        """Return which bits of which parts are hit."""
        seed = self.campaign.seed
        if condition.rate is not None:
            drawn = (
                (name, draw(self.stored.parts[name].bits.total, condition.rate, generator(seed, number, name)))
                for name in self._parts()
            )
            return {name: numbers for name, numbers in drawn if len(numbers)}
        random = generator(seed, number, condition.label)
        if condition.tensor is not None:
            return {condition.tensor: draw_exactly(self.stored.parts[condition.tensor].bits.total, 1, random)}
        return dict([self._one_value(int(condition.bit or 0), random)])

    def _one_value(self, bit: int, random: torch.Generator) -> tuple[str, Tensor]:
        """Return one part, drawn by how many values it has, and the number of that bit in one of them."""
        wide = {
            name: self.stored.parts[name].bits
            for name in self._parts()
            if self.stored.parts[name].guards is None and self.stored.parts[name].bits.width > bit
        }
        counts = torch.tensor([bits.total // bits.width for bits in wide.values()], dtype=torch.float64)
        name = list(wide)[int(torch.multinomial(counts, 1, generator=random))]
        value = draw_exactly(wide[name].total // wide[name].width, 1, random)
        return name, value * wide[name].width + bit

    def _value(self) -> float:
        return float(self.measure(self.stored.model, self.tokenizer))

    def _perplexity(self, corpora: Any) -> Measure:  # noqa: ANN401  what read_text gives
        campaign, context = self.campaign, context_length(self.stored.model)
        if context and campaign.seqlen > context:
            raise UsageError(f"--seqlen {campaign.seqlen} is longer than the model's context; pass --seqlen {context}")
        rows = evaluation_windows(
            corpora, self.tokenizer, seqlen=campaign.seqlen, windows=campaign.windows, bos=campaign.bos
        )
        refuse_unknown_tokens(rows, self.stored.model.config.get_text_config().vocab_size)
        return lambda model, _: perplexity(model, rows).perplexity

    def _refuse_absent_targets(self) -> None:
        there = self.stored.targets()
        reasons = {
            "zeros": "its scheme is symmetric",
            "bounds": "quantkit protect has not been run on it",
            "kv": "its attention does not ask transformers for its function",
        }
        for target in self.campaign.targets:
            if target not in there:
                why = reasons.get(target, "nothing of that kind is stored")
                raise UsageError(f"{self.campaign.model} has no {target} ({why}); it has {', '.join(there)}")


def outcomes(lines: Mapping[tuple[str, int], Mapping[str, Any]], label: str) -> Iterator[Mapping[str, Any]]:
    """Yield the finished trials of one condition, in order."""
    for _, line in sorted((number, line) for (condition, number), line in lines.items() if condition == label):
        yield line


def _task(campaign: Campaign) -> Measure:
    """Return a measure: the first score of a task of lm-eval."""
    from quantkit.evaluation import harness  # lm-eval takes seconds to import

    folder = Path(campaign.include_path) if campaign.include_path else None
    found = harness.find_tasks([str(campaign.task)], include_path=folder, num_fewshot=None)

    def score(model: Model, tokenizer: Tokenizer) -> float:
        scores = harness.run(model, tokenizer, found, limit=campaign.limit, batch_size=8, bos=campaign.bos)
        return scores.scores[0].value

    return score


def _all(names: tuple[str, ...]) -> str:
    return f"; give some of {', '.join(names)}"
