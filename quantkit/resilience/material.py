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
    _taught: dict[int, "tuple[Tensor, Mapping[Bound, Tensor]]"] = field(default_factory=dict)
    _taught_of: Sequence[Sequence[Bound]] = ()

    @property
    def bounds(self) -> list[Bound]:
        """All bounds."""
        return [bound for layer in self.layers for bound in layer]

    def loss(self, layers: Sequence[Sequence[Bound]], batch: int) -> Tensor:
        """Return KL(unprotected || bounded) per prediction, plus the relative squared error of what `layers` give.

        No labels are needed: the model teaches itself.
        """
        ends = [layer[-1] for layer in layers]
        teacher, expected = self._teacher(layers, batch)
        with _outputs(ends) as found:
            logits = self.run(batch)
        loss = divergence(teacher, logits)
        for bound in ends:
            target = expected[bound].float()
            loss = loss + (found[bound].float() - target).square().mean() / target.square().mean()
        return loss

    def _teacher(self, layers: Sequence[Sequence[Bound]], batch: int) -> "tuple[Tensor, Mapping[Bound, Tensor]]":
        """Return what the unprotected model says, and gives in `layers`; computed once for the same layers."""
        if self._taught_of is not layers:
            self._taught, self._taught_of = {}, layers
        if batch not in self._taught:
            with _outputs([layer[-1] for layer in layers]) as seen, torch.no_grad(), unbounded(self.bounds):
                logits = self.run(batch)
            self._taught[batch] = told(logits), seen
        return self._taught[batch]


def told(logits: Tensor) -> Tensor:
    """Return logits (…, classes) as log-probabilities in 16 bits, to be kept: vocabularies are large."""
    return logits.float().log_softmax(-1).half()


def divergence(teacher: Tensor, logits: Tensor) -> Tensor:
    """Return KL(teacher || model) per prediction, of log-probabilities and logits (…, classes)."""
    known = teacher.float()
    # a class that is impossible in 16 bits weighs nothing, but 0·(-inf) would be NaN
    terms = torch.where(known == -torch.inf, 0.0, known.exp() * (known - logits.float().log_softmax(-1)))
    return terms.sum(-1).mean()


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
