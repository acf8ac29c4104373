"""What is wanted in the end, whether or not it has a gradient: accuracy, F1, or a function of somebody's.

The loss is 1 - score. With labels, the answer is the likeliest of their words. Without, it is what the model writes on
its own behind the prompt, the likeliest token each time, as many as the right answer has.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from quantkit.errors import UsageError, nearest
from quantkit.personal.objectives.classification import label_logits
from quantkit.personal.protocols import Batch

Tokens = Sequence[int]
Score = Callable[[Tokens, Tokens], float]  # of an answer and the right one


def accuracy(found: Tokens, right: Tokens) -> float:
    """Return 1 for an answer that is right in every token, otherwise 0."""
    return float(list(found) == list(right))


def f1(found: Tokens, right: Tokens) -> float:
    """Return the F1 of the tokens of an answer, in whatever order (Rajpurkar et al., "SQuAD", 2016, section 6.1)."""
    common = sum((Counter(found) & Counter(right)).values())
    return 2 * common / (len(found) + len(right)) if common else 0.0


SCORES: dict[str, Score] = {"accuracy": accuracy, "f1": f1}


@dataclass(frozen=True, kw_only=True)
class Metric:
    """1 - score of each example.

    Attributes:
        score: accuracy, f1, or a function of two lists of tokens, the answer and the right one, from 0 to 1.
        words: the token of each label's word.
    """

    differentiable: ClassVar[bool] = False
    score: str | Score = "accuracy"
    words: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not callable(self.score) and self.score not in SCORES:
            raise UsageError(f"unknown score {self.score!r}{nearest(self.score, SCORES)}")

    @torch.no_grad()
    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `Objective`."""
        score = self.score if callable(self.score) else SCORES[self.score]
        pairs = self._labels(model, batch) if self.words else _answers(model, batch)
        return torch.tensor([1 - score(*pair) for pair in pairs], dtype=torch.float32, device=batch.tokens.device)

    def _labels(self, model: nn.Module, batch: Batch) -> list[tuple[Tokens, Tokens]]:
        """Return the word of the likeliest label and of the right one, for each example."""
        likeliest = label_logits(model, batch, self.words).argmax(1).tolist()
        assert batch.label is not None
        right = batch.label.tolist()
        return [([self.words[a]], [self.words[b]]) for a, b in zip(likeliest, right, strict=True)]


def _answers(model: nn.Module, batch: Batch) -> list[tuple[Tokens, Tokens]]:
    """Return what the model writes in the place of the scored tokens, and these, for each example."""
    tokens, starts = batch.tokens.clone(), batch.scored.int().argmax(1).clamp(min=1)
    counts = batch.scored.sum(1)
    rows = torch.arange(len(tokens), device=tokens.device)
    for number in range(int(counts.max()) if len(counts) else 0):
        place = (starts + number).clamp(max=tokens.shape[1] - 1)
        logits = model(input_ids=tokens, attention_mask=batch.attention.long(), use_cache=False).logits
        chosen = logits[rows, place - 1].argmax(1)
        open_ = number < counts
        tokens[rows[open_], place[open_]] = chosen[open_]
    return [
        (found[mask].tolist(), right[mask].tolist())
        for found, right, mask in zip(tokens, batch.tokens, batch.scored, strict=True)
    ]


METHOD = Metric
