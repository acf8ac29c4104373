"""What can be learned about the quantization of one weight matrix: its clipping, its rounding, the weight itself."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from quantkit.core.affine import fake_quantize, group_bounds, quantize
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import QuantScheme

INITIAL_LOGIT = 4.0  # sigmoid(4) = 0.982014: almost the whole range, with a gradient


class WeightQuantizer(nn.Module):
    """The quantization of one weight matrix w as a function of what is learned.

        low = sigmoid(beta) min(w)    high = sigmoid(gamma) max(w)    q = clamp(round(w / h + v) + z)

    `gamma` and `beta`, (out, groups) float32 each, are OmniQuant's learnable weight clipping (arXiv 2308.13137, eq. 2).
    The offset `v`, (out, in) float32 in steps h, is there if `offset` is asked for: kept within half a step it decides
    between the two neighbouring levels (learned rounding: Nagel et al., arXiv 2004.10568; Cheng et al., arXiv
    2309.05516); without a limit it moves the weight anywhere (Chen et al., EfficientQAT, arXiv 2407.11062).

    The bounds of a weight that is itself being transformed are found again in every call, and carry gradients.
    """

    def __init__(
        self,
        weight: Float[Tensor, "out in"],
        scheme: QuantScheme,
        scale_dtype: torch.dtype,
        *,
        offset: bool = False,
        learn_zero: bool = False,
    ) -> None:
        super().__init__()
        self.scheme, self.scale_dtype, self.learn_zero = scheme, scale_dtype, learn_zero
        self.low, self.high = group_bounds(weight, scheme)
        self.gamma = nn.Parameter(torch.full_like(self.high, INITIAL_LOGIT))
        self.beta = nn.Parameter(torch.full_like(self.low, INITIAL_LOGIT))
        self.offset = nn.Parameter(torch.zeros_like(weight)) if offset else None

    def bounds(
        self, weight: Float[Tensor, "out in"]
    ) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
        """Return the clipped bounds (low, high)."""
        low, high = group_bounds(weight, self.scheme) if weight.requires_grad else (self.low, self.high)
        return low * self.beta.sigmoid(), high * self.gamma.sigmoid()

    def forward(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return the fake-quantized weight."""
        return fake_quantize(
            weight,
            *self.bounds(weight),
            self.scheme,
            offset=self.offset,
            scale_dtype=self.scale_dtype,
            learn_zero=self.learn_zero,
        )

    @torch.no_grad()
    def quantize(self, weight: Float[Tensor, "out in"]) -> QuantizedTensor:
        """Return the weight quantized with what was learned."""
        self.low, self.high = group_bounds(weight, self.scheme)
        return quantize(weight, *self.bounds(weight), self.scheme, self.scale_dtype, self.offset)

    @torch.no_grad()
    def latent(self, weight: Float[Tensor, "out in"], quantized: QuantizedTensor) -> Float[Tensor, "out in"] | None:
        """Return the codes of `quantized`, which `quantize` made, as they were before rounding; None without offset."""
        if self.offset is None:
            return None
        groups = (quantized.scale.shape[1], -1)
        steps = weight.unflatten(1, groups) / quantized.scale.float().unsqueeze(-1)
        steps += self.offset.unflatten(1, groups)
        if quantized.zero_point is not None:
            steps += quantized.zero_point.unsqueeze(-1)
        return steps.flatten(1)
