"""What methods for thresholds work on: a model, its bounds, text or images to calibrate on, and the damage they do."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quantkit.resilience.bounds import Bound, unbounded


@dataclass(kw_only=True)
class Material:
    """A model with bounds in place.

    Attributes:
        layers: the bounds that are one step of a progressive method, from the model's first layer to its last.
        run: batch number → logits (…, classes) of the model as it is now.
        batches: how many batches there are.
        damage: how much worse the undisturbed model is than without bounds, measured on what is not in the batches:
            perplexity in per cent, accuracy in points.
        budget: the most damage that is accepted.
        shared: each layer may take its own share of the budget alone; otherwise the first one may take all of it.
        tick: told which share of the work is done.
        notes: what a method did, for reports.
    """

    layers: Sequence[Sequence[Bound]]
    run: Callable[[int], Tensor]
    batches: int
    damage: Callable[[], float]
    budget: float
    shared: bool = True
    tick: Callable[[float], None] = lambda _: None
    notes: dict[str, object] = field(default_factory=dict)

    @property
    def bounds(self) -> list[Bound]:
        """All bounds."""
        return [bound for layer in self.layers for bound in layer]

    def loss(self, layers: Sequence[Sequence[Bound]], batch: int) -> Tensor:
        """Return KL(unprotected || bounded) per prediction, plus the relative squared error of what `layers` give.

        No labels are needed: the model teaches itself.
        """
        ends = [layer[-1] for layer in layers]
        with _outputs(ends) as expected, torch.no_grad(), unbounded(self.bounds):
            teacher = self.run(batch).float().log_softmax(-1)
        with _outputs(ends) as found:
            student = self.run(batch).float().log_softmax(-1)
        loss = (teacher.exp() * (teacher - student)).sum(-1).mean()
        for bound in ends:
            target = expected[bound].float()
            loss = loss + (found[bound].float() - target).square().mean() / target.square().mean()
        return loss


@contextmanager
def _outputs(bounds: Sequence[Bound]) -> Iterator[Mapping[Bound, Tensor]]:
    """Yield what each bound gives when it is called inside the context."""
    seen: dict[Bound, Tensor] = {}

    def keep(bound: nn.Module, _: object, output: Tensor) -> None:
        assert isinstance(bound, Bound)
        seen[bound] = output

    handles = [bound.register_forward_hook(keep) for bound in bounds]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
