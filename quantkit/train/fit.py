"""The one training loop: minimise a loss over batches, epoch after epoch, at constant learning rates."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters that share a learning rate."""

    parameters: Sequence[torch.nn.Parameter]
    lr: float
    weight_decay: float = 0.0


@dataclass
class FitResult:
    """What a fit did: the mean loss of every finished epoch, and whether it met a loss that is not finite."""

    losses: list[float] = field(default_factory=list)
    diverged: bool = False


def fit(
    groups: Sequence[ParameterGroup],
    loss: Callable[[int], Tensor],
    *,
    batches: int,
    epochs: int,
    tick: Callable[[float], None],
) -> FitResult:
    """Minimise `loss(batch)` with AdamW, batches in order, one update each.

    Stops at the first loss that is not finite, before it can reach the parameters.

    Args:
        groups: what is trained.
        loss: batch number → scalar loss that depends on the parameters.
        batches: number of batches in an epoch.
        epochs: number of epochs; an update is made `epochs * batches` times.
        tick: told after every update which share of all updates is done.
    """
    optimizer = torch.optim.AdamW(
        [{"params": list(group.parameters), "lr": group.lr, "weight_decay": group.weight_decay} for group in groups]
    )
    result = FitResult()
    for epoch in range(epochs):
        total = 0.0
        for batch in range(batches):
            value = loss(batch)
            total += float(value.detach())
            if not math.isfinite(total):
                result.diverged = True
                return result
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            tick((epoch * batches + batch + 1) / (epochs * batches))
        result.losses.append(total / batches)
    return result
