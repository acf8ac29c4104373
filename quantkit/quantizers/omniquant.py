"""OmniQuant: learnable weight clipping, trained block by block (Shao et al., arXiv 2308.13137, sections 3.1 and 3.2).

Each group's bounds shrink by a learned share of its smallest and largest weight,

    low = sigmoid(beta) * min(w)        high = sigmoid(gamma) * max(w)

and gamma and beta minimise || F(W, X) - F(Q(W), X') ||^2 over the output of a window of blocks, where X is the reference
stream and X' the actual one. With `aug_loss` the term || F(W, X') - F(Q(W), X') ||^2 is added.

Past the paper, in the same loop: windows of several blocks that slide by one (CBQ, arXiv 2312.07950), learned rounding
(AdaRound, arXiv 2004.10568; SignRound, arXiv 2309.05516) and learned weights (EfficientQAT, arXiv 2407.11062).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantkit.calibrate.passes import Phase, Window
from quantkit.core.affine import round_to_nearest
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import QuantScheme
from quantkit.errors import UsageError
from quantkit.model.block import Site
from quantkit.train.fit import SIGN, ParameterGroup, fit
from quantkit.train.trainables import WeightQuantizer


@dataclass(frozen=True, kw_only=True)
class OmniQuant:
    """OmniQuant; the defaults are those of the official scripts for weight-only quantization.

    Attributes:
        updates: updates for each window, over one batch each.
        lwc_lr: learning rate of gamma and beta, times the square root of the batch.
        rounding: learn the rounding too.
        rounding_lr: the share of a step that an update moves an offset, at the start.
        weights: learn the weights too.
        weights_lr: learning rate of the weights, in steps, times the square root of the batch.
        aug_loss: add the distance to what the original blocks make of the actual stream.
        window: blocks that are optimised together.
        schedule: what becomes of the learning rates: constant, linear or cosine.
    """

    phase: ClassVar[Phase] = Phase.ROUND
    learns: ClassVar[bool] = True

    updates: int = 2560
    lwc_lr: float = 1e-2
    rounding: bool = False
    rounding_lr: float = 5e-3
    weights: bool = False
    weights_lr: float = 1e-3
    learn_zero: bool = False
    aug_loss: bool = False
    window: int = 1
    schedule: str = "constant"
    intermediate: bool = False
    amp: bool = False

    @classmethod
    def for_scheme(cls, scheme: QuantScheme) -> "OmniQuant":
        """Return the paper's setting for `scheme`: at 2 bits 40 epochs with `aug_loss`, otherwise 20 without."""
        return cls(updates=5120, aug_loss=True) if scheme.bits == 2 else cls()

    @property
    def blocks_at_once(self) -> int:
        """Blocks in a window."""
        return self.window

    @property
    def updates_per_window(self) -> int:
        """Updates for each window."""
        return self.updates

    def apply(self, window: Window) -> None:
        """Learn the clipping of every site of the window and quantize with it."""
        if not window.sites:
            return
        quantizers = {site.parameter: self._quantizer(site) for site in window.sites}
        extra = self._augmented_targets(window)

        def loss(batch: int) -> Tensor:
            weights = {site.parameter: quantizers[site.parameter](site.weight) for site in window.sites}
            value, losses = window.inputs[batch].to(window.device), []
            for place in range(len(window.blocks)):
                value = window.step(place, batch, value, weights)
                if self.intermediate or place == len(window.blocks) - 1:
                    losses.append((value.float() - window.references[place][batch].to(value).float()).square().mean())
            losses += [(value.float() - target.to(value)).square().mean() for target in extra[batch : batch + 1]]
            return torch.stack(losses).sum()

        window.amp = self.amp
        result = fit(
            self._groups(quantizers, math.sqrt(len(window.inputs[0]))),
            loss,
            batches=len(window.inputs),
            updates=self.updates,
            tick=window.tick,
            schedule=self.schedule,
            generator=torch.Generator().manual_seed(window.seed) if self.schedule != "constant" else None,
        )
        window.amp = False
        learned = {site.name: quantizers[site.parameter].quantize(site.weight) for site in window.sites}
        reason = self._reason_to_fall_back(window, learned, diverged=result.diverged)
        if reason:
            window.notes["fallback"] = f"rtn, because {reason}"
        for site in window.sites:
            plain = reason and round_to_nearest(site.weight, site.scheme, site.scale_dtype)
            site.quantized = plain or learned[site.name]
            site.latent = None if plain else quantizers[site.parameter].latent(site.weight, site.quantized)

    def _quantizer(self, site):
        if site.learned is None:
            site.learned = WeightQuantizer(
                site.weight,
                site.scheme,
                site.scale_dtype,
                offset=self.rounding or self.weights,
                learn_zero=self.learn_zero,
            )
        return site.learned

    def _groups(self, quantizers, root):
        clips = [p for q in quantizers.values() for p in (q.gamma, q.beta)]
        groups = [ParameterGroup(parameters=clips, lr=self.lwc_lr * root)]
        offsets = [q.offset for q in quantizers.values() if q.offset is not None]
        if self.rounding:
            groups.append(ParameterGroup(parameters=offsets, lr=self.rounding_lr, betas=SIGN, limit=0.5))
        if self.weights:
            groups.append(ParameterGroup(parameters=offsets, lr=self.weights_lr * root))
        return groups

    def _reason_to_fall_back(
        self, window: Window, learned: Mapping[str, QuantizedTensor], *, diverged: bool
    ) -> str | None:
        """Say why plain rounding is to be kept instead of what was learned, None if it is not.

        Without training (`updates=0`) there is nothing to fall back from: the result is then RTN between bounds times
        0.982014 by definition.
        """
        if diverged:
            return "training diverged"
        if not self.updates:
            return None
        error = window.error({site.parameter: _dense(site, learned) for site in window.sites})
        return (
            None if error <= window.error_rtn else f"its error {window.error_rtn:.3g} is below the learned {error:.3g}"
        )

    @torch.no_grad()
    def _augmented_targets(self, window: Window) -> Sequence[Tensor]:
        """Return what the original blocks make of the actual stream, per batch; nothing without `aug_loss`."""
        if not self.aug_loss:
            return []
        return [window.forward(batch).to(window.targets[batch].dtype) for batch in range(len(window.inputs))]


def _dense(site: Site, quantized: Mapping[str, QuantizedTensor]) -> Tensor:
    return quantized[site.name].dequantize().to(site.weight.dtype)


METHOD = OmniQuant
