"""Biases of packed linears, zero where the model has none.

BitFit (Ben Zaken et al., arXiv 2106.10199). Behind a linear s = W a + b the gradient of b is the sum over tokens of the
gradient of s: no input of a linear is kept for it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from quantkit.personal.parameters._places import (
    Place,
    packed_linears,
    put,
    restore,
    set_tensor,
    zeros_like_outputs,
)


@dataclass(frozen=True, kw_only=True)
class Bias:
    """Biases.

    Attributes:
        include: globs of the linears that get one.
    """

    per_example: ClassVar[bool] = True
    unmergeable: ClassVar[str] = ""
    rate: ClassVar[float] = 5e-3
    include: tuple[str, ...] = ("*",)

    def attach(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """See `Trainable`; a bias that the model has is what training begins with."""
        found = {}
        for name, linear in packed_linears(model, self.include):
            place = Place(zeros_like_outputs(linear) if linear.bias is None else linear.bias)
            put(linear, "bias", place)
            place.undo.append(restore(linear, "bias", linear.bias))
            linear._parameters["bias"] = None
            place.undo.append(linear.register_forward_hook(_adder(place)).remove)
            found[f"{name}.bias"] = place.value
        return found

    def settle(self, model: nn.Module, values: Mapping[str, Tensor]) -> None:
        """See `Trainable`."""
        for name, value in values.items():
            owner: Any = model.get_submodule(name.rpartition(".")[0])
            dtype = next(model.parameters()).dtype
            set_tensor(owner, "bias", value.to(zeros_like_outputs(owner).device, dtype))


def _adder(place: Place) -> Callable[[nn.Module, object, Tensor], Tensor]:
    def add(_: nn.Module, __: object, output: Tensor) -> Tensor:
        return output.add_(place.over(output))  # in place: nothing keeps what a linear returned

    return add


METHOD = Bias
