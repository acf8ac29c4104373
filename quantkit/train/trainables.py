"""What can be learned about a block: clipping, rounding and values of its weights, and its equivalent transforms."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from quantkit.calibrate.statistics import Range
from quantkit.core.affine import fake_quantize, group_bounds, quantize
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import QuantScheme
from quantkit.model.block import Block
from quantkit.model.equivalence import Pair, fold, pairs_of, transform_all

INITIAL_LOGIT = 4.0  # sigmoid(4) = 0.982014: almost the whole range, with a gradient
SMALLEST_SCALE = 1e-2  # of a transform, so that no channel of a 16-bit model overflows
SMALLEST_MAGNITUDE = 1e-5


class WeightQuantizer(nn.Module):
    """The quantization of one weight matrix w as a function of what is learned.

        low = sigmoid(beta) min(w)    high = sigmoid(gamma) max(w)    q = clamp(round(w / h + v) + z)

    `gamma` and `beta`, (out, groups) float32 each, are OmniQuant's learnable weight clipping (arXiv 2308.13137, eq. 2).
    The offset `v`, (out, in) float32 in steps h, is there if `offset` is asked for: kept within half a step it decides
    between the two neighbouring levels (learned rounding: Nagel et al., arXiv 2004.10568; Cheng et al., arXiv
    2309.05516); without a limit it moves the weight anywhere (Chen et al., EfficientQAT, arXiv 2407.11062).

    Attributes:
        weight: w, where nothing else is given in a call; it may be replaced by what another method made of it.
        clip: whether the clipping is used; otherwise bounds are the smallest and largest weight.
        mask: where it is False the weight is zero and stays so, whatever is learned; None: nowhere.
    """

    def __init__(
        self,
        weight: Float[Tensor, "out in"],
        scheme: QuantScheme,
        scale_dtype: torch.dtype,
        *,
        clip: bool = True,
        offset: bool = False,
        mask: Bool[Tensor, "out in"] | None = None,
    ) -> None:
        super().__init__()
        self.weight, self.scheme, self.scale_dtype, self.clip = weight, scheme, scale_dtype, clip
        self.low, self.high = group_bounds(weight, scheme)
        self.gamma = nn.Parameter(torch.full_like(self.high, INITIAL_LOGIT))
        self.beta = nn.Parameter(torch.full_like(self.low, INITIAL_LOGIT))
        self.offset = nn.Parameter(torch.zeros_like(weight)) if offset else None
        self.mask = mask

    def kept(self) -> dict[str, Tensor]:
        """Return all that decides the result but the weight: logits, the bounds that they scale, and the offset."""
        names = ("gamma", "beta", "low", "high", *(() if self.offset is None else ("offset",)))
        return {name: getattr(self, name).detach() for name in names}

    @torch.no_grad()
    def go_on(self, kept: Mapping[str, Tensor]) -> None:
        """Take over what `kept` returned."""
        self.low, self.high = kept["low"], kept["high"]
        for name in kept.keys() - {"low", "high"}:
            getattr(self, name).copy_(kept[name])

    @torch.no_grad()
    def clip_to(self, low: Float[Tensor, "out groups"], high: Float[Tensor, "out groups"]) -> None:
        """Let the clipping start at these bounds, a share of the smallest and largest weight each.

        A sigmoid has no logit for the whole range, so the nearest start is within half a step of it: with many bits the
        step is small, and the usual 1.8 % of the range would be several of them.
        """
        widest = max(INITIAL_LOGIT, math.log(2 * self.scheme.levels - 1))  # sigmoid: 1 - 1 / (2 levels)
        for logit, bound, extreme in ((self.gamma, high, self.high), (self.beta, low, self.low)):
            share = torch.where(extreme == 0, 1.0, bound / extreme)
            logit.copy_(share.logit().clamp(-INITIAL_LOGIT, widest))

    def bounds(
        self, weight: Float[Tensor, "out in"] | None = None
    ) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
        """Return the clipped bounds (low, high), of `weight` where one is given."""
        low, high = (self.low, self.high) if weight is None else group_bounds(weight, self.scheme)
        return (low * self.beta.sigmoid(), high * self.gamma.sigmoid()) if self.clip else (low, high)

    def forward(self, weight: Float[Tensor, "out in"] | None = None) -> Float[Tensor, "out in"]:
        """Return the fake-quantized weight.

        A `weight` that is being transformed takes the place of the own one; its bounds are found again and carry
        gradients.
        """
        return fake_quantize(
            self.weight if weight is None else weight,
            *self.bounds(weight),
            self.scheme,
            offset=self._kept_offset(),
            scale_dtype=self.scale_dtype,
        )

    def take(self, weight: Float[Tensor, "out in"]) -> None:
        """Let `weight`, into which a transform was folded, take the place of the own one."""
        self.weight = weight.detach()
        self.low, self.high = group_bounds(weight, self.scheme)

    @torch.no_grad()
    def quantize(self) -> QuantizedTensor:
        """Return the weight quantized with what was learned."""
        return quantize(self.weight, *self.bounds(), self.scheme, self.scale_dtype, self._kept_offset())

    def _kept_offset(self) -> Tensor | None:
        """Return the offset of the weights that the mask keeps, zero elsewhere."""
        return self.offset if self.offset is None or self.mask is None else self.offset * self.mask


class BlockTransform(nn.Module):
    """The learnable equivalent transforms of one block (arXiv 2308.13137, section 3.3): scales and shifts by pair.

    Scales begin at max|x|^alpha / max|w|^(1 - alpha) of each channel, those of queries and keys at one; shifts at the
    middle of the channel's range.

    Attributes:
        block: the block; it changes only in `fold`.
        pairs: where scales can move in it.
        skipped: where they cannot, and why.
    """

    def __init__(self, block: Block, inputs: Mapping[str, Range], *, alpha: float, let_down: bool, shift: bool) -> None:
        """Start from the ranges of the linears' inputs, by full module name."""
        super().__init__()
        self.block = block
        self.pairs, self.skipped = pairs_of(block, let_down=let_down)
        self.scales, self.shifts = nn.ParameterDict(), nn.ParameterDict()
        weights = dict(block.module.named_parameters())
        for pair in self.pairs:
            reach = inputs.get(f"{block.name}.{pair.targets[0]}")
            key = pair.name.replace(".", "_")
            if pair.kind == "query-key" or reach is None:
                size = (pair.size,)
                self.scales[key] = nn.Parameter(weights[f"{pair.source}.weight"].new_ones(size, dtype=torch.float32))
                continue
            columns = torch.stack([_columns(weights[f"{name}.weight"], pair) for name in pair.targets]).amax(dim=0)
            largest = _by_free(reach.largest, pair).clamp(min=SMALLEST_MAGNITUDE)
            wide = _by_free(columns, pair).clamp(min=SMALLEST_MAGNITUDE)
            start = (largest.pow(alpha) / wide.pow(1 - alpha)).clamp(min=SMALLEST_SCALE)
            self.scales[key] = nn.Parameter(start)
            if shift and pair.shift:
                low, high = -_by_free(-reach.low, pair), _by_free(reach.high, pair)
                self.shifts[key] = nn.Parameter((low + high) / 2)

    def forward(self) -> dict[str, Tensor]:
        """Return the transformed parameters of the block by full name; gradients flow to scales and shifts."""
        self.keep_from_zero()
        changed = transform_all(self.pairs, dict(self.block.module.named_parameters()), *self._by_pair())
        return {f"{self.block.name}.{name}": value for name, value in changed.items()}

    @torch.no_grad()
    def keep_from_zero(self) -> None:
        """Keep the magnitude of every scale above the floor, its sign as it is."""
        for scale in self.scales.values():
            scale.copy_(scale.abs().clamp(min=SMALLEST_SCALE).copysign(scale))

    def fold(self) -> None:
        """Write the transforms into the block."""
        self.keep_from_zero()
        fold(self.pairs, self.block, *self._by_pair())

    def _by_pair(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        keys = {pair.name: pair.name.replace(".", "_") for pair in self.pairs}
        return (
            {name: self.scales[key] for name, key in keys.items() if key in self.scales},
            {name: self.shifts[key] for name, key in keys.items() if key in self.shifts},
        )


def _columns(weight: Tensor, pair: Pair) -> Tensor:
    """Return the largest magnitude in each input channel of a linear, (in,)."""
    return weight.detach().abs().amax(dim=1 if pair.transposed else 0)


def _by_free(values: Tensor, pair: Pair) -> Tensor:
    """Return (size,): the largest of the channels that share a scale."""
    if pair.of_target is None:
        return values
    return values.new_zeros(pair.size).scatter_reduce(0, pair.of_target, values, "amax", include_self=False)
