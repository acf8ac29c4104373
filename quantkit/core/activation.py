"""Dynamic quantization of activations, one range per token (OmniQuant, arXiv 2308.13137, section 4.1).

With the smallest and largest value of a token's last dimension and N bits,

    h = (max - min) / (2^N - 1)        z = round(-min / h)        q = clamp(round(x / h) + z, 0, 2^N - 1)

and x becomes (q - z) h. Nothing is stored, so nothing ties z to N bits: a token whose values share one sign keeps its
whole range, as in the paper. Symmetric: h = max |x| / (2^(N-1) - 1), q in [-2^(N-1), 2^(N-1) - 1], no z.
"""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from quantkit.core.affine import LARGEST_STEP, SMALLEST_STEP
from quantkit.core.extremes import equal, spread

LARGEST_ZERO = 1e4  # the official code's clamp of -min / h before it is rounded


def fake_quantize_tokens(
    values: Float[Tensor, "*tokens width"], bits: int, *, symmetric: bool
) -> Float[Tensor, "*tokens width"]:
    """Return `values` as `bits` bits hold them, one range per token, in their own dtype.

    Differentiable: rounding passes gradients straight through, the clamp stops them outside the grid, z is a constant,
    and h hands its gradient to the smallest and the largest value. Half precision is computed in float32.
    """
    return cast(Tensor, _RoundTokens.apply(values, bits, symmetric))  # type: ignore[no-untyped-call]


class _RoundTokens(torch.autograd.Function):
    """(clamp(round(x / h) + z) - z) h with h and z of the token itself; saves x alone and computes the rest again.

    What produced x usually keeps it anyway, so a training step holds nothing for the formula's steps. By the product,
    d/dx = m and d/dh = (q - z) - m x / h, where m is 1 inside the grid and 0 outside; h then spreads over the token's
    extremes, evenly where several values share one, as `amax` does.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, bits: int, symmetric: bool) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(values)
        ctx.bits, ctx.symmetric = bits, symmetric
        exact = _at_least_float32(values)
        low, high = exact.amin(dim=-1, keepdim=True), exact.amax(dim=-1, keepdim=True)
        step = _range(low, high, bits, symmetric=symmetric).clamp(SMALLEST_STEP, LARGEST_STEP)
        smallest, largest, zero = _grid(low, step, bits, symmetric=symmetric)
        codes = (exact / step).round_().add_(zero).clamp_(smallest, largest)
        return codes.sub_(zero).mul_(step).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        (values,) = ctx.saved_tensors
        exact, grad = _at_least_float32(values), _at_least_float32(grads[0])
        low, high = exact.amin(dim=-1, keepdim=True), exact.amax(dim=-1, keepdim=True)
        unclamped_step = _range(low, high, ctx.bits, symmetric=ctx.symmetric)
        step = unclamped_step.clamp(SMALLEST_STEP, LARGEST_STEP)
        smallest, largest, zero = _grid(low, step, ctx.bits, symmetric=ctx.symmetric)
        ratio = exact / step
        unclamped = ratio.round().add_(zero)
        codes = unclamped.clamp(smallest, largest)
        inside = unclamped.eq_(codes)  # as numbers
        slope = codes.sub_(zero).sub_(ratio.mul_(inside))
        by_range = slope.mul_(grad).sum(dim=-1, keepdim=True)
        by_range *= step == unclamped_step
        result = grad * inside
        if ctx.symmetric:
            by_range /= (1 << (ctx.bits - 1)) - 1
            spread(result, equal(exact.abs(), torch.maximum(-low, high)).mul_(exact.sign()), by_range)
        else:
            by_range /= (1 << ctx.bits) - 1
            spread(result, equal(exact, high), by_range)
            spread(result, equal(exact, low), -by_range)
        return result.to(values.dtype), None, None


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _range(low: Tensor, high: Tensor, bits: int, *, symmetric: bool) -> Tensor:
    """Return h before it is clamped."""
    return torch.maximum(-low, high) / ((1 << (bits - 1)) - 1) if symmetric else (high - low) / ((1 << bits) - 1)


def _grid(low: Tensor, step: Tensor, bits: int, *, symmetric: bool) -> tuple[int, int, Tensor]:
    """Return the smallest and the largest code, and z."""
    half = 1 << (bits - 1)
    if symmetric:
        return -half, half - 1, torch.zeros_like(step)
    return 0, 2 * half - 1, (-low / step).clamp_(-LARGEST_ZERO, LARGEST_ZERO).round_()
