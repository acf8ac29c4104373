"""The three independent choices of a personalization, and what they tell each other.

A `Trainable` puts float32 tensors into a packed model, an `Objective` gives one loss per example, an `Estimator` turns
such losses into gradients of those tensors. The rule that makes them independent: an objective never takes a mean.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

Parameters = Mapping[str, nn.Parameter]  # by a name that is the same in every process


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some examples, padded on the right.

    Attributes:
        tokens: int64 (examples, length).
        attention: bool (examples, length), False where there is padding.
        scored: bool (examples, length), True at tokens that a loss counts; each is predicted from those before it.
        label: int64 (examples,), which of the label words is right; None: no classification.
    """

    tokens: Tensor
    attention: Tensor
    scored: Tensor
    label: Tensor | None = None


@dataclass(frozen=True)
class Losses:
    """The losses of one micro-batch, computed anew at each call: (examples,) float32."""

    objective: "Objective"
    model: nn.Module
    batch: Batch

    def __call__(self) -> Tensor:
        """Return them."""
        return self.objective(self.model, self.batch)

    @property
    def examples(self) -> int:
        """How many there are."""
        return len(self.batch.tokens)


class Slot(nn.Module):
    """One tensor that may change, at the place where a forward pass reads it.

    Within `per_example` each example of a batch reads a copy of its own, so that the gradients of the copies are those
    of the single examples: they sum over an example's tokens and need none of the inputs of frozen linears.
    """

    def __init__(self, value: Tensor) -> None:
        """Hold `value` as float32."""
        super().__init__()
        self.value = nn.Parameter(value.detach().to(torch.float32, copy=True))
        self.copies: Tensor | None = None
        self.tokens: int | None = None  # of each example, while there are copies

    def read(self) -> Tensor:
        """Return the tensor (…), or within `per_example` (examples, 1, …), to broadcast over tokens."""
        return self.value if self.copies is None else self.copies.unsqueeze(1)


@contextmanager
def per_example(model: nn.Module, examples: int, tokens: int | None = None) -> Iterator[dict[int, Tensor]]:
    """Let each of `examples` read a copy of its own of every slot; yield the copies by the `id` of the parameter.

    Args:
        model: that the slots are in.
        examples: of the batch.
        tokens: of each example; a slot that meets another number of them can refuse.
    """
    slots = [module for module in model.modules() if isinstance(module, Slot)]
    for slot in slots:  # an expanded leaf takes no memory, its gradient has a row for each example
        slot.copies = slot.value.detach().expand(examples, *slot.value.shape).requires_grad_()
        slot.tokens = tokens
    try:
        yield {id(slot.value): slot.copies for slot in slots if slot.copies is not None}
    finally:
        for slot in slots:
            slot.copies = slot.tokens = None


class Trainable(Protocol):
    """What may change; a frozen dataclass whose fields are hyper-parameters."""

    per_example: ClassVar[bool]  # whether every tensor is read through a `Slot`
    unmergeable: ClassVar[str]  # why it cannot become a part of a checkpoint; empty: it can
    rate: ClassVar[float]  # a learning rate that suits Adam

    def attach(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Put tensors into `model` that leave its outputs as they are; return those that may change, by name."""

    # where it can be: `settle(model, values)` makes values a part of the model's own tensors, without a hook


class Objective(Protocol):
    """What is minimised."""

    differentiable: ClassVar[bool]

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return one loss per example: (examples,) float32, never a mean."""


class Estimator(Protocol):
    """How the gradient is had; keeps what it needs from step to step, see `state`."""

    needs_gradients: ClassVar[bool]  # False: forward passes only, within `torch.no_grad`

    def estimate(self, losses: Sequence[Losses], parameters: Parameters, *, step: int) -> float:
        """Set `.grad` of every parameter to an estimate for one logical batch; return its mean loss.

        Args:
            losses: one function per micro-batch; their examples together are the logical batch, which may be empty.
            parameters: those that may change; left as they are.
            step: number of this update, from 0.
        """

    def state(self) -> dict[str, Tensor]:
        """Return what a later process needs to go on."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` returned."""


class KnowsRate(Estimator, Protocol):
    """An estimator that can say how far to go."""

    def rate(self, losses: Sequence[Losses], parameters: Parameters) -> float:
        """Return a learning rate for plain descent."""
