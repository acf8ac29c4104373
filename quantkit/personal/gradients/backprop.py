"""Gradients by back-propagation of the mean loss, micro-batch after micro-batch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantkit.personal.protocols import Losses, Parameters


@dataclass(frozen=True, kw_only=True)
class Backprop:
    """The gradient of the mean over the logical batch, however it is divided."""

    needs_gradients: ClassVar[bool] = True

    def estimate(self, losses: Sequence[Losses], parameters: Parameters, *, step: int) -> float:  # noqa: ARG002
        """See `Estimator`; an empty batch has no gradient and no loss: not a number."""
        examples = sum(each.examples for each in losses)
        for parameter in parameters.values():
            parameter.grad = None
        total = 0.0
        for each in losses:
            with torch.enable_grad():
                loss = each().sum() / examples
            loss.backward()
            total += float(loss.detach())
        for parameter in parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return total if examples else math.nan

    def state(self) -> dict[str, Tensor]:
        """Return nothing: each step is by itself."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up nothing."""


METHOD = Backprop
