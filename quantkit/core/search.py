"""Bounds of a group found by trial: the shrunken range whose grid fits the group's weights best.

The smallest and largest weight of a group are not the best bounds at few bits: a narrower grid clips the outermost
weights and places all others more finely. Frantar et al. (GPTQ, arXiv 2210.17323; the option `mse` of their code) try a
row of shares p <= 1 and keep, for every group, the one with the smallest sum of |w - Q(w; p low, p high)|^2.4.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from quantkit.core.affine import fake_quantize, group_bounds
from quantkit.core.scheme import QuantScheme

EXPONENT = 2.4  # theirs: between the squared error and one that clips outliers less
SMALLEST_SHARE, TRIALS = 0.5, 26  # shares 1, 0.98, ... 0.5


@torch.no_grad()
def searched_bounds(
    weight: Float[Tensor, "out in"],
    scheme: QuantScheme,
    importance: Float[Tensor, "#out in"] | None = None,
    *,
    scale_dtype: torch.dtype | None = None,
    exponent: float = EXPONENT,
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """Return the bounds of each group, a common share of its smallest and largest weight; they include zero.

    Args:
        weight: what is to be quantized.
        scheme: the grid.
        importance: how much the error of each weight counts, or of each column if there is one row; None: all alike.
        scale_dtype: dtype in which scales will be stored; None: scales stay as they are.
        exponent: power of the error's magnitude that is summed.
    """
    low, high = group_bounds(weight, scheme)
    best, share = torch.full_like(low, torch.inf), torch.ones_like(low)
    for trial in torch.linspace(1, SMALLEST_SHARE, TRIALS).tolist():
        error = (fake_quantize(weight, trial * low, trial * high, scheme, scale_dtype=scale_dtype) - weight).abs_()
        error = error.square_() if exponent == 2 else error.pow_(exponent)
        if importance is not None:
            error *= importance
        total = error.unflatten(1, (low.shape[1], -1)).sum(dim=-1)
        better = total < best
        best, share = torch.where(better, total, best), share.masked_fill(better, trial)
    return share * low, share * high
