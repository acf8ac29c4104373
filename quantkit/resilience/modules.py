"""Bounds on the activation functions of any module: CNNs, MLPs, whatever calls ReLU, ReLU6, SiLU or GELU modules."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from quantkit.errors import UsageError
from quantkit.resilience import interval, methods
from quantkit.resilience.bounds import Bound, Bounded, unbounded
from quantkit.resilience.choice import Resilience
from quantkit.resilience.material import Material
from quantkit.resilience.places import Bounds

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU)
BATCH = 64
HELD_OUT = 4  # one in so many inputs, where nothing was held out by the caller
FLOOR = 1e-3  # of the largest threshold of a layer: a neuron that was silent may still speak


def bound_module(
    model: nn.Module,
    inputs: Tensor,
    *,
    resilience: Resilience | str = "hybrid",
    held_out: tuple[Tensor, Tensor] | None = None,
    evaluate: Callable[[float], float] | None = None,
    rates: Sequence[float] = interval.RATES,
) -> Bounds:
    """Bound every activation function of a classifier, in place, and return the thresholds.

    >>> quantkit.bound_module(cnn, images, resilience="hybrid", held_out=(others, labels))

    The weights stay as they are. A threshold is one for an activation module, or one for each of its neurons (of a
    convolution: each channel at each position); `hybrid` has those in the module that is called last. Bounds that are
    there are replaced.

    Args:
        model: its classes come out as (samples, classes) logits; its mode is as before afterwards.
        inputs: (samples, …), what thresholds are profiled and trained on; no labels are needed.
        resilience: a kind, or a choice; its budget is in points of accuracy.
        held_out: inputs and labels that decide what is accepted; None: a quarter of `inputs`, where the answers of the
            unprotected model count as right.
        evaluate: a rate of faults → accuracy under faults, for the method `interval`.
        rates: those rates.

    Raises:
        UsageError: no activation module, one that is called with several shapes where each neuron has a threshold,
            activations that are not finite, too few inputs, or an `interval` without `evaluate`.
    """
    choice = Resilience.parse(resilience) if isinstance(resilience, str) else resilience
    if choice.way == "interval" and evaluate is None:
        raise UsageError("the method interval measures under faults; give evaluate=, or choose another method")
    if len(inputs) < 2:
        raise UsageError(f"bounds need at least two inputs, not {len(inputs)}")
    mode = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            return _bound(model, inputs, choice, held_out, evaluate, rates)
    finally:
        for module, training in mode.items():
            module.training = training


def unbound_module(model: nn.Module) -> None:
    """Put the activation functions back that `bound_module` bounded."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, Bounded):
            _put(model, name, module.activation)


def _bound(
    model: nn.Module,
    inputs: Tensor,
    choice: Resilience,
    held_out: tuple[Tensor, Tensor] | None,
    evaluate: Callable[[float], float] | None,
    rates: Sequence[float],
) -> Bounds:
    unbound_module(model)
    if held_out is None:
        held = max(1, len(inputs) // HELD_OUT)
        inputs, apart = inputs[:-held], inputs[-held:]
        held_out = apart, _logits(model, apart).argmax(-1)
    largest = _largest(model, inputs, each=choice.kind in ("neuron", "hybrid"))
    bounds = _place(model, largest, choice)
    right = held_out[1].to(inputs.device)
    with unbounded(list(bounds.values())):
        before = _accuracy(model, held_out[0], right)
    batches = inputs.split(BATCH)
    material = Material(
        layers=[[bound] for bound in bounds.values()],
        run=lambda number: model(batches[number]),
        batches=len(batches),
        damage=lambda: 100 * (before - _accuracy(model, held_out[0], right)),
        budget=choice.budget,
        shared=False,  # a point of accuracy is few samples: shares of it would be none
    )
    if choice.way == "interval":
        interval.find(material, choice, evaluate, rates)
    else:
        methods.find(choice.way)(material, choice)
    facts = {"method": choice.way, "budget": choice.budget, "damage": material.damage(), **material.notes}
    thresholds = {name: bound.threshold.detach().cpu().clone() for name, bound in bounds.items()}
    return Bounds(thresholds=thresholds, form=choice.form, kind=choice.kind, facts=facts)


def _largest(model: nn.Module, inputs: Tensor, *, each: bool) -> dict[str, Tensor]:
    """Return the largest value of each neuron of each activation module, by name, in the order of the calls."""
    names: dict[nn.Module, str] = {
        module: name for name, module in model.named_modules() if isinstance(module, ACTIVATIONS)
    }
    if not names:
        raise UsageError("the model has no ReLU, ReLU6, SiLU or GELU module to bound; functions cannot be found")
    largest: dict[str, Tensor] = {}

    def see(module: nn.Module, _: object, output: Tensor) -> None:
        seen, name = output.detach().float().amax(0), names[module]
        if each and name in largest and largest[name].shape != seen.shape:
            raise UsageError(f"{name} is called with several shapes, so its neurons have no thresholds; use `layer`")
        seen = seen if each else seen.max()
        largest[name] = torch.maximum(largest[name], seen) if name in largest else seen

    handles = [module.register_forward_hook(see) for module in names]
    try:
        for batch in inputs.split(BATCH):
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
    if odd := [name for name, value in largest.items() if not value.isfinite().all()]:
        raise UsageError(f"what {odd[0]} gives is not finite; give a model and inputs whose activations are")
    return largest


def _place(model: nn.Module, largest: dict[str, Tensor], choice: Resilience) -> dict[str, Bound]:
    """Put a bound behind every activation module that was called."""
    modules, last = dict(model.named_modules(remove_duplicate=False)), list(largest)[-1]
    bounds = {}
    for name, values in largest.items():
        scaled = values * choice.margin
        top = scaled.max().clamp(min=torch.finfo(torch.float32).tiny)
        each = choice.kind == "neuron" or (choice.kind == "hybrid" and name == last)
        threshold = scaled.clamp(min=float(top) * FLOOR) if each else top
        activation = modules[name]
        bounded = Bounded(activation, Bound(threshold, choice.form, two_sided=False))
        bounds[name] = bounded.bound
        for other, module in modules.items():
            if module is activation:
                _put(model, other, bounded)
    return bounds


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, attribute = name.rpartition(".")
    if not name:
        raise UsageError("the model is an activation function itself; put it into a Sequential")
    setattr(model.get_submodule(owner), attribute, module)


def _logits(model: nn.Module, inputs: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in inputs.split(BATCH)])


def _accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((_logits(model, inputs).argmax(-1) == labels).float().mean())
