"""The one training loop: minimise a loss over batches, update after update.

Its length is stated in updates, not in epochs, so that it means the same for every batch size; callers let the learning
rates grow with the square root of the batch (Hoffer et al., arXiv 1705.08741, section 4).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from quantkit.calibrate.memory import release_freed
from quantkit.calibrate.team import Team

Schedule = Literal["constant", "linear", "cosine"]
SCHEDULES = ("constant", "linear", "cosine")
ADAM = (0.9, 0.999)
SIGN = (0.0, 0.0)  # AdamW without memory moves every parameter by its learning rate: sign descent
EPSILON = 1e-14  # a block's gradients may be below AdamW's own 1e-8, which would all but stop them


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters that share a learning rate.

    Attributes:
        parameters: what is trained.
        lr: learning rate at the start.
        weight_decay: AdamW's.
        betas: AdamW's averages; `SIGN` makes it sign descent.
        limit: parameters are kept within [-limit, limit] after every update; None: anywhere.
    """

    parameters: Sequence[torch.nn.Parameter]
    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = ADAM
    limit: float | None = None


@dataclass
class FitResult:
    """What a fit did: the mean loss of every finished pass over the batches, and whether a loss was not finite."""

    losses: list[float] = field(default_factory=list)
    diverged: bool = False


def fit(  # noqa: PLR0913  everything beyond the first two is the loop's shape
    groups: Sequence[ParameterGroup],
    loss: Callable[[int], Tensor],
    *,
    batches: int,
    updates: int,
    tick: Callable[[float], None],
    schedule: Schedule = "constant",
    generator: torch.Generator | None = None,
    team: Team | None = None,
) -> FitResult:
    """Minimise `loss(batch)` with AdamW, one update per batch, pass after pass over the batches.

    Stops at the first loss that is not finite, before it can reach the parameters; they then get back the values with
    which the best pass so far ended, or those of the start.

    Args:
        groups: what is trained.
        loss: batch number → scalar loss that depends on the parameters.
        batches: number of batches.
        updates: number of updates.
        tick: told after every update which share of all updates is done.
        schedule: what becomes of the learning rates: constant, or down to 0 linearly or along half a cosine.
        generator: shuffles the batches of each pass; None: they come in order.
        team: processes that each give their own share of every loss; gradients and losses are the means over them.
    """
    optimizer = torch.optim.AdamW(
        [{"params": list(g.parameters), "lr": g.lr, "weight_decay": g.weight_decay, "betas": g.betas} for g in groups],
        eps=EPSILON,
    )
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: _share_of_lr(schedule, done / max(1, updates)))
    result, best = FitResult(), _Best(groups)
    order: list[int] = []
    total = 0.0
    release_freed()  # an update takes more than anything before it
    for update in range(updates):
        if not order:
            order = torch.randperm(batches, generator=generator).tolist() if generator else list(range(batches))
        value = loss(order.pop(0))
        optimizer.zero_grad(set_to_none=True)
        total += _backward(value, best.parameters, team or Team())
        if not math.isfinite(total):
            result.diverged = True
            best.restore()
            return result
        optimizer.step()
        decay.step()
        _keep_within_limits(groups)
        tick((update + 1) / updates)
        if not order:
            result.losses.append(total / batches)
            best.offer(total)
            total = 0.0
    return result


def _backward(value: Tensor, parameters: Sequence[torch.nn.Parameter], team: Team) -> float:
    """Differentiate the loss `value`; return it, averaged over the processes as the gradients are.

    A parameter that no process's share depends on has no gradient, so that AdamW leaves it alone.
    """
    loss = value.detach()
    if team.alone:
        if loss.isfinite():
            value.backward()
        return float(loss)
    value.backward()
    reached = torch.tensor([parameter.grad is not None for parameter in parameters]).to(loss)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    together = torch.cat([loss.reshape(1), reached, *(gradient.flatten() for gradient in gradients)])
    team.sum(together)
    loss, reached, mean = together.split([1, len(reached), len(together) - 1 - len(reached)])
    mean = mean.div_(team.size)
    parts = mean.split([parameter.numel() for parameter in parameters])
    for parameter, part, known in zip(parameters, parts, reached.tolist(), strict=True):
        parameter.grad = part.view_as(parameter) if known else None
    return float(loss) / team.size


class _Best:
    """The parameters' values after the pass with the smallest loss, at first those of the start."""

    def __init__(self, groups: Sequence[ParameterGroup]) -> None:
        self.parameters = [parameter for group in groups for parameter in group.parameters]
        self.loss = math.inf
        self.values = [parameter.detach().clone() for parameter in self.parameters]

    def offer(self, loss: float) -> None:
        if loss < self.loss:
            self.loss = loss
            for value, parameter in zip(self.values, self.parameters, strict=True):
                value.copy_(parameter.detach())

    def restore(self) -> None:
        for value, parameter in zip(self.values, self.parameters, strict=True):
            parameter.data.copy_(value)


def _share_of_lr(schedule: Schedule, done: float) -> float:
    if schedule == "linear":
        return 1 - done
    return 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1.0


@torch.no_grad()
def _keep_within_limits(groups: Sequence[ParameterGroup]) -> None:
    for group in groups:
        if group.limit is not None:
            for parameter in group.parameters:
                parameter.clamp_(-group.limit, group.limit)
