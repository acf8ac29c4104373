"""How much a single example may add to a gradient: four clipping functions, over all tensors or over groups of them.

With the norm ||g|| of an example's gradient and the bound R, an example's gradient is multiplied by

    abadi    min(1, R / (||g|| + 1e-6))     Abadi et al. 2016
    global   1 if ||g|| <= R, otherwise 0
    auto-v   R / ||g||                      Bu et al., "Automatic Clipping", arXiv 2206.07136
    auto-s   R / (||g|| + gamma)            the same; no example vanishes, none counts for more than R

so none counts for more than R. Where groups of tensors are clipped apart, each of G groups has the bound R / sqrt(G):
all groups of an example together still have a norm of R at most.

Gradients are a mapping of names to tensors (examples, ...). An example whose gradient is not finite counts as zero:
anything else would say that it was there.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from quantkit.errors import UsageError, nearest

Function = Literal["abadi", "global", "auto-v", "auto-s"]
Style = Literal["flat", "layer-wise", "group-wise"]
GAMMA = 0.01  # of the paper


def check(function: str, style: str, *, bound: float, gamma: float) -> None:
    """Refuse what cannot be clipped with.

    Raises:
        UsageError: an unknown function or style, or a bound or gamma that is not above 0.
    """
    if function not in get_args(Function):
        raise UsageError(f"unknown clipping {function!r}{nearest(function, get_args(Function))}")
    if style not in get_args(Style):
        raise UsageError(f"unknown clipping style {style!r}{nearest(style, get_args(Style))}")
    for name, value in (("clipping bound", bound), ("gamma", gamma)):
        if not 0 < value < math.inf:
            raise UsageError(f"{name} is {value:g}; use a finite number above 0")


def partition(names: Sequence[str], style: Style) -> list[list[str]]:
    """Return the groups of tensors that are clipped together: all; those of one module; or those of one decoder block.

    Tensors outside the blocks are one group of their own.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_group(name, style), []).append(name)
    return list(groups.values())


def _group(name: str, style: Style) -> str:
    if style == "flat":
        return ""
    if style == "layer-wise":
        return name.rpartition(".")[0] or name
    block = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return block.group(1) if block else ""


def norms(gradients: Mapping[str, Tensor], names: Sequence[str]) -> Float[Tensor, " examples"]:
    """Return the norm of each example's gradient over some tensors, float64."""
    squares = [gradients[name].flatten(1).to(torch.float64).square().sum(1) for name in names]
    return torch.stack(squares).sum(0).sqrt()


def factors(
    norm: Float[Tensor, " examples"], bound: float, function: Function, gamma: float = GAMMA
) -> Float[Tensor, " examples"]:
    """Return what each example's gradient is multiplied by; 0 where its norm is not finite."""
    made = {
        "abadi": lambda: (bound / (norm + 1e-6)).clamp(max=1),
        "global": lambda: (norm <= bound).to(norm.dtype),
        "auto-v": lambda: torch.where(norm > 0, bound / norm, 0.0),
        "auto-s": lambda: bound / (norm + gamma),
    }[function]()
    return torch.where(norm.isfinite(), made, 0.0)


def clipped_sum(
    gradients: Mapping[str, Tensor], groups: Sequence[Sequence[str]], *, bound: float, function: Function, gamma: float
) -> dict[str, Tensor]:
    """Return the sum over examples of their clipped gradients, float64, by name; adding one changes it by `bound`.

    Args:
        gradients: by name, (examples, ...).
        groups: names that are clipped together; every name is in one of them.
        bound: R, of all groups together.
        function: the clipping function.
        gamma: of `auto-s`.
    """
    total: dict[str, Tensor] = {}
    for names in groups:
        factor = factors(norms(gradients, names), bound / math.sqrt(len(groups)), function, gamma)
        total |= {name: weighted(factor, gradients[name]) for name in names}
    return total


def weighted(factor: Float[Tensor, " examples"], gradient: Tensor) -> Tensor:
    """Return the sum over examples of factor times gradient, float64; a factor of 0 leaves out what is not finite."""
    rows = gradient.flatten(1).to(torch.float64)
    rows = rows.masked_fill(factor.eq(0).unsqueeze(1), 0.0)
    return (factor.to(torch.float64) @ rows).view(gradient.shape[1:])
