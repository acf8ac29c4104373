"""What a model scores in tasks, and which answers differ from another model's.

Flips: A. Dutta et al., "Accuracy is Not All You Need" (2024), section 3: the answers that turned from right to wrong or
from wrong to right. Two models of equal accuracy may differ in many of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of one task, or of a group of tasks.

    Attributes:
        task: name of the task or group.
        metric: name of the metric.
        filter: how answers were read out of what was generated; `none` where nothing was generated.
        value: the metric.
        stderr: its standard error, None where lm-eval has none.
        higher_is_better: None if it is unknown.
        samples: how many documents it is of.
        num_fewshot: examples in the prompt, None for a group whose tasks differ.
        right: per document whether the answer was right; None for metrics that are not of that kind.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    samples: int
    num_fewshot: int | None
    right: tuple[bool, ...] | None = field(default=None, repr=False)

    @property
    def key(self) -> tuple[str, str, str]:
        """What is the same of two models."""
        return self.task, self.metric, self.filter


@dataclass(frozen=True, kw_only=True)
class Flips:
    """Answers that changed from a reference to a model.

    Attributes:
        task, metric, filter: as in `Score`.
        to_wrong: answers that were right and are wrong now.
        to_right: answers that were wrong and are right now.
        samples: answers in all.
    """

    task: str
    metric: str
    filter: str
    to_wrong: int
    to_right: int
    samples: int

    @property
    def share(self) -> float:
        """Share of the answers that changed."""
        return (self.to_wrong + self.to_right) / self.samples


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """All that was measured in tasks.

    Attributes:
        scores: in the order in which the tasks were given.
        notes: what one should know of them, one line each.
        reference: the same of the model that it is held against.
    """

    scores: tuple[Score, ...]
    notes: tuple[str, ...] = ()
    reference: "TaskScores | None" = None

    def pairs(self) -> Iterator[tuple[Score, Score | None]]:
        """Yield every score with the reference's."""
        others = {score.key: score for score in self.reference.scores} if self.reference else {}
        for score in self.scores:
            yield score, others.get(score.key)

    @property
    def flips(self) -> tuple[Flips, ...]:
        """The answers that changed from the reference to the model; empty without a reference."""
        return tuple(
            flips(score, other)
            for score, other in self.pairs()
            if other is not None and score.right is not None and other.right is not None
        )


def flips(score: Score, reference: Score) -> Flips:
    """Return the answers that changed; both were given the same documents in the same order."""
    assert score.right is not None
    assert reference.right is not None
    pairs = list(zip(score.right, reference.right, strict=True))
    return Flips(
        task=score.task,
        metric=score.metric,
        filter=score.filter,
        to_wrong=sum(before and not now for now, before in pairs),
        to_right=sum(now and not before for now, before in pairs),
        samples=len(pairs),
    )
