"""SparseGPT: weights are dropped column after column, and the columns that follow make up for each (arXiv 2301.00774).

Frantar and Alistarh, algorithm 1. With the factor H = (I + U) D (I + U)^T of `core/second_order.py`, the weights w of a
column j as they are when all before it are settled, and all after it free to make up for it, dropping one costs

    w^2 / (2 [H_jj..^-1]_jj) = w^2 D_j / 2

and the mask takes the cheapest: of every block of columns the share that is asked for, or of every M inputs of a row
all but N, in each case when the first column of the block or of the M is reached. A dropped weight is an error like any
other, of the whole weight, and so is what rounding does to a kept one if a grid is given: pruning and rounding at once.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from quantkit.core.masks import Sparsity, choose, keep_highest
from quantkit.core.second_order import Curvature, current

BLOCK = 128  # columns that compete with each other, as in the paper


@torch.no_grad()
def sparsegpt(
    weight: Float[Tensor, "rows columns"],
    curvature: Curvature,
    sparsity: Sparsity,
    *,
    transposed: bool = False,
    settle: Callable[[int, Tensor], Tensor] = lambda _, kept: kept,
    block: int = BLOCK,
) -> tuple[Bool[Tensor, "rows columns"], Float[Tensor, "rows columns"]]:
    """Return the mask, and the weight with what the kept weights of each column became; zero elsewhere.

    Args:
        weight: (out, in) float32.
        curvature: of the linear's inputs, in their own order.
        sparsity: how much goes; exactly so much of the whole weight.
        transposed: the weight is (in, out).
        settle: (column, its kept weights and zeros (out,)) → what is stored of them, such as their rounded values.
        block: columns that compete; N:M takes the next multiple of M.

    Raises:
        UsageError: N:M, and M does not divide the inputs.
    """
    assert curvature.order is None, "which columns follow each other decides about N:M"
    original = (weight if transposed else weight.T).contiguous()
    sparsity.check_width(len(original))
    moved, kept = original.clone(), torch.empty_like(original, dtype=torch.bool)
    values, feedback, group = torch.empty_like(original), curvature.feedback, sparsity.group
    block = -(-block // (group or 1)) * (group or 1)
    for start in range(0, len(original), block):
        here = slice(start, min(start + block, len(original)))
        errors = torch.zeros_like(original[here])
        for first in range(here.start, here.stop, group or block):
            span = slice(first, min(first + (group or block), here.stop))
            done = slice(0, span.start - here.start)
            moved[span] += feedback[here.start : span.start, span].T @ errors[done]
            now = current(original[span], moved[span], feedback[span, span])
            kept[span] = _keep(now.square() * curvature.pivots[span, None], sparsity, span)
            for column in range(span.start, span.stop):
                own = slice(span.start - here.start, column - here.start)
                moved[column] += feedback[span.start : column, column] @ errors[own]
                values[column] = settle(column, moved[column].masked_fill(~kept[column], 0))
                errors[column - here.start] = original[column] - values[column]
        moved[here.stop :].addmm_(feedback[here, here.stop :].T, errors)
    return (kept, values) if transposed else (kept.T.contiguous(), values.T.contiguous())


def _keep(scores: Float[Tensor, "columns out"], sparsity: Sparsity, span: slice) -> Bool[Tensor, "columns out"]:
    """Return the mask of some columns; the shares of all spans together are exactly that of the weight."""
    if sparsity.group is not None:
        return choose(scores.T.contiguous(), sparsity).T
    rows = scores.shape[1]
    dropped = sparsity.count(span.stop * rows) - sparsity.count(span.start * rows)
    return keep_highest(scores.flatten(), min(dropped, scores.numel())).view_as(scores)
