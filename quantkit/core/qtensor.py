"""The result of quantizing one weight matrix."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from quantkit.core.scheme import QuantScheme


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedTensor:
    """A weight matrix as integer codes with one scale, and at most one zero point, per group.

    Invariants, with `g = in // groups`:

        codes.shape == (out, in), scale.shape == (out, groups), zero_point.shape == scale.shape
        scheme.smallest_code <= codes, zero_point <= scheme.largest_code
        scale is finite, positive, and of the dtype that is stored
        zero_point is None exactly when scheme.symmetric
        W[o, i] ≈ (codes[o, i] - zero_point[o, i // g]) * scale[o, i // g]
    """

    codes: Int8[Tensor, "out in"]
    scale: Float[Tensor, "out groups"]
    zero_point: Int8[Tensor, "out groups"] | None
    scheme: QuantScheme

    def __post_init__(self) -> None:
        if (self.zero_point is None) != self.scheme.symmetric:
            raise ValueError(f"zero_point is {self.zero_point} but the scheme is {self.scheme}")
        if self.codes.shape[1] % self.scale.shape[1]:
            raise ValueError(f"{self.scale.shape[1]} groups do not divide {self.codes.shape[1]} input features")

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> "QuantizedTensor":
        """Return what `tensors` was made of."""
        return cls(codes=tensors["codes"], scale=tensors["scale"], zero_point=tensors.get("zero_point"), scheme=scheme)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that there are, by the names of their fields."""
        found = {"codes": self.codes, "scale": self.scale, "zero_point": self.zero_point}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def dequantize(self) -> Float[Tensor, "out in"]:
        """Return (codes - zero_point) * scale, rounded once to the scale's dtype, as every runtime computes it.

        The product is exact in float32 before that rounding: a difference of codes has 9 bits and a 16-bit scale at
        most 11, and float32 holds 24.
        """
        steps = self.codes.to(torch.float32).unflatten(1, (self.scale.shape[1], -1))
        if self.zero_point is not None:
            steps -= self.zero_point.to(torch.float32).unsqueeze(-1)
        weight: Tensor = steps * self.scale.to(torch.float32).unsqueeze(-1)
        return weight.flatten(1).to(self.scale.dtype)
