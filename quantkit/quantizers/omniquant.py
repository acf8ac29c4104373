"""OmniQuant: learnable weight clipping, trained block by block (Shao et al., arXiv 2308.13137, sections 3.1 and 3.2).

Each group's bounds shrink by a learned share of its smallest and largest weight,

    low = sigmoid(beta) * min(w)        high = sigmoid(gamma) * max(w)

and gamma and beta minimise || F(W, X) - F(Q(W), X') ||^2 over the block's output, where X is the reference stream and
X' the actual one. With `aug_loss` the term || F(W, X') - F(Q(W), X') ||^2 is added.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from quantkit.calibrate.passes import Phase, Window
from quantkit.core.affine import fake_quantize, group_bounds, quantize, round_to_nearest
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import QuantScheme
from quantkit.errors import UsageError
from quantkit.model.block import Site
from quantkit.train.fit import ParameterGroup, fit

INITIAL_LOGIT = 4.0  # sigmoid(4) = 0.982014: almost the whole range, with a gradient


class LearnableClip(nn.Module):
    """The clipping of one weight matrix: `gamma` and `beta`, (out, groups) float32 each.

    The bounds of the weight itself are found once: the weight does not change while only its clipping is learned.
    """

    def __init__(self, weight: Float[Tensor, "out in"], scheme: QuantScheme) -> None:
        super().__init__()
        self.scheme = scheme
        self.low, self.high = group_bounds(weight, scheme)
        self.gamma = nn.Parameter(torch.full_like(self.high, INITIAL_LOGIT))
        self.beta = nn.Parameter(torch.full_like(self.low, INITIAL_LOGIT))

    def bounds(self) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
        """Return the clipped bounds (low, high)."""
        return self.low * self.beta.sigmoid(), self.high * self.gamma.sigmoid()

    def forward(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return the fake-quantized weight."""
        return fake_quantize(weight, *self.bounds(), self.scheme)

    def quantize(self, weight: Float[Tensor, "out in"], scale_dtype: torch.dtype) -> QuantizedTensor:
        """Return the weight quantized between the learned bounds."""
        return quantize(weight, *self.bounds(), self.scheme, scale_dtype)


@dataclass(frozen=True, kw_only=True)
class OmniQuant:
    """OmniQuant's learnable weight clipping; defaults of the official scripts for weight-only quantization.

    Attributes:
        epochs: passes over the calibration batches, one update per batch.
        lwc_lr: learning rate of gamma and beta.
        aug_loss: add the distance to what the original block makes of the actual stream.
    """

    phase: ClassVar[Phase] = Phase.ROUND
    learns: ClassVar[bool] = True

    epochs: int = 20
    lwc_lr: float = 1e-2
    aug_loss: bool = False

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise UsageError(f"epochs must not be negative, not {self.epochs}")
        if not self.lwc_lr > 0:
            raise UsageError(f"lwc_lr must be positive, not {self.lwc_lr}")

    @classmethod
    def for_scheme(cls, scheme: QuantScheme) -> "OmniQuant":
        """Return the paper's setting for `scheme`: at 2 bits 40 epochs with `aug_loss`, otherwise 20 without."""
        return cls(epochs=40, aug_loss=True) if scheme.bits == 2 else cls()

    @property
    def updates_per_batch(self) -> int:
        """One update per epoch."""
        return self.epochs

    def apply(self, window: Window) -> None:
        """Learn the clipping of every site of the window and quantize with it."""
        if not window.sites:
            return
        clips = {site.name: LearnableClip(site.weight, site.scheme) for site in window.sites}
        extra = self._augmented_targets(window)

        def loss(batch: int) -> Tensor:
            weights = {site.name: clips[site.name](site.weight) for site in window.sites}
            output = window.forward(batch, weights).float()
            targets = [window.targets[batch], *(extra[batch : batch + 1])]
            return torch.stack([(output - target.to(output)).square().mean() for target in targets]).sum()

        parameters = [parameter for clip in clips.values() for parameter in clip.parameters()]
        result = fit(
            [ParameterGroup(parameters=parameters, lr=self.lwc_lr)],
            loss,
            batches=len(window.inputs),
            epochs=self.epochs,
            tick=window.tick,
        )
        learned = {site.name: clips[site.name].quantize(site.weight, site.scale_dtype) for site in window.sites}
        reason = self._reason_to_fall_back(window, learned, diverged=result.diverged)
        if reason:
            window.notes["fallback"] = f"rtn, because {reason}"
        for site in window.sites:
            plain = reason and round_to_nearest(site.weight, site.scheme, site.scale_dtype)
            site.quantized = plain or learned[site.name]

    def _reason_to_fall_back(
        self, window: Window, learned: dict[str, QuantizedTensor], *, diverged: bool
    ) -> str | None:
        """Say why plain rounding is to be kept instead of what was learned, None if it is not.

        Without training (`epochs=0`) there is nothing to fall back from: the result is then RTN between bounds times
        0.982014 by definition.
        """
        if diverged:
            return "training diverged"
        if not self.epochs:
            return None
        error = window.error({site.name: _dense(site, learned) for site in window.sites})
        return (
            None if error <= window.error_rtn else f"its error {window.error_rtn:.3g} is below the learned {error:.3g}"
        )

    @torch.no_grad()
    def _augmented_targets(self, window: Window) -> Sequence[Tensor]:
        """Return what the original blocks make of the actual stream, per batch; nothing without `aug_loss`."""
        if not self.aug_loss:
            return []
        return [
            window.forward(batch, student=False).to(window.targets[batch].dtype) for batch in range(len(window.inputs))
        ]


def _dense(site: Site, quantized: dict[str, QuantizedTensor]) -> Tensor:
    return quantized[site.name].dequantize().to(site.weight.dtype)


METHOD = OmniQuant
