"""GPTQ: columns are rounded one after the other, and each one's error is made up for by the columns that follow.

Frantar et al., arXiv 2210.17323. With H = (2 / tokens) sum x x^T over a linear's inputs, rounding column i of W to Q_i
costs least if every later column j moves by -(w_i - Q_i) [H^-1]_ij / [H^-1]_ii, where H^-1 is that of the columns not
rounded yet (eq. 2 and 3). The paper takes all these rows from one Cholesky factor of H^-1. Here H is not even inverted:
with H = (I + U) D (I + U)^T, U strictly upper, the same sequence of updates is

    moved_j = W_j + sum over i < j of (W_i - Q_i) U_ij        Q_j = round(moved_j)

(Chee et al., QuIP, arXiv 2307.13304, theorem 6), where the errors are those against the original weight.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from quantkit.core.affine import group_bounds, stored_grid, to_int8
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import QuantScheme

Bounds = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Curvature:
    """What the inputs of a linear say about its columns, ready for `gptq`; linears with one input share it.

    Attributes:
        order: the columns in the order in which they are rounded; None: from the first to the last.
        feedback: U above, float32: row i tells what the error of the i-th column to be rounded adds to those after it.
        pivots: the diagonal of D above, float32, in the same order: what an error of a column costs if all after it
            make up for it; 0 for an input that was always zero.
        damp: what was added to the diagonal of H, as a share of its mean.
    """

    order: Int64[Tensor, " in"] | None
    feedback: Float[Tensor, "in in"]
    pivots: Float[Tensor, " in"]
    damp: float

    @classmethod
    @torch.no_grad()
    def of(cls, hessian: Float[Tensor, "in in"], *, damp: float = 0.01, act_order: bool = True) -> "Curvature":
        """Factor a Hessian, in float64.

        An input that was always zero says nothing about its column. Such a column gets the mean of the diagonal and, as
        the rest of its row is zero, is rounded to nearest and moves no other.

        Args:
            hessian: H, finite, symmetric, positive semidefinite but for rounding.
            damp: share of the mean of the diagonal to add to it; ten times as much for as long as H has no factor.
            act_order: begin with the columns of the largest diagonal, while all others can still make up for them.
        """
        diagonal = hessian.diagonal()
        mean = float(diagonal.mean()) or 1.0
        order = diagonal.argsort(descending=True, stable=True) if act_order else None
        matrix = (hessian if order is None else hessian[order][:, order]).to(torch.float64, copy=True)
        dead = matrix.diagonal() == 0
        matrix.diagonal()[dead] = mean
        # seen from its other end a lower factor is an upper one, so Cholesky's of the reversed matrix is what is wanted
        matrix = matrix.flip(0, 1)
        factor, damp = _lower_factor(matrix, mean, damp)
        del matrix  # the largest tensors of a run, for wide linears
        upper = factor.flip(0, 1)
        del factor
        roots = upper.diagonal().clone()
        upper /= roots
        pivots = roots.square().masked_fill(dead, 0).float()
        return cls(order=order, feedback=upper.triu_(diagonal=1).float(), pivots=pivots, damp=damp)


def _lower_factor(matrix: Tensor, mean: float, damp: float) -> tuple[Tensor, float]:
    """Return the Cholesky factor of `matrix` + `damp` * `mean` on the diagonal, and the damp with which it has one.

    The diagonal of `matrix` is changed.
    """
    diagonal = matrix.diagonal().clone()
    while True:
        matrix.diagonal().copy_(diagonal + damp * mean)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            return factor, damp
        damp = max(10 * damp, 1e-6)


@torch.no_grad()
def gptq(  # noqa: PLR0913  the problem, the grid, and how columns are taken
    weight: Float[Tensor, "rows columns"],
    curvature: Curvature,
    scheme: QuantScheme,
    scale_dtype: torch.dtype,
    *,
    bounds: Bounds | None = None,
    find: Callable[[Tensor, QuantScheme], Bounds] = group_bounds,
    transposed: bool = False,
    mask: Bool[Tensor, "rows columns"] | None = None,
    block: int = 128,
) -> tuple[QuantizedTensor, Float[Tensor, "rows columns"]]:
    """Return the quantized weight, and the weight that each column had when it was rounded.

    That moved weight, rounded to nearest on the grid returned, gives the codes returned. If the columns have an order,
    the grid is that of the original weight, so that the columns of a group share it although their turns are far apart;
    otherwise a group's grid is found when its turn comes, for the weights that it has then.

    Args:
        weight: (out, in) float32.
        curvature: of the linear's inputs.
        scheme: the grid.
        scale_dtype: dtype in which scales are stored.
        bounds: low and high of each group, each (rows, groups), for a grid that is known; None: `find` finds them.
        find: what bounds a weight, or one group of its columns, should have.
        transposed: the weight is (in, out); its groups run along the last axis all the same.
        mask: where it is False a weight becomes exactly zero, whatever the others moved it to; None: nowhere.
        block: columns between two updates of all columns that are still to come.
    """
    columns = weight if transposed else weight.T
    kept = mask if mask is None or transposed else mask.T
    order = torch.arange(len(columns), device=weight.device) if curvature.order is None else curvature.order
    original = columns[order]
    gone = torch.zeros_like(original, dtype=torch.bool) if kept is None else ~kept[order]
    moved, codes, grids = original.clone(), torch.empty_like(original), []
    if bounds is None and curvature.order is None and not transposed:
        spans = _on_arrival(original, moved, gone, curvature.feedback, scheme, find)
    else:
        spans = iter([(slice(0, len(moved)), bounds or find(weight, scheme))])
    for span, (low, high) in spans:
        scale, step, zero = stored_grid(low, high, scheme, scale_dtype)
        grids.append((scale, zero))
        if transposed:  # a column of W is a row here, and crosses all groups
            step, zero = (values.repeat_interleave(weight.shape[1] // low.shape[1], dim=1) for values in (step, zero))
            row = order
        else:
            step, zero = step.T.contiguous(), zero.T.contiguous()
            row = (order[span] - span.start) // ((span.stop - span.start) // low.shape[1])
        for here, rows in zip(_parts(span, block), row.split(block), strict=True):
            feedback = curvature.feedback[here, here].T.contiguous()
            grid = _Grid(step=step[rows], zero=zero[rows], scheme=scheme, dtype=scale_dtype)
            errors = _round_columns(original[here], moved[here], codes[here], gone[here], feedback, grid)
            moved[here.stop :].addmm_(curvature.feedback[here, here.stop :].T, errors)
    back = order.argsort()
    codes, moved = (found[back] if transposed else found[back].T.contiguous() for found in (codes, moved))
    scale, zero = (torch.cat(parts, dim=1) for parts in zip(*grids, strict=True))
    zero_point = None if scheme.symmetric else to_int8(zero)
    return QuantizedTensor(codes=to_int8(codes), scale=scale, zero_point=zero_point, scheme=scheme), moved


@dataclass(frozen=True, kw_only=True, slots=True)
class _Grid:
    """Step and zero of each weight of some columns, (columns, out) each."""

    step: Tensor
    zero: Tensor
    scheme: QuantScheme
    dtype: torch.dtype


def _on_arrival(
    original: Float[Tensor, "in out"],
    moved: Float[Tensor, "in out"],
    gone: Bool[Tensor, "in out"],
    feedback: Float[Tensor, "in in"],
    scheme: QuantScheme,
    find: Callable[[Tensor, QuantScheme], Bounds],
) -> Iterator[tuple[slice, Bounds]]:
    """Yield the columns of each group and their bounds, found at the moment the group is asked for.

    Weights that a mask took are zero then, and take no part in the bounds.
    """
    size, channel = scheme.group_size or len(moved), replace(scheme, group_size=None)
    for start in range(0, len(moved), size):
        span = slice(start, start + size)
        now = current(original[span], moved[span], feedback[span, span]).masked_fill_(gone[span], 0)
        yield span, find(now.T.contiguous(), channel)


def current(
    original: Float[Tensor, "columns out"],
    moved: Float[Tensor, "columns out"],
    feedback: Float[Tensor, "columns columns"],
) -> Float[Tensor, "columns out"]:
    """Return the weights of the next columns G as the paper has them before the first of them is settled.

    Until a column's turn comes `moved` lacks what the columns just before it will add. The paper's weights at this
    moment, which are best if no other column is ever rounded, are W_G + (moved_G - W_G) (I + U_GG)^-1: they are
    W_G + E H_EG (H_GG)^-1 with the errors E so far, for all G that are left, in terms of the factor.
    """
    change: Tensor = moved - original
    now: Tensor = original + torch.linalg.solve_triangular(feedback.T, change, upper=False, unitriangular=True)
    return now


def _parts(span: slice, size: int) -> list[slice]:
    return [slice(first, min(first + size, span.stop)) for first in range(span.start, span.stop, size)]


def _round_columns(
    original: Float[Tensor, "columns out"],
    moved: Float[Tensor, "columns out"],
    codes: Float[Tensor, "columns out"],
    gone: Bool[Tensor, "columns out"],
    feedback: Float[Tensor, "columns columns"],
    grid: _Grid,
) -> Float[Tensor, "columns out"]:
    """Round the columns in turn, fill `moved` and `codes`, and return the errors against the original weight.

    `feedback` is lower triangular: its row i says how much of each earlier error column i takes over.
    """
    errors, scheme = torch.empty_like(original), grid.scheme
    for i, (step, zero) in enumerate(zip(grid.step, grid.zero, strict=True)):
        moved[i] += feedback[i, :i] @ errors[:i]
        moved[i].masked_fill_(gone[i], 0)
        code = (moved[i] / step).round_().add_(zero).clamp_(scheme.smallest_code, scheme.largest_code)
        codes[i] = code
        # what is stored: a product rounded to the scale's dtype
        errors[i] = original[i] - code.sub_(zero).mul_(step).to(grid.dtype)
    return errors
