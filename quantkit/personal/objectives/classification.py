"""Classification by the word that follows: a cross-entropy over the words of the labels alone."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantkit.errors import DataError
from quantkit.personal.objectives._logits import scored_logits
from quantkit.personal.protocols import Batch


@dataclass(frozen=True, kw_only=True)
class Classification:
    """Minus the logarithm of the right label's share among the words of all labels.

    Attributes:
        words: the token of each label's word.
    """

    differentiable: ClassVar[bool] = True
    words: tuple[int, ...] = ()

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `Objective`."""
        logits = label_logits(model, batch, self.words)
        assert batch.label is not None
        return functional.cross_entropy(logits, batch.label, reduction="none")


def label_logits(model: nn.Module, batch: Batch, words: tuple[int, ...]) -> Tensor:
    """Return the logits of the labels' words where each example's word is due: (examples, labels) float32.

    Raises:
        DataError: the examples have no labels.
    """
    if batch.label is None or not words:
        raise DataError("classification needs examples with labels; give data with the columns sentence and label")
    logits, _, _ = scored_logits(model, batch)  # a single token of each example is scored
    return logits[:, torch.tensor(words, device=logits.device)]


METHOD = Classification
