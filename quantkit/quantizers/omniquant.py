"""OmniQuant: clipping and equivalent transforms, learned block by block (Shao et al., arXiv 2308.13137).

Each group's bounds shrink by a learned share of its smallest and largest weight (LWC, section 3.2),

    low = sigmoid(beta) * min(w)        high = sigmoid(gamma) * max(w)

scales move between norms, values, queries and keys and the linears that read them (LET, section 3.3), and both
minimise || F(W, X) - F(Q(W), Q(X')) ||^2 over the output of a block, in a window of several that of each, where X is
the reference stream and X' the actual one. With `aug_loss` the term || F(W, X') - F(Q(W), Q(X')) ||^2 is added.

Past the paper, in the same loop: windows of several blocks that slide by one (CBQ, arXiv 2312.07950), learned rounding
(AdaRound, arXiv 2004.10568; SignRound, arXiv 2309.05516), learned weights (EfficientQAT, arXiv 2407.11062), and a start
from GPTQ's weights.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from quantkit.calibrate.passes import Phase, Window
from quantkit.calibrate.statistics import Range, input_statistics
from quantkit.core.affine import round_to_nearest
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import UNQUANTIZED, QuantScheme
from quantkit.core.search import TRIALS, searched_bounds
from quantkit.errors import UsageError
from quantkit.model.block import Site
from quantkit.model.device import native_bfloat16
from quantkit.quantizers.gptq import GPTQ
from quantkit.train.fit import SCHEDULES, SIGN, ParameterGroup, Schedule, fit
from quantkit.train.trainables import BlockTransform, WeightQuantizer


@dataclass(frozen=True, kw_only=True)
class OmniQuant:
    """OmniQuant; `for_scheme` gives the settings of the official scripts.

    Learning rates are for one sequence per batch; they grow with the square root of the batch.

    Attributes:
        updates: updates for each window, over one batch each.
        lwc: learn the clipping.
        lwc_lr: learning rate of gamma and beta.
        let: learn equivalent transforms.
        let_lr: learning rate of scales and shifts.
        let_down: transform between up_proj and down_proj too, which the paper does not.
        alpha: power of the activations' magnitude in the scales at the start.
        rounding: learn which of the two neighbouring levels each weight takes.
        rounding_lr: how far an update moves a weight at the start, in steps, times `updates`: falling linearly, 1 lets
            a weight move by half a step in all. It does not grow with the batch.
        weights: learn the weights themselves.
        weights_lr: learning rate of the weights, in steps.
        aug_loss: add the distance to what the original blocks make of the actual stream.
        window: blocks that are optimised together.
        init: where the clipping starts, and rounding and weights: at almost the whole range and the original weights
            (`nearest`), at searched bounds (`search`), or there and at the weights that GPTQ rounds (`gptq`).
        schedule: what becomes of the learning rates; batches come in random order unless it is `constant`.
        amp: compute matrix products in bfloat16 while training, where the CPU has instructions for it; GPUs always do.
    """

    phase: ClassVar[Phase] = Phase.ROUND
    learns: ClassVar[bool] = True

    updates: int = 2560
    lwc: bool = True
    lwc_lr: float = 1e-2
    let: bool = False
    let_lr: float = 5e-3
    let_down: bool = False
    alpha: float = 0.5
    rounding: bool = False
    rounding_lr: float = 1.0
    weights: bool = False
    weights_lr: float = 2e-3
    aug_loss: bool = False
    window: int = 1
    init: Literal["nearest", "search", "gptq"] = "nearest"
    schedule: Schedule = "constant"
    amp: bool = False

    def __post_init__(self) -> None:
        if self.updates < 0:
            raise UsageError(f"updates must not be negative, not {self.updates}")
        if self.window < 1:
            raise UsageError(f"window must be at least 1 block, not {self.window}")
        for name in ("lwc_lr", "let_lr", "rounding_lr", "weights_lr"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} must be positive, not {getattr(self, name)}")
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"alpha must be between 0 and 1, not {self.alpha}")
        for name, known in (("schedule", SCHEDULES), ("init", ("nearest", "search", "gptq"))):
            if getattr(self, name) not in known:
                raise UsageError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        self._refuse_what_does_not_go_together()

    def _refuse_what_does_not_go_together(self) -> None:
        if self.rounding and self.weights:
            raise UsageError("rounding and weights both move the weights before they are rounded; choose one")
        if self.updates and not (self.lwc or self.let or self.rounding or self.weights):
            raise UsageError("nothing to learn without lwc, let, rounding and weights; leave one on, or use method rtn")
        if self.init == "gptq" and (self.let or not (self.rounding or self.weights)):
            raise UsageError("init gptq is a start for rounding or weights, without let; leave it out otherwise")

    @classmethod
    def for_scheme(cls, scheme: QuantScheme) -> "OmniQuant":
        """Return the paper's setting for `scheme` (appendix A1, and the official scripts).

        40 epochs of 128 sequences at 2 bits, otherwise 20; the augmented loss at 2 bits and at W4A4; transforms where
        activations are quantized.
        """
        activations = scheme.activation_bits != UNQUANTIZED
        return cls(
            updates=5120 if scheme.bits == 2 else 2560,
            aug_loss=scheme.bits == 2 or scheme.activation_bits <= 4,
            let=activations,
        )

    @property
    def blocks_at_once(self) -> int:
        """Blocks in a window."""
        return self.window

    @property
    def updates_per_window(self) -> int:
        """Updates for each window."""
        return self.updates

    @property
    def second_order(self) -> bool:
        """Whether GPTQ gives the start."""
        return self.init == "gptq"

    @property
    def forwards_per_window(self) -> int:
        """For the augmented targets, for the ranges that transforms start from, and for GPTQ."""
        return self.aug_loss + self.let + self.second_order * GPTQ().forwards_per_window

    @property
    def roundings_per_window(self) -> int:
        """One for each share of the bounds that is tried."""
        return TRIALS if self.init != "nearest" else 0

    def apply(self, window: Window) -> None:
        """Learn what is to be learned about the window, and quantize with it."""
        if not window.sites:
            return
        quantizers = self._quantizers(window)
        transforms = self._transforms(window)
        diverged = self._train(window, quantizers, transforms)
        before = [{n: p.detach().clone() for n, p in t.block.module.named_parameters()} for t in transforms]
        changed = [set(t.block.changed) for t in transforms]
        for transform in transforms:
            transform.fold()
        for site in window.sites if transforms else []:
            quantizers[site.parameter].take(site.weight)
        learned = {site.parameter: quantizers[site.parameter].quantize() for site in window.sites}
        reason = self._reason_to_fall_back(window, learned, diverged=diverged)
        if reason:
            window.notes["fallback"] = f"rtn, because {reason}"
            for transform, values, names in zip(transforms, before, changed, strict=True):
                transform.block.module.load_state_dict(values, strict=False, assign=False)
                transform.block.changed = names
        for site in window.sites:
            plain = reason and round_to_nearest(site.weight, site.scheme, site.scale_dtype)
            site.quantized = plain or learned[site.parameter]
            site.learned = None if reason else _kept(site, quantizers[site.parameter])

    def _train(
        self, window: Window, quantizers: dict[str, WeightQuantizer], transforms: Sequence[BlockTransform]
    ) -> bool:
        """Minimise the window's error; return whether it diverged."""
        extra = self._augmented_targets(window)

        def loss(batch: int) -> Tensor:
            parameters: dict[str, Tensor] = {}
            for transform in transforms:
                parameters |= transform()
            for name, quantizer in quantizers.items():
                parameters[name] = quantizer(parameters.get(name))
            hidden, errors = window.inputs[batch].to(window.device), []
            for place, references in enumerate(window.references):
                hidden = window.step(place, batch, hidden, parameters, student=True)
                errors.append(_mean_squared(hidden, references[batch]))
            errors += [_mean_squared(hidden, target) for target in extra[batch : batch + 1]]
            return torch.stack(errors).sum()

        groups = self._groups([*quantizers.values()], transforms, math.sqrt(window.batch_size))
        if not any(group.parameters for group in groups):
            window.notes["learned"] = "nothing, because no equivalent transform has a place in these blocks"
            return False
        window.amp = self.amp and native_bfloat16(window.device)
        result = fit(
            groups,
            loss,
            batches=len(window.inputs),
            updates=self.updates,
            tick=window.tick,
            schedule=self.schedule,
            generator=torch.Generator().manual_seed(window.seed) if self.schedule != "constant" else None,
            team=window.team,
        )
        window.amp = False
        if result.diverged and result.losses:
            window.notes["diverged"] = f"in pass {len(result.losses) + 1} over the batches; the best before it is kept"
        return result.diverged and not result.losses

    def _quantizers(self, window: Window) -> dict[str, WeightQuantizer]:
        """Return the quantizer of every site by parameter name, those of an earlier window as they are."""
        quantizers = {site.parameter: self._quantizer(site) for site in window.sites}
        new = [site for site in window.sites if site.learned is None]
        if self.init != "nearest" and self.lwc:
            for site in new:
                found = searched_bounds(site.weight, site.scheme, scale_dtype=site.scale_dtype)
                quantizers[site.parameter].clip_to(*found)
        if self.init == "gptq" and new:
            grids = {name: quantizer.bounds() for name, quantizer in quantizers.items()}
            rounded = GPTQ().solve(window, grids)
            for site in new:
                quantizers[site.parameter].weight = rounded[site.name][1]
        return quantizers

    def _quantizer(self, site: Site) -> WeightQuantizer:
        offset, learned = self.rounding or self.weights, site.learned or {}
        weight = learned.get("weight", site.weight.detach())
        quantizer = WeightQuantizer(weight, site.scheme, site.scale_dtype, clip=self.lwc, offset=offset, mask=site.mask)
        if learned:
            quantizer.go_on({name: value for name, value in learned.items() if name != "weight"})
        return quantizer

    def _transforms(self, window: Window) -> list[BlockTransform]:
        """Return the transforms of the window's blocks; those of an earlier window are folded already."""
        if not self.let:
            return []
        ranges = input_statistics(window, Range)
        fresh = len(window.blocks) - window.fresh
        return [
            BlockTransform(
                block,
                ranges if place >= fresh else {},
                alpha=self.alpha,
                let_down=self.let_down,
                shift=any(site.scheme.activation_bits != UNQUANTIZED for site in block.sites),
            )
            for place, block in enumerate(window.blocks)
        ]

    def _groups(
        self, quantizers: Sequence[WeightQuantizer], transforms: Sequence[nn.Module], root: float
    ) -> list[ParameterGroup]:
        groups = []
        if self.lwc:
            clips = [parameter for quantizer in quantizers for parameter in (quantizer.gamma, quantizer.beta)]
            groups.append(ParameterGroup(parameters=clips, lr=self.lwc_lr * root))
        if transforms:
            moving = [parameter for transform in transforms for parameter in transform.parameters()]
            groups.append(ParameterGroup(parameters=moving, lr=self.let_lr * root))
        offsets = [quantizer.offset for quantizer in quantizers if quantizer.offset is not None]
        if self.rounding:
            rate = self.rounding_lr / max(1, self.updates)
            groups.append(ParameterGroup(parameters=offsets, lr=rate, betas=SIGN, limit=0.5))
        if self.weights:
            groups.append(ParameterGroup(parameters=offsets, lr=self.weights_lr * root))
        return groups

    def _reason_to_fall_back(
        self, window: Window, learned: dict[str, QuantizedTensor], *, diverged: bool
    ) -> str | None:
        """Say why plain rounding is to be kept instead of what was learned, None if it is not.

        Without training (`updates=0`) there is nothing to fall back from: the result is then RTN between bounds times
        0.982014 by definition.
        """
        if diverged:
            return "training diverged"
        if not self.updates:
            return None
        error = window.error({name: quantized.dequantize().float() for name, quantized in learned.items()})
        return (
            None if error <= window.error_rtn else f"its error {window.error_rtn:.3g} is below the learned {error:.3g}"
        )

    @torch.no_grad()
    def _augmented_targets(self, window: Window) -> Sequence[Tensor]:
        """Return what the original blocks make of the actual stream, per batch; nothing without `aug_loss`."""
        if not self.aug_loss:
            return []
        outputs = (window.forward(batch) for batch in range(len(window.inputs)))
        return window.streams.new(window.targets[0].dtype, outputs)


def _kept(site: Site, quantizer: WeightQuantizer) -> dict[str, Tensor]:
    """Return what the next window needs of a quantizer; its weight only where it is not the site's own."""
    own = quantizer.weight.data_ptr() == site.weight.data_ptr()
    return quantizer.kept() | ({} if own else {"weight": quantizer.weight})


def _mean_squared(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared difference, in float32."""
    return (output.float() - target.to(output.device, torch.float32)).square().mean()


METHOD = OmniQuant
