"""Experimental: private gradients whose clipping error is fed back (DiceSGD), with an accounting of its own.

Zhang et al., "Differentially Private SGD Without Clipping Bias", arXiv 2311.14632. With clip(g, C) = min(1, C/||g||) g,
e_0 = 0 and the gradients g_i of a batch of B, held to ||g_i|| <= G by clip(g_i, G):

    v_t = (1/B) sum_i clip(g_i, C1) + clip(e_t, C2)        e_{t+1} = e_t + (1/B) sum_i g_i - v_t

and v_t + w_t is the gradient, w_t ~ N(0, s^2 I). The paper's noise rests on a bound of gradients that nothing
enforces, and on constants that reviewers could not follow. Here G is enforced, and the accounting is this. Take away
what one example adds to the E steps that it is in, and keep every x_t. Projection onto a ball and its residual are
firmly nonexpansive, ||clip u - clip v||^2 + ||res u - res v||^2 <= ||u - v||^2, and each of the E steps brings at most
(G - C1)/B into the difference of e. The sum over steps telescopes: the v_t together move by

    Delta <= sqrt(E) C1/B + E (G - C1)/B,

so the whole run is one Gaussian mechanism with noise s/Delta. Steps are known and e remembers who took part: sampling
amplifies nothing, and at the same epsilon this is far more noise than `dp` adds. The bound was derived for this project
and is not published. AUTO-S is no projection and cannot be used. e_t is not private: it stays in this process.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from quantkit.errors import QuantkitWarning, UsageError
from quantkit.personal import chance
from quantkit.personal.clipping import norms, weighted
from quantkit.personal.gradients._examples import example_gradients
from quantkit.personal.protocols import Losses, Parameters

Tensors = Mapping[str, Tensor]
ALARM = 10.0  # times C2 that the norm of e may reach before somebody is told


def sensitivity(*, inner: float, enforced: float, participations: int, batch: float) -> float:
    """Return Delta: how far all v_t together move with one example's part, when each example is in so many steps."""
    return (math.sqrt(participations) * inner + participations * (enforced - inner)) / batch


def feed_back(
    mean: Tensors, clipped: Tensors, error: Tensors, outer: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return v_t and e_{t+1} from the mean of the gradients, that of the clipped ones, e_t and C2."""
    factor = _projection(norm_of(error), outer)
    released = {name: clipped[name] + factor * error[name] for name in error}
    return released, {name: error[name] + mean[name] - released[name] for name in error}


def norm_of(tensors: Tensors) -> Tensor:
    """Return the norm of all tensors together, float64."""
    return torch.stack([value.to(torch.float64).square().sum() for value in tensors.values()]).sum().sqrt()


def _projection(norm: Tensor, bound: float) -> Tensor:
    """Return min(1, bound / norm), and 0 where the norm is not finite."""
    return torch.where(norm.isfinite(), torch.where(norm > bound, bound / norm, 1.0), 0.0)


@dataclass(kw_only=True)
class Dice:
    """Clips every example and feeds back what clipping took.

    Attributes:
        noise: the standard deviation of the noise divided by Delta; 0: no noise and no privacy.
        expected: B, what sums over a batch are divided by.
        participations: E, in how many steps an example is at most.
        inner: C1.
        outer: C2, at least C1.
        enforced: G, at least C1.
        key: of the noise; the default is a secret of this process, and the only one with which anything is private.
        error: e_t, by name.
    """

    needs_gradients: ClassVar[bool] = True
    noise: float
    expected: float
    participations: int
    inner: float = 1.0
    outer: float = 1.0
    enforced: float = 2.0
    key: bytes = field(default_factory=chance.secret_key, repr=False)
    error: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.inner < math.inf:
            raise UsageError(f"inner clipping is {self.inner:g}; use a finite number above 0")
        if not self.inner <= self.outer < math.inf:
            raise UsageError(
                f"outer clipping {self.outer:g} is below the inner {self.inner:g}: the error would grow; raise it"
            )
        if not self.inner <= self.enforced < math.inf:
            raise UsageError(
                f"gradients held to {self.enforced:g} are below the inner clipping {self.inner:g}; raise it"
            )
        if self.participations < 1 or not 0 < self.expected < math.inf or not 0 <= self.noise < math.inf:
            raise UsageError("noise, batch and participations must be finite numbers, 0, above 0 and at least 1")

    def sensitivity(self) -> float:
        """Return Delta of the whole run."""
        return sensitivity(
            inner=self.inner, enforced=self.enforced, participations=self.participations, batch=self.expected
        )

    def estimate(self, losses: Sequence[Losses], parameters: Parameters, *, step: int) -> float:
        """Set `.grad` of every parameter to v_t + w_t, move e on; return the mean loss, which is not private."""
        mean, clipped = self._zeros(parameters), self._zeros(parameters)
        seen: list[Tensor] = []
        for micro_batch in losses:
            gradients, values = example_gradients(micro_batch, parameters)
            seen.append(values)
            norm = norms(gradients, list(parameters))
            for total, bound in ((mean, self.enforced), (clipped, self.inner)):
                factor = _projection(norm, bound) / self.expected
                for name in parameters:
                    total[name] += weighted(factor, gradients[name])
        released, self.error = feed_back(mean, clipped, self.error or self._zeros(parameters), self.outer)
        self._watch()
        scale = self.noise * self.sensitivity()
        for name, parameter in parameters.items():
            drawn = chance.normal(self.key, f"noise {step} {name}", parameter.shape).to(parameter.device)
            parameter.grad = (released[name] + scale * drawn).to(parameter.dtype)
        return float(torch.cat(seen).mean()) if seen else math.nan

    def _zeros(self, parameters: Parameters) -> dict[str, Tensor]:
        return {name: torch.zeros_like(value, dtype=torch.float64) for name, value in parameters.items()}

    def _watch(self) -> None:
        norm = float(norm_of(self.error))
        if norm > ALARM * self.outer:
            warnings.warn(
                f"what clipping took has grown to {norm:.3g}, {norm / self.outer:.3g} times what a step gives back; "
                "raise the outer clipping or lower the learning rate",
                QuantkitWarning,
                stacklevel=2,
            )

    def state(self) -> dict[str, Tensor]:
        """Return nothing: e_t is not private and is written nowhere."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:  # noqa: ARG002
        """Refuse: what is needed to go on was never written down.

        Raises:
            UsageError: always.
        """
        raise UsageError("dice cannot go on after an interruption, as its error is not written down; start again")


METHOD = Dice
