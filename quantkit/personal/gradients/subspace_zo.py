"""Forward passes that leave out directions in which parameters have hardly moved of late.

ZOODiP's Subspace Gradient (Seo et al., "Efficient Personalization of Quantized Diffusion Model without
Backpropagation", arXiv 2503.14868, section 4.2). Of each vector that is trained, the last `window` values make up B
(window, d). Every `window` steps its features are standardised; with singular values s_j and right vectors v_j of the
result, i the least number with sum_{j <= i} s_j^2 > (1 - share) sum_j s_j^2, and P the rows v_{i+1}, v_{i+2}, ...,

    gradient' = gradient (I - P^T P),

and B begins anew. P has at most window - 1 rows, so of d >> window dimensions little is left out: see
docs/zeroth-order.md for what it does to the loss. `share` is 1e-3; the 0.99 that is the default of the official
program, though not of its scripts, keeps one or two of the directions and leaves out the rest.

Not in the paper: with `remove="directions"` the directions themselves are cut before the loss is measured along them,
so what is left out adds no error to the slope. And as the paper draws only those steps of diffusion that the text
decides, `sensitive` below 1 counts only those examples of a batch whose losses react most.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from quantkit.errors import UsageError, nearest
from quantkit.personal.gradients.mezo import Draw, Mezo
from quantkit.personal.protocols import Parameters

REMOVE = ("gradient", "directions", "nothing")
COORDINATES = ("published", "mapped", "raw")


def standardised(history: Float[Tensor, "window d"]) -> tuple[Tensor, Tensor]:
    """Return the features with mean 0 and deviation 1, and their deviations (d,), 1 where nothing moved."""
    deviation = history.std(0)
    deviation = torch.where(deviation > 0, deviation, 1.0)
    return (history - history.mean(0)) / deviation, deviation


def low_variance(centred: Float[Tensor, "window d"], share: float) -> Float[Tensor, "removed d"]:
    """Return P: orthonormal directions of the history that hold the last `share` of its variance, at most window - 1.

    Directions in which there is no variance at all are none of the history's, and not in P.
    """
    _, values, rows = torch.linalg.svd(centred, full_matrices=False)
    rank = int((values > values[0] * max(centred.shape) * torch.finfo(values.dtype).eps).sum())
    variance = values.square().cumsum(0)
    kept = int((variance <= (1 - share) * variance[-1]).sum()) + 1  # all, if nothing moved
    removed: Tensor = rows[kept : min(rank, len(centred) - 1)]
    return removed


def without(rows: Float[Tensor, "rows d"], removed: Float[Tensor, "rows directions d"]) -> Float[Tensor, "rows d"]:
    """Return g (I - P^T P) of every row; rows of P that are zero do nothing."""
    parts: Tensor = (removed @ rows.unsqueeze(2) * removed).sum(1)
    return rows - parts


def as_rows(tensor: Tensor) -> Float[Tensor, "rows d"]:
    """Return the vectors of a tensor: each token of a prompt, a bias as it is."""
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() else tensor.reshape(1, 1)


@dataclass(kw_only=True)
class SubspaceZo(Mezo):
    """Forward passes along random directions, without the part that lies in P.

    Attributes:
        directions: n; n + 1 forward passes a step, or 2n if `antithetic`.
        window: how many steps a history is long.
        share: of the history's variance that is left out.
        remove: P from the gradient, from the directions that are tried, or nothing.
        coordinates: published: P is found in standardised coordinates and applied to the gradient as it is; mapped: it
            is applied in the coordinates in which it was found; raw: nothing is standardised.
        sensitive: share of the examples of a batch that count, those whose losses react most.
        history: values (rows, d) of each tensor since P was found last, one a step, float32.
        removed: P of every row of each tensor, (rows, most directions, d) float64, zero where there are fewer.
        deviations: of the features of each row, (rows, d) float64, if P is `mapped`.
    """

    directions: int = 2
    antithetic: bool = False
    window: int = 128
    share: float = 1e-3
    remove: str = "gradient"
    coordinates: str = "published"
    sensitive: float = 1.0
    history: dict[str, list[Tensor]] = field(default_factory=dict, init=False, repr=False)
    removed: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    deviations: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 2:
            raise UsageError(f"a history of {self.window} steps has no directions; use at least 2")
        for name in ("share", "sensitive"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise UsageError(f"{name} is {value:g}; use a number from 0 to 1")
        for name, known in (("remove", REMOVE), ("coordinates", COORDINATES)):
            if getattr(self, name) not in known:
                raise UsageError(f"unknown {name} {getattr(self, name)!r}{nearest(getattr(self, name), known)}")

    def observe(self, parameters: Parameters, step: int) -> None:
        """Take down where the last step led; find P anew when the history is long enough."""
        if step == 0 or self.remove == "nothing":
            return
        for name, parameter in parameters.items():
            past = self.history.setdefault(name, [])
            past.append(as_rows(parameter.detach().to("cpu", copy=True)))
            if len(past) == self.window:
                self._find(name, torch.stack(past, dim=1).double())
                past.clear()

    def draws(self, step: int) -> list[Draw]:
        """Return the directions of a step, cut if directions are."""
        made = super().draws(step)
        if self.remove != "directions":
            return made
        return [lambda name, tensor, draw=draw: self._cut(name, draw(name, tensor)) for draw in made]  # type: ignore[misc]

    def summed_up(self, found: Tensor, step: int) -> Tensor:
        """Return the mean slopes of the examples that react most; of several that react alike, the first."""
        if self.sensitive < 1 and found.shape[1]:
            order = found.square().mean(0).argsort(descending=True, stable=True)
            found = found[:, order[: math.ceil(self.sensitive * found.shape[1])]]
        return super().summed_up(found, step)

    def direction_of(self, name: str, gradient: Tensor) -> Tensor:
        """Return the gradient (…), cut if gradients are."""
        return self._cut(name, gradient) if self.remove == "gradient" else gradient

    def state(self) -> dict[str, Tensor]:
        """Return slopes, distance, the histories and what is left out."""
        parts = {f"history {name}": torch.stack(past) for name, past in self.history.items() if past}
        parts |= {f"removed {name}": value for name, value in self.removed.items()}
        return super().state() | parts | {f"deviations {name}": value for name, value in self.deviations.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` returned."""
        super().restore(state)

        def named(kind: str) -> dict[str, Tensor]:
            return {name.removeprefix(f"{kind} "): v for name, v in state.items() if name.startswith(f"{kind} ")}

        self.history = {name: list(past) for name, past in named("history").items()}
        self.removed, self.deviations = named("removed"), named("deviations")

    def _find(self, name: str, history: Tensor) -> None:
        """Find P of every row of a tensor from its values (rows, window, d)."""
        found, deviations = [], []
        for past in history:
            centred, deviation = (
                (past - past.mean(0), torch.ones(())) if self.coordinates == "raw" else standardised(past)
            )
            found.append(low_variance(centred, self.share))
            deviations.append(deviation)
        self.removed[name] = pad_sequence(found, batch_first=True)
        if self.coordinates == "mapped":
            self.deviations[name] = torch.stack(deviations)

    def _cut(self, name: str, gradient: Tensor) -> Tensor:
        """Return the gradient (…) without its part in P, in its own dtype, of sums in float64."""
        if name not in self.removed:
            return gradient
        rows, scale = as_rows(gradient).double(), self.deviations.get(name, torch.ones(()))
        return (without(rows * scale, self.removed[name]) / scale).to(gradient).view(gradient.shape)


METHOD = SubspaceZo
