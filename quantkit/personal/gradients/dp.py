"""Gradients with differential privacy: every example clipped, noise once per logical batch.

DP-BiTFiT (Bu et al., "Differentially Private Bias-Term Fine-tuning", arXiv 2210.00036) with automatic clipping (arXiv
2206.07136). With the gradients g_i of the examples of a logical batch, their clipping factors C_i (`clipping.py`), the
bound R and the expected size B of a logical batch, the gradient is

    (sum_i C_i g_i + sigma R z) / B,    z ~ N(0, I) once, however many micro-batches there are.

B is the expected size, not the one that was drawn: that one is private. A batch in which nobody is, is noise alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from quantkit.errors import UsageError
from quantkit.personal import chance
from quantkit.personal.clipping import GAMMA, Function, Style, check, clipped_sum, partition
from quantkit.personal.gradients._examples import example_gradients
from quantkit.personal.protocols import Losses, Parameters


@dataclass(kw_only=True)
class Dp:
    """Clips every example, adds noise.

    Attributes:
        noise: sigma, the standard deviation of the noise divided by `bound`; 0: no noise and no privacy.
        expected: B, how many examples a logical batch has on average.
        clipping: the clipping function.
        style: which tensors are clipped together.
        bound: R, the most that an example adds to the sum.
        gamma: of auto-s.
        key: of the noise; the default is a secret of this process, and the only one with which anything is private.
    """

    needs_gradients: ClassVar[bool] = True
    noise: float
    expected: float
    clipping: Function = "auto-s"
    style: Style = "flat"
    bound: float = 1.0
    gamma: float = GAMMA
    key: bytes = field(default_factory=chance.secret_key, repr=False)

    def __post_init__(self) -> None:
        check(self.clipping, self.style, bound=self.bound, gamma=self.gamma)
        if not 0 <= self.noise < math.inf:
            raise UsageError(f"noise is {self.noise:g}; use a finite number, 0 for none")
        if not 0 < self.expected < math.inf:
            raise UsageError(f"the expected batch is {self.expected:g}; use a number above 0")

    def estimate(self, losses: Sequence[Losses], parameters: Parameters, *, step: int) -> float:
        """Set `.grad` of every parameter to the private gradient; return the mean loss, which is not private.

        The loss is for the eyes of the data's owner. An empty batch has none: not a number.
        """
        groups = partition(list(parameters), self.style)
        total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in parameters.items()}
        seen: list[Tensor] = []
        for micro_batch in losses:
            gradients, values = example_gradients(micro_batch, parameters)
            seen.append(values)
            clipped = clipped_sum(gradients, groups, bound=self.bound, function=self.clipping, gamma=self.gamma)
            for name, value in clipped.items():
                total[name] += value
        for name, parameter in parameters.items():
            parameter.grad = ((total[name] + self._noise(parameter, name, step)) / self.expected).to(parameter.dtype)
        return float(torch.cat(seen).mean()) if seen else math.nan

    def _noise(self, parameter: Tensor, name: str, step: int) -> Tensor:
        drawn = chance.normal(self.key, f"noise {step} {name}", parameter.shape)
        return drawn.to(parameter.device) * (self.noise * self.bound)

    def state(self) -> dict[str, Tensor]:
        """Return nothing: noise is never written down, a later process draws its own."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up nothing."""


METHOD = Dp
