"""Bounds on activations: what leaves one is finite, and no larger than a threshold, whatever a flipped bit made of it.

A threshold τ is one number, or one for each neuron. Three forms:

    clamp   min(max(x, -τ), τ)        saturates (Ranger, Chen et al., arXiv 2003.13874)
    zero    x where |x| <= τ, else 0  drops (FT-ClipAct, Hoang et al., arXiv 1912.00941)
    smooth  x σ(κ(τ - |x|))           `zero` with a slope, so that τ can be trained (HyReLU of ProAct, Mousavi et al.,
                                      arXiv 2406.06313, and FitAct, Ghavami et al., arXiv 2112.13544; κ = 20 there)

NaN and infinities become 0 in each of them: the papers' own forms let them pass, and flipped exponents make them.
An activation that is bounded below by itself (ReLU, SiLU, GELU) needs the upper bound alone: there |x| is x.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from quantkit.errors import UsageError, nearest

Form = Literal["clamp", "zero", "smooth"]
FORMS: tuple[str, ...] = get_args(Form)
SHARPNESS = 20.0


def clamp(x: Tensor, threshold: Tensor, *, two_sided: bool = True) -> Tensor:
    """Return x (…, neurons) saturated at `threshold`, () or (neurons,), which gets a gradient where it binds."""
    return _finite(x).clamp(min=-threshold if two_sided else None, max=threshold)


def to_zero(x: Tensor, threshold: Tensor, *, two_sided: bool = True) -> Tensor:
    """Return x (…, neurons), 0 where it exceeds `threshold`, () or (neurons,), which gets no gradient."""
    x = _finite(x)
    return x.where((x.abs() if two_sided else x) <= threshold, 0.0)


def smooth(x: Tensor, threshold: Tensor, *, two_sided: bool = True, sharpness: float | Tensor = SHARPNESS) -> Tensor:
    """Return x (…, neurons) times a gate that closes around `threshold`, () or (neurons,); half of x passes there."""
    x = _finite(x)
    return x * torch.sigmoid(sharpness * (threshold - (x.abs() if two_sided else x)))


def _finite(x: Tensor) -> Tensor:
    return x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


_APPLIED: dict[str, Callable[..., Tensor]] = {"clamp": clamp, "zero": to_zero, "smooth": smooth}


class Bound(nn.Module):
    """A bound in a model.

    Attributes:
        threshold: float32, () or (neurons,), positive.
        form: how it binds.
        active: switched off, everything passes, NaN too.
    """

    threshold: Tensor

    def __init__(self, threshold: Tensor, form: Form = "clamp", *, two_sided: bool = True) -> None:
        """Take the threshold as it is.

        Raises:
            UsageError: a form that does not exist, a threshold that is not finite or not positive.
        """
        super().__init__()
        if form not in FORMS:
            raise UsageError(f"unknown form {form!r} of a bound{nearest(form, FORMS)}")
        if not bool((threshold.isfinite() & (threshold > 0)).all()):
            raise UsageError(f"a threshold must be positive and finite, not {_worst(threshold):g}")
        self.register_buffer("threshold", threshold.detach().float())  # no parameter: `model.dtype` is that of those
        self.form, self.two_sided, self.active = form, two_sided, True

    def forward(self, x: Tensor) -> Tensor:
        """Return x (…, neurons), bounded."""
        if not self.active:
            return x
        threshold = self.threshold.to(x)
        # activations differ by orders of magnitude between layers: the slope is a share of the threshold
        slope = {"sharpness": SHARPNESS / threshold} if self.form == "smooth" else {}
        return _APPLIED[self.form](x, threshold, two_sided=self.two_sided, **slope)

    def extra_repr(self) -> str:
        """Say how it binds, and where."""
        where = f"{float(self.threshold):.4g}" if self.threshold.ndim == 0 else f"{self.threshold.numel()} neurons"
        return f"{self.form}, {where}"


class Bounded(nn.Module):
    """An activation function and the bound of what it gives."""

    def __init__(self, activation: nn.Module, bound: Bound) -> None:
        """Take both as they are."""
        super().__init__()
        self.activation, self.bound = activation, bound

    def forward(self, x: Tensor) -> Tensor:
        """Return the bounded activation of x."""
        bounded: Tensor = self.bound(self.activation(x))
        return bounded


class BoundedReLU(Bounded):
    """max(0, x), bounded."""

    def __init__(self, threshold: Tensor | float, form: Form = "clamp") -> None:
        """Bound at `threshold`, () or of the shape of one sample's activations."""
        super().__init__(nn.ReLU(), Bound(torch.as_tensor(threshold), form, two_sided=False))


class BoundedReLU6(Bounded):
    """min(max(0, x), 6), bounded; NaN, which passes ReLU6 itself, does not pass this."""

    def __init__(self, threshold: Tensor | float = 6.0, form: Form = "clamp") -> None:
        """Bound at `threshold`, () or of the shape of one sample's activations."""
        super().__init__(nn.ReLU6(), Bound(torch.as_tensor(threshold), form, two_sided=False))


class BoundedSiLU(Bounded):
    """x σ(x), bounded above; below it is never less than -0.2785."""

    def __init__(self, threshold: Tensor | float, form: Form = "clamp") -> None:
        """Bound at `threshold`, () or of the shape of one sample's activations."""
        super().__init__(nn.SiLU(), Bound(torch.as_tensor(threshold), form, two_sided=False))


class BoundedGELU(Bounded):
    """x Φ(x), bounded above; below it is never less than -0.17."""

    def __init__(self, threshold: Tensor | float, form: Form = "clamp") -> None:
        """Bound at `threshold`, () or of the shape of one sample's activations."""
        super().__init__(nn.GELU(), Bound(torch.as_tensor(threshold), form, two_sided=False))


@contextmanager
def unbounded(bounds: Sequence[Bound]) -> Iterator[None]:
    """Let everything pass inside the context."""
    before = [bound.active for bound in bounds]
    try:
        for bound in bounds:
            bound.active = False
        yield
    finally:
        for bound, active in zip(bounds, before, strict=True):
            bound.active = active


def _worst(threshold: Tensor) -> float:
    bad = threshold[~(threshold.isfinite() & (threshold > 0))]
    return float(bad.flatten()[0])
