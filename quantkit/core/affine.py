"""Uniform affine quantization of a weight matrix between given bounds (OmniQuant, arXiv 2308.13137, eq. 2).

With bounds `low <= 0 <= high` of a group and N bits,

    h = (high - low) / (2^N - 1)        z = round(-low / h)        q = clamp(round(w / h) + z, 0, 2^N - 1)

and the weight becomes (q - z) h. Codes and zero points are stored minus 2^(N-1), which makes both fit a signed byte
and leaves (q - z) alone. Symmetric: h = max(|low|, |high|) / (2^(N-1) - 1), no z.

One deviation from the paper: the bounds of a group always include zero. The packed formats store the zero point in N
bits, so a zero outside the grid, which the paper's formula gives where all weights of a group share one sign, could be
calibrated but not written.
"""

from typing import Any, cast

import torch
from jaxtyping import Float, Num
from torch import Tensor

from quantkit.core.extremes import extremes
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import QuantScheme

SMALLEST_STEP, LARGEST_STEP = (
    1e-5,
    1e4,
)  # the paper's clamp of h; both ends are finite and non-zero in float16


class _RoundToGrid(torch.autograd.Function):
    """(clamp(round(w / h + v) + z) - z) h with a straight-through gradient (Bengio et al., arXiv 1308.3432).

    Saves its inputs alone and computes the rest again in backward, so a training step holds no copy of the weight for
    each of the formula's steps. Inside the grid d/dw = 1, d/dv = h, d/dh = (q - z) - w / h and d/dz = 0; outside
    0, 0, q - z and -h. The offset v is optional.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        weight: Tensor,
        step: Tensor,
        zero: Tensor,
        offset: Tensor | None,
        scheme: QuantScheme,
    ) -> Tensor:
        ctx.save_for_backward(weight, step, zero, offset)
        ctx.scheme = scheme
        steps = weight / step
        if offset is not None:
            steps += offset
        codes = steps.round_().add_(zero).clamp_(scheme.smallest_code, scheme.largest_code)
        return codes.sub_(zero).mul_(step)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        (grad,) = grads
        weight, step, zero, offset = ctx.saved_tensors
        by_weight, _, by_zero, by_offset, _ = ctx.needs_input_grad
        ratio = weight / step
        unclamped = (ratio if offset is None else ratio + offset).round().add_(zero)  # `ratio` is needed again
        codes = unclamped.clamp(ctx.scheme.smallest_code, ctx.scheme.largest_code)
        inside = unclamped.eq_(codes)  # as numbers
        grad_weight = grad * inside if by_weight or by_offset else None
        grad_offset = grad_weight * step if by_offset and grad_weight is not None else None
        grad_zero = (grad * step).mul_(inside - 1).sum(dim=-1, keepdim=True) if by_zero else None
        slope = codes.sub_(zero).sub_(ratio.mul_(inside))
        grad_step = slope.mul_(grad).sum(dim=-1, keepdim=True)
        return grad_weight if by_weight else None, grad_step, grad_zero, grad_offset, None


def group_bounds(
    weight: Float[Tensor, "out in"], scheme: QuantScheme
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """Return the smallest and largest weight of each group, widened to include zero."""
    grouped = weight.unflatten(1, (scheme.groups(weight.shape[1]), -1))
    low, high = extremes(grouped)
    return low.clamp(max=0), high.clamp(min=0)


def step_size(
    low: Float[Tensor, "out groups"], high: Float[Tensor, "out groups"], scheme: QuantScheme
) -> Float[Tensor, "out groups"]:
    """Return h, the distance of two neighbouring levels."""
    step = torch.maximum(-low, high) / scheme.largest_code if scheme.symmetric else (high - low) / scheme.levels
    return step.clamp(SMALLEST_STEP, LARGEST_STEP)


def zero_code(
    low: Float[Tensor, "out groups"], step: Float[Tensor, "out groups"], scheme: QuantScheme
) -> Float[Tensor, "out groups"]:
    """Return the code that stands for zero, signed and without a gradient (the paper's z is rounded, not trained)."""
    if scheme.symmetric:
        return torch.zeros_like(step)
    return ((-low / step).detach().round() + scheme.smallest_code).clamp(scheme.smallest_code, scheme.largest_code)


def stored(step: Float[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """Return values rounded to the dtype in which they are stored, with the gradient passed straight through."""
    return step + (step.to(dtype).to(step.dtype) - step).detach()


def stored_grid(
    low: Float[Tensor, "out groups"],
    high: Float[Tensor, "out groups"],
    scheme: QuantScheme,
    scale_dtype: torch.dtype,
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """Return the scale as it is stored, its value in the dtype of the bounds, and the code that stands for zero."""
    scale = step_size(low, high, scheme).to(scale_dtype)
    step = scale.to(low.dtype)
    return scale, step, zero_code(low, step, scheme)


def fake_quantize(  # noqa: PLR0913  the equation has that many symbols
    weight: Float[Tensor, "out in"],
    low: Float[Tensor, "out groups"],
    high: Float[Tensor, "out groups"],
    scheme: QuantScheme,
    *,
    offset: Float[Tensor, "out in"] | None = None,
    scale_dtype: torch.dtype | None = None,
    learn_zero: bool = False,
) -> Float[Tensor, "out in"]:
    """Return the quantized weight as a differentiable function of the weight, its bounds and the offset.

    The rounding passes gradients straight through, the clamp stops them outside the grid, and h gets its gradient both
    from w / h and from the final product. In the paper z is a constant.

    Args:
        weight: what is quantized.
        low: lower bound of each group.
        high: upper bound of each group.
        scheme: the grid.
        offset: added to w / h before rounding, in steps; None: nothing.
        scale_dtype: h is rounded to it first, as it will be when it is stored; None: h stays as it is.
        learn_zero: pass the gradient straight through the rounding of z too.
    """
    step = step_size(low, high, scheme)
    step = step if scale_dtype is None else stored(step, scale_dtype)
    zero = zero_code(low, step, scheme)
    if learn_zero and not scheme.symmetric:
        exact = -low / step
        zero = zero + exact - exact.detach()
    groups = (low.shape[1], -1)
    shift = None if offset is None else offset.unflatten(1, groups)
    arguments = (weight.unflatten(1, groups), step.unsqueeze(-1), zero.unsqueeze(-1), shift, scheme)
    return cast(Tensor, _RoundToGrid.apply(*arguments)).flatten(1)  # type: ignore[no-untyped-call]


@torch.no_grad()
def quantize(
    weight: Float[Tensor, "out in"],
    low: Float[Tensor, "out groups"],
    high: Float[Tensor, "out groups"],
    scheme: QuantScheme,
    scale_dtype: torch.dtype,
    offset: Float[Tensor, "out in"] | None = None,
) -> QuantizedTensor:
    """Return the codes of `weight` between the bounds, for scales already rounded to `scale_dtype`.

    `offset` is added to w / h before rounding, in steps.

    Rounding the scale first and the codes second means that what is stored is the best code for the scale that is
    stored, and that nothing is rounded again at export.
    """
    scale, step, zero = stored_grid(low, high, scheme, scale_dtype)
    grouped = weight.unflatten(1, (low.shape[1], -1))
    steps = grouped / step.unsqueeze(-1)
    if offset is not None:
        steps += offset.unflatten(1, (low.shape[1], -1))
    codes = steps.round() + zero.unsqueeze(-1)
    return QuantizedTensor(
        codes=to_int8(codes.flatten(1).clamp(scheme.smallest_code, scheme.largest_code)),
        scale=scale,
        zero_point=None if scheme.symmetric else to_int8(zero),
        scheme=scheme,
    )


def round_to_nearest(weight: Float[Tensor, "out in"], scheme: QuantScheme, scale_dtype: torch.dtype) -> QuantizedTensor:
    """Return `weight` quantized between each group's smallest and largest weight (RTN)."""
    return quantize(weight, *group_bounds(weight, scheme), scheme, scale_dtype)


def to_int8(codes: Num[Tensor, "out any"]) -> Tensor:
    """Return codes that are whole numbers as they are stored."""
    return codes.to(torch.int8)
