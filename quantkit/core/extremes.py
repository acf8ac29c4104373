"""Smallest and largest values along the last dimension, and how a gradient returns to them.

On a CPU PyTorch's `aminmax` along a dimension and products with booleans are not vectorised; `amin`, `amax` and
comparisons that write numbers are, and take a tenth of the time. They are most of what a learned transform costs.
"""

from typing import Any, cast

import torch
from torch import Tensor


def extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value of each (..., width) → (...); equal ones share the gradient."""
    return cast(tuple[Tensor, Tensor], _Extremes.apply(values))  # type: ignore[no-untyped-call]


def equal(values: Tensor, others: Tensor) -> Tensor:
    """Return 1 where the two are equal and 0 elsewhere, in the shape and dtype of `values`; no gradient."""
    return torch.eq(values, others, out=torch.empty_like(values))


def spread(result: Tensor, where: Tensor, amount: Tensor) -> None:
    """Add `amount`, (..., 1), to `result`, (..., width), in equal shares to the places of `where`: 1 and 0, or -1."""
    result.addcmul_(where, amount / where.abs().sum(dim=-1, keepdim=True).clamp_(min=1))


class _Extremes(torch.autograd.Function):
    """Saves the values, which are there anyway, and the results; the places are found again in backward."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        low, high = values.amin(dim=-1), values.amax(dim=-1)
        ctx.save_for_backward(values, low, high)
        return low, high

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # noqa: ANN401
        values, low, high = ctx.saved_tensors
        result = torch.zeros_like(values)
        for extreme, grad in zip((low, high), grads, strict=True):
            spread(result, equal(values, extreme.unsqueeze(-1)), grad.unsqueeze(-1))
        return result
