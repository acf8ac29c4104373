"""The scales of the quantization grid, one for each group of packed weights.

What is trained is what could be stored: a scale is rounded to its stored dtype on the way into a product, and its
gradient passes that rounding unchanged. So a merged model has the very weights that were trained.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from quantkit.personal.parameters._places import Place, packed_linears, put
from quantkit.runtime.linear import PackedLinear


@dataclass(frozen=True, kw_only=True)
class Scales:
    """Scales of packed linears.

    Attributes:
        include: globs of the linears.
    """

    per_example: ClassVar[bool] = False
    unmergeable: ClassVar[str] = ""
    rate: ClassVar[float] = 1e-4
    include: tuple[str, ...] = ("*",)

    def attach(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """See `Trainable`."""
        found = {}
        for name, linear in packed_linears(model, self.include):
            scale = linear.unpack().scale
            place = Place(scale)
            put(linear, "scale", place)
            linear.scaling = _reader(place, scale.dtype)
            place.undo.append(_forgetter(linear))
            found[f"{name}.scale"] = place.value
        return found

    def settle(self, model: nn.Module, values: Mapping[str, Tensor]) -> None:
        """See `Trainable`; the packed codes stay as they are."""
        for name, value in values.items():
            linear = model.get_submodule(name.removesuffix(".scale"))
            assert isinstance(linear, PackedLinear)
            linear.replace_scale(value)


def _reader(place: Place, dtype: torch.dtype) -> Callable[[], Tensor]:
    def read() -> Tensor:
        value = place.value
        return value + (value.detach().to(dtype).to(value.dtype) - value.detach())

    return read


def _forgetter(linear: PackedLinear) -> Callable[[], object]:
    def forget() -> None:
        linear.scaling = None

    return forget


METHOD = Scales
