"""Masks: which weights of a matrix stay. Every pruner chooses one from scores, with the functions below.

A mask is a bool tensor of its weight's shape, True where the weight stays. How many weights go is a `Sparsity`: a share
of them, compared within a matrix, within each row, or over several matrices; or N:M, by which N of every M consecutive
inputs of a row stay (Zhou et al., arXiv 2102.04010). Counts are exact. Of equal scores the earlier ones go, in the
order of the tensor's elements, so that the same scores give the same mask everywhere.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from quantkit.errors import UsageError

Scope = Literal["matrix", "row", "global"]
SCOPES: tuple[Scope, ...] = ("matrix", "row", "global")

_PATTERN = re.compile(r"(\d+):(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sparsity:
    """How much of a weight goes.

    Attributes:
        share: share of the weights that become zero, 0 <= share < 1.
        kept: N of N:M, how many of every `group` consecutive inputs stay; None: `share` says it all.
        group: M of N:M.
    """

    share: float
    kept: int | None = None
    group: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:  # nan too
            raise UsageError(
                f"sparsity is the share of weights that become zero, from 0 to below 1, not {self.share:g}; give 0.5"
            )

    @classmethod
    def parse(cls, text: str | float) -> "Sparsity":
        """Return the sparsity that `text` names: `0.5`, or `2:4`, by which 2 of every 4 inputs stay.

        Raises:
            UsageError: it names none.
        """
        match = _PATTERN.fullmatch(str(text).strip())
        if match:
            kept, group = int(match[1]), int(match[2])
            if not 0 < kept < group:
                raise UsageError(
                    f"sparsity {text} keeps {kept} of every {group} inputs; N of N:M must be at least 1 and below M, "
                    "as in 2:4"
                )
            return cls(share=1 - kept / group, kept=kept, group=group)
        try:
            share = float(text)
        except ValueError:
            raise UsageError(f"{text!r} is no sparsity; give a share such as 0.5, or N:M such as 2:4") from None
        return cls(share=share)

    def __str__(self) -> str:
        return f"{self.share:g}" if self.group is None else f"{self.kept}:{self.group}"

    def count(self, size: int) -> int:
        """Return how many of `size` weights go: the share of them, rounded to the nearest number."""
        return round(self.share * size)

    def check_width(self, width: int) -> None:
        """Refuse a row of `width` inputs that M does not divide.

        Raises:
            UsageError: it does not.
        """
        if self.group is not None and width % self.group:
            raise UsageError(
                f"{self} needs rows of a multiple of {self.group} inputs, not {width}; exclude it, or give a share"
            )


def keep_highest(scores: Float[Tensor, "*rows width"], dropped: int) -> Bool[Tensor, "*rows width"]:
    """Return the mask that drops the `dropped` lowest scores of each row; of equal ones the first.

    Raises:
        ValueError: a score is not a number, or more are to be dropped than there are.
    """
    if not 0 <= dropped <= scores.shape[-1]:
        raise ValueError(f"{dropped} of {scores.shape[-1]} scores cannot be dropped")
    if scores.isnan().any():
        raise ValueError("scores must be numbers")
    if not dropped:
        return torch.ones_like(scores, dtype=torch.bool)
    limit = scores.kthvalue(dropped, dim=-1, keepdim=True).values
    below, equal = scores < limit, scores == limit
    missing = dropped - below.sum(dim=-1, keepdim=True)
    return ~(below | (equal & (equal.cumsum(dim=-1) <= missing)))


def choose(
    scores: Float[Tensor, "out in"], sparsity: Sparsity, scope: Literal["matrix", "row"] = "matrix"
) -> Bool[Tensor, "out in"]:
    """Return the mask of one matrix; `scope` says within what a share is compared.

    Raises:
        UsageError: N:M, and M does not divide the width.
        ValueError: a score is not a number.
    """
    if sparsity.kept is not None and sparsity.group is not None:
        sparsity.check_width(scores.shape[1])
        grouped = scores.unflatten(1, (-1, sparsity.group))
        return keep_highest(grouped, sparsity.group - sparsity.kept).flatten(1)
    if scope == "row":
        return keep_highest(scores, sparsity.count(scores.shape[1]))
    return keep_highest(scores.flatten(), sparsity.count(scores.numel())).view_as(scores)


def choose_globally(scores: Mapping[str, Tensor], sparsity: Sparsity) -> dict[str, Tensor]:
    """Return the masks of several weights of any shapes, by name, their scores compared with each other.

    With N:M there is nothing to compare beyond a group, and each matrix gets its own mask.

    Raises:
        UsageError: N:M, and M does not divide a width.
        ValueError: a score is not a number.
    """
    if sparsity.group is not None:
        return {name: choose(score.flatten(1), sparsity).view_as(score) for name, score in scores.items()}
    flat = torch.cat([score.flatten() for score in scores.values()])
    parts = keep_highest(flat, sparsity.count(len(flat))).split([score.numel() for score in scores.values()])
    return {name: part.view_as(score) for (name, score), part in zip(scores.items(), parts, strict=True)}


def apply(weight: Tensor, mask: Tensor) -> Tensor:
    """Return `weight` with zeros where the mask is False; a gradient reaches what stays alone.

    Raises:
        UsageError: the mask has another shape, or is not bool.
    """
    if mask.shape != weight.shape or mask.dtype != torch.bool:
        kind = str(mask.dtype).removeprefix("torch.")
        raise UsageError(
            f"a mask must be bool and of its weight's shape {tuple(weight.shape)}, not {kind} {tuple(mask.shape)}"
        )
    return weight.masked_fill(~mask, 0)


def sparsity_of(masks: Mapping[str, Tensor]) -> float:
    """Return the share of weights that the masks drop, over all of them; 0 of none."""
    total = sum(mask.numel() for mask in masks.values())
    return 1 - sum(int(mask.sum()) for mask in masks.values()) / total if total else 0.0
