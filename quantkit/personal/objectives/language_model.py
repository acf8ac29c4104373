"""The loss of a language model: what the tokens that count were thought unlikely to be."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional

from quantkit.personal.objectives._logits import scored_logits
from quantkit.personal.protocols import Batch


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """The mean over an example's scored tokens of minus the logarithm of their probability, in nats."""

    differentiable: ClassVar[bool] = True

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `Objective`; an example without a scored token has loss 0."""
        logits, rows, tokens = scored_logits(model, batch)
        losses = functional.cross_entropy(logits, tokens, reduction="none")
        total = losses.new_zeros(len(batch.tokens)).index_add(0, rows, losses)
        return total / batch.scored[:, 1:].sum(1).clamp(min=1)


METHOD = LanguageModel
