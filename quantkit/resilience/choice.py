"""How a model is protected, as a value that a recipe keeps."""

from dataclasses import dataclass
from math import isfinite
from typing import Literal, get_args

from quantkit.errors import UsageError, nearest
from quantkit.resilience.bounds import FORMS, Form

Kind = Literal["layer", "neuron", "hybrid", "ranger"]
Method = Literal["progressive", "profiled", "interval", "joint"]
KINDS: tuple[str, ...] = get_args(Kind)
METHODS: tuple[str, ...] = get_args(Method)  # each a file of quantkit/resilience
DECAYS = (10.0, 1.0, 0.1, 0.01)


@dataclass(frozen=True, kw_only=True, slots=True)
class Resilience:
    """Which bounds a model gets, and how their thresholds are found.

    Attributes:
        kind: `layer`: one threshold for each place; `neuron`: one for each neuron; `hybrid`: one for each place, and
            one for each neuron of the last block; `ranger`: as `layer`, and `method` is `profiled`.
        method: `progressive`, `profiled`, `interval` or `joint`.
        form: `clamp`, `zero` or `smooth`, see `bounds`.
        budget: how much worse the undisturbed model may become: perplexity in per cent, accuracy in points.
        margin: what the largest value that was seen is multiplied by, for the thresholds to begin with.
        decays: how hard thresholds are pulled towards 0, one rung of the ladder after the other.
        lr: by what share a threshold changes in an update at most, about; half of it on each further rung.
        epochs: passes over the calibration text on one rung at most.
    """

    kind: Kind = "hybrid"
    method: Method = "progressive"
    form: Form = "clamp"
    budget: float = 0.5
    margin: float = 1.0
    decays: tuple[float, ...] = DECAYS
    lr: float = 0.05
    epochs: int = 8

    def __post_init__(self) -> None:
        for what, value, known in (
            ("kind of bounds", self.kind, KINDS),
            ("method for thresholds", self.method, METHODS),
            ("form of a bound", self.form, FORMS),
        ):
            if value not in known:
                raise UsageError(f"unknown {what} {value!r}{nearest(str(value), known)}")
        if not (isfinite(self.budget) and self.budget >= 0):
            raise UsageError(f"budget must be a number of per cent, at least 0, not {self.budget}")
        if not (isfinite(self.margin) and self.margin > 0 and isfinite(self.lr) and self.lr > 0):
            raise UsageError(f"margin and lr must be positive, not {self.margin} and {self.lr}")
        if self.epochs < 1 or not self.decays or not all(isfinite(decay) and decay > 0 for decay in self.decays):
            raise UsageError("epochs must be at least 1, and decays positive numbers")

    @property
    def way(self) -> Method:
        """The method: that of `ranger` is to take the largest value."""
        return "profiled" if self.kind == "ranger" else self.method

    @classmethod
    def parse(cls, kind: str, *, budget: str | float | None = None, **others: object) -> "Resilience":
        """Return the choice of words as people write them: a budget is 0.5 or "0.5%"; None is the default.

        Raises:
            UsageError: a word or number that is none of these.
        """
        given = {name: value for name, value in others.items() if value is not None}
        if budget is not None:
            given["budget"] = _percent(budget)
        return cls(kind=kind, **given)  # type: ignore[arg-type]


def _percent(text: str | float) -> float:
    try:
        return float(str(text).strip().removesuffix("%"))
    except ValueError:
        raise UsageError(f"budget must be a number of per cent such as 0.5%, not {text!r}") from None
