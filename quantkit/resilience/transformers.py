"""Bounds for a language model: what its activations are, and thresholds that keep its perplexity."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantkit.errors import DataError, ModelError
from quantkit.resilience import methods
from quantkit.resilience.bounds import unbounded
from quantkit.resilience.choice import Resilience
from quantkit.resilience.material import Material, divergence, told
from quantkit.resilience.places import Bounds, Place, attach, attached, detach, find_places

HELD_OUT = 2  # one in so many sequences decides what is accepted, and is not trained on
FLOOR = 1e-3  # of the largest threshold of a place: a neuron that calibration left silent may still speak


@torch.no_grad()
def bound_transformer(
    model: nn.Module, tokens: Tensor, choice: Resilience, *, tick: Callable[[float], None] = lambda _: None
) -> Bounds:
    """Return bounds for a transformers causal language model, which keeps none.

    Args:
        model: in evaluation mode; its linears are dense where the method is one that trains.
        tokens: (sequences, tokens) int64, of which half are held out.
        choice: which bounds, and how they are found.
        tick: told which share of the work is done.

    Raises:
        ModelError: no places are known in the model, or its activations are not finite.
        DataError: fewer than two sequences.
        UsageError: a method that needs faults.
    """
    if len(tokens) < 2:
        raise DataError(f"bounds need at least two sequences, not {len(tokens)}: one is held out; give more text")
    places = find_places(model)
    held = max(1, len(tokens) // HELD_OUT)
    train, apart = tokens[:-held].to(_device(model)), tokens[-held:].to(_device(model))
    detach(model)
    largest = largest_values(model, places, train)
    start = Bounds(
        thresholds=first_thresholds(places, largest, choice),
        form=choice.form,
        kind=choice.kind,
    )
    try:
        material = _material(model, start, train, apart, choice, tick)
        with torch.enable_grad():
            methods.find(choice.way)(material, choice)
        found = {name: bound.threshold.detach().cpu().clone() for name, bound in attached(model).items()}
        facts = {"method": choice.way, "budget": choice.budget, "damage": material.damage(), **material.notes}
    finally:
        detach(model)
    return Bounds(thresholds=found, form=choice.form, kind=choice.kind, facts=facts)


def largest_values(model: nn.Module, places: Sequence[Place], tokens: Tensor) -> dict[str, Tensor]:
    """Return the largest |x| of each neuron at each place, (neurons,) float32, over `tokens` (sequences, tokens).

    Raises:
        ModelError: one is not finite.
    """
    largest: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        seen = x.detach().float().abs().flatten(0, -2).amax(0)
        largest[name] = seen if name not in largest else torch.maximum(largest[name], seen)

    handles = [_watch(model, place, partial(see, place.name)) for place in places]
    try:
        for row in tokens:
            model(row[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for name, values in largest.items():
        if not values.isfinite().all():
            raise ModelError(f"what reaches {name} is not finite on the calibration text; bounds would hide that")
    return largest


def first_thresholds(places: Sequence[Place], largest: Mapping[str, Tensor], choice: Resilience) -> dict[str, Tensor]:
    """Return the thresholds of a kind that let everything pass that was seen."""
    last = max(place.block for place in places)
    found = {}
    for place in places:
        values = largest[place.name] * choice.margin
        top = values.max().clamp(min=torch.finfo(torch.float32).tiny)
        each = choice.kind == "neuron" or (choice.kind == "hybrid" and place.block == last)
        found[place.name] = values.clamp(min=float(top) * FLOOR) if each else top
    return found


def _material(
    model: nn.Module,
    start: Bounds,
    train: Tensor,
    apart: Tensor,
    choice: Resilience,
    tick: Callable[[float], None],
) -> Material:
    bounds = attach(model, start)
    blocks: dict[int, list[Any]] = {}
    for place in find_places(model):
        blocks.setdefault(place.block, []).append(bounds[place.name])
    with unbounded(list(bounds.values())):
        reference = [_told(model, row) for row in apart]
    return Material(
        layers=list(blocks.values()),
        run=lambda batch: model(train[batch : batch + 1], use_cache=False).logits,
        batches=len(train),
        damage=lambda: _damage(model, apart, reference),
        budget=choice.budget,
        tick=tick,
    )


@torch.no_grad()
def _damage(model: nn.Module, tokens: Tensor, reference: Sequence[Tensor]) -> float:
    """Return by how many per cent perplexity is worse than that of `reference`, log-probabilities of each sequence.

    The loss on few tokens changes by chance as much as by bounds, and who tries often takes the luckiest. The
    divergence from the reference is what the loss grows by where the reference is right; the larger of the two counts.
    """
    growth, apart = 0.0, 0.0
    for row, known in zip(tokens, reference, strict=True):
        logits = model(row[None], use_cache=False).logits[0, :-1].float()
        growth += float(functional.cross_entropy(logits, row[1:]) - functional.nll_loss(known.float(), row[1:]))
        apart += float(divergence(known, logits))
    largest = max(growth, apart) if math.isfinite(growth + apart) else math.inf
    return 100 * math.expm1(min(largest / len(tokens), 50.0))


def _told(model: nn.Module, row: Tensor) -> Tensor:
    return told(model(row[None], use_cache=False).logits[0, :-1])


def _watch(model: nn.Module, place: Place, see: Callable[[Tensor], None]) -> Any:  # noqa: ANN401  torch's handle
    owner = model.get_submodule(place.name)
    if place.group == "block":
        return owner.register_forward_hook(lambda _, __, out: see(out[0] if isinstance(out, tuple) else out))
    return owner.register_forward_pre_hook(lambda _, inputs: see(inputs[0]))


def _device(model: nn.Module) -> torch.device:
    device: torch.device = model.device  # type: ignore[assignment]
    return device
