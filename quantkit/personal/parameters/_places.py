"""Where tensors that may change are put into a model, and how they get out of it again."""

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from quantkit.errors import UsageError
from quantkit.personal.protocols import Slot
from quantkit.runtime.linear import PackedLinear

OWN = "personal_"  # how the names of modules begin that are put into a model


class Place(Slot):
    """A slot that a hook of its owner reads, and what takes it out again."""

    def __init__(self, value: Tensor) -> None:
        """Hold `value` as float32."""
        super().__init__(value)
        self.undo: list[Callable[[], object]] = []

    def over(self, tensor: Tensor) -> Tensor:
        """Return the value to be combined with `tensor`, in its dtype: examples first, the value's dimensions last.

        A `tensor` (tokens, …) of models that lay the tokens of all examples side by side gets a row for each token.
        """
        if self.copies is None:
            return self.value.to(tensor.dtype)
        examples, own = len(self.copies), self.copies.shape[1:]
        if tensor.ndim == 1 + len(own):
            tokens, rest = divmod(len(tensor), examples)
            if rest or tokens != (self.tokens or tokens):  # an expert sees some tokens only, and not whose they are
                raise UsageError("experts do not know whose tokens they see; leave them out with the option include")
            return self.copies.unsqueeze(1).expand(examples, tokens, *own).reshape(-1, *own).to(tensor.dtype)
        between = [1] * (tensor.ndim - 1 - len(own))
        return self.copies.view(examples, *between, *own).to(tensor.dtype)


def put(owner: nn.Module, name: str, place: Place) -> None:
    """Make `place` a part of `owner`.

    Raises:
        UsageError: there is one already.
    """
    if hasattr(owner, OWN + name):
        raise UsageError("the model has a personalization already; load it again, or take that out first")
    owner.add_module(OWN + name, place)
    place.undo.append(lambda: delattr(owner, OWN + name))


def take_out(model: nn.Module) -> None:
    """Make `model` what it was before anything was attached to it."""
    for place in [module for module in model.modules() if isinstance(module, Place)]:
        for undo in reversed(place.undo):
            undo()


def packed_linears(model: nn.Module, include: Sequence[str]) -> Iterator[tuple[str, PackedLinear]]:
    """Yield name and module of each packed linear that one of the globs means.

    Raises:
        UsageError: a glob means none.
    """
    named = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    if not named:
        raise UsageError("the model has no packed linear; personalize an output of quantkit quantize")
    for glob in include:
        if not any(fnmatchcase(name, glob) for name in named):
            raise UsageError(f"no packed linear matches {glob!r}; the first one is {next(iter(named))}")
    yield from ((name, module) for name, module in named.items() if any(fnmatchcase(name, g) for g in include))


def set_tensor(owner: nn.Module, name: str, value: Tensor | None) -> None:
    """Let `value`, which is never trained, be the parameter `name` of `owner`."""
    owner._parameters[name] = None if value is None else nn.Parameter(value.detach(), requires_grad=False)


def restore(owner: nn.Module, name: str, before: Tensor | None) -> Callable[[], object]:
    """Return what gives `owner` the parameter back that it had."""

    def undo() -> None:
        vars(owner).pop(name, None)
        owner._parameters[name] = before  # type: ignore[assignment]

    return undo


def zeros_like_outputs(linear: PackedLinear) -> Tensor:
    """Return a zero for each output feature, where the weight lies."""
    return torch.zeros(linear.out_features, device=linear._place())
