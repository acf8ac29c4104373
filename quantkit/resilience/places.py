"""Where the bounds of a transformer are, and putting them there.

Three places in each block: what reaches the linear after the MLP's product or activation (`down`), what reaches the
linear after attention (`output`), and what the block gives. The first two stop whatever queries, keys, values, gates
and their scales became; the third stops what these two linears themselves became, before the next norm spreads it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import ModelError
from quantkit.model import architecture
from quantkit.resilience.bounds import Bound, Form
from quantkit.resilience.choice import Kind

GROUPS = ("output", "down")  # of an architecture file, each of one linear
CHILD = "bound"  # the name of the module inside the linear or the block


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where one bound is.

    Attributes:
        name: module name of the linear whose input is bounded, or of the block whose output is.
        block: number of the block.
        group: `down` or `output`, or `block`.
    """

    name: str
    block: int
    group: str


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """All bounds of a model.

    Attributes:
        thresholds: name of the place → float32, () or (neurons,).
        form: how they bind.
        kind: `layer`, `neuron`, `hybrid` or `ranger`.
        facts: how they were found, for reports.
    """

    thresholds: Mapping[str, Tensor]
    form: Form = "clamp"
    kind: Kind = "hybrid"
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Size of the thresholds, once."""
        return sum(4 * threshold.numel() for threshold in self.thresholds.values())


def find_places(model: nn.Module) -> list[Place]:
    """Return the places of a transformers model or skeleton's model, block after block.

    Raises:
        ModelError: a family that no architecture file describes, or whose file does not name the places.
    """
    config = model.config.to_dict()  # type: ignore[union-attr, operator]
    facts = architecture.find(config)
    family = config.get("model_type")
    if facts is None:
        raise ModelError(
            f"no architecture file describes {family!r}, so the places of bounds are not known; "
            "add one, see model_zoo/README.md"
        )
    linears = {group.name: group.linears for group in facts.groups if group.name in GROUPS}
    if any(len(linears.get(name, ())) != 1 for name in GROUPS):
        raise ModelError(
            f"{family!r} has no place for bounds: model_zoo/architectures/{facts.name}.toml has no groups "
            "`output` and `down` of one linear each"
        )
    found = []
    for index, _ in enumerate(model.get_submodule(facts.blocks).children()):
        block = f"{facts.blocks}.{index}"
        found += [Place(name=f"{block}.{linears[name][0]}", block=index, group=name) for name in GROUPS]
        found.append(Place(name=block, block=index, group="block"))
    return found


def attach(model: nn.Module, bounds: Bounds) -> dict[str, Bound]:
    """Put the bounds into `model`, in the place of those that it has; return them by the names of their places.

    Raises:
        ModelError: the model has other places, or another width at one of them.
    """
    places = find_places(model)
    if {place.name for place in places} != bounds.thresholds.keys():
        odd = min({place.name for place in places} ^ bounds.thresholds.keys())
        raise ModelError(f"the bounds are those of another model: only one of both has {odd}; leave them out")
    for place in places:
        _refuse_width(model, place, bounds.thresholds[place.name])
    detach(model)
    return {place.name: _put(model, place, bounds) for place in places}


def detach(model: nn.Module) -> None:
    """Take all bounds out of `model`."""
    for name, bound in attached(model).items():
        owner = model.get_submodule(name)
        for hooks in (owner._forward_hooks, owner._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if holds(hook, bound)]:
                del hooks[key]
        delattr(owner, CHILD)


def attached(model: nn.Module) -> dict[str, Bound]:
    """Return the bounds of a transformer by the names of their places."""
    end = f".{CHILD}"
    return {n.removesuffix(end): m for n, m in model.named_modules() if isinstance(m, Bound) and n.endswith(end)}


def holds(hook: Any, bound: Bound) -> bool:  # noqa: ANN401  whatever was registered
    """Return whether a hook is the one of `bound`."""
    return isinstance(hook, partial) and hook.args == (bound,)


def _put(model: nn.Module, place: Place, bounds: Bounds) -> Bound:
    owner = model.get_submodule(place.name)
    bound = Bound(bounds.thresholds[place.name].to(_device(owner)), bounds.form)
    owner.add_module(CHILD, bound)
    if place.group == "block":
        owner.register_forward_hook(partial(_bound_output, bound))
    else:
        owner.register_forward_pre_hook(partial(_bound_input, bound))
    return bound


def _bound_input(bound: Bound, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (bound(inputs[0]), *inputs[1:])


def _bound_output(bound: Bound, _: nn.Module, __: Any, output: Any) -> Any:  # noqa: ANN401
    return (bound(output[0]), *output[1:]) if isinstance(output, tuple) else bound(output)


def _refuse_width(model: nn.Module, place: Place, threshold: Tensor) -> None:
    width = width_of(model, place)
    if threshold.ndim and tuple(threshold.shape) != (width,):
        raise ModelError(
            f"the bounds are those of another model: {place.name} has {width} neurons, not {tuple(threshold.shape)}"
        )


def width_of(model: nn.Module, place: Place) -> int:
    """Return how many neurons there are at a place."""
    if place.group == "block":
        return int(model.config.get_text_config().hidden_size)  # type: ignore[union-attr, operator]
    owner = model.get_submodule(place.name)
    return int(getattr(owner, "in_features", None) or owner.weight.shape[0])  # type: ignore[index]  # Conv1D: (in, out)


def _device(module: nn.Module) -> torch.device:
    tensors = (tensor for part in (module.parameters(), module.buffers()) for tensor in part)
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
