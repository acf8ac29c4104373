"""Gains of normalisations, and their biases where they have one.

A module whose weight is no parameter any more reads it from a slot. Where examples have copies of their own, PyTorch's
`LayerNorm`, which takes one weight alone, normalises without, and the copies are applied to what it returns.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from torch import Tensor, nn

from quantkit.errors import UsageError
from quantkit.personal.parameters._places import Place, put, restore, set_tensor


@dataclass(frozen=True, kw_only=True)
class Norm:
    """Normalisations.

    Attributes:
        include: globs of the modules.
    """

    per_example: ClassVar[bool] = True
    unmergeable: ClassVar[str] = ""
    rate: ClassVar[float] = 2e-3
    include: tuple[str, ...] = ("*",)

    def attach(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """See `Trainable`."""
        found = {}
        for name, module in _norms(model, self.include):
            places = {}
            for part in ("weight", "bias"):
                before = module._parameters.get(part)
                if before is None:
                    continue
                places[part] = place = Place(before)
                put(module, part, place)
                place.undo.append(restore(module, part, before))
                del module._parameters[part]
                found[f"{name}.{part}"] = place.value
            first = next(iter(places.values()))
            first.undo.append(module.register_forward_pre_hook(_reader(places)).remove)
            if isinstance(module, nn.LayerNorm):
                first.undo.append(module.register_forward_hook(_applier(places)).remove)
        return found

    def settle(self, model: nn.Module, values: Mapping[str, Tensor]) -> None:
        """See `Trainable`."""
        for name, value in values.items():
            owner, _, part = name.rpartition(".")
            module = model.get_submodule(owner)
            before: Any = module._parameters[part]
            set_tensor(module, part, value.to(before.device, before.dtype))


def _norms(model: nn.Module, include: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of each normalisation of one gain per feature that one of the globs means.

    Raises:
        UsageError: a glob means none.
    """
    named = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if "norm" in type(module).__name__.lower() and weight is not None and weight.ndim == 1:
            named[name] = module
    for glob in include:
        if not any(fnmatchcase(name, glob) for name in named):
            raise UsageError(f"no normalisation matches {glob!r}; there are {', '.join(named) or 'none'}")
    yield from ((name, module) for name, module in named.items() if any(fnmatchcase(name, g) for g in include))


def _reader(places: Mapping[str, Place]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def read(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        apart = isinstance(module, nn.LayerNorm)
        for part, place in places.items():
            alone = place.copies is not None and apart
            vars(module)[part] = None if alone else _as_weight(place, inputs[0])

    return read


def _applier(places: Mapping[str, Place]) -> Callable[[nn.Module, object, Tensor], Tensor | None]:
    def apply(_: nn.Module, __: object, output: Tensor) -> Tensor | None:
        if places["weight"].copies is None:
            return None
        output = output * places["weight"].over(output)
        return output + places["bias"].over(output) if "bias" in places else output

    return apply


def _as_weight(place: Place, inputs: Tensor) -> Tensor:
    """Return what a module multiplies by: its own dtype decides, as it did when the weight was a parameter."""
    return place.value if place.copies is None else place.over(inputs)


METHOD = Norm
