"""Gradients from forward passes alone: the loss a little to one side along random directions, and to the other.

MeZO (Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", arXiv 2305.17333). With directions z_k ~
N(0, I) that are functions of (seed, step, k), the distance e and the losses l_i of the examples of a logical batch,

    rho_k = mean_i [l_i(theta + e z_k) - l_i(theta - e z_k)] / 2e,    gradient = 1/n sum_k rho_k z_k,

whose mean over z is the gradient up to O(e^2). A loss need not have a derivative: minus accuracy will do. Nothing but
the numbers rho has to be kept to have all gradients of a run again (`journal.py`).

Parameters are moved from a copy and put back from it, so that they return to the bit. No more than one tensor of a
direction is in memory at a time.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, median
from typing import ClassVar

import torch
from torch import Tensor

from quantkit.errors import DataError, UsageError
from quantkit.personal import noise
from quantkit.personal.protocols import Losses, Parameters

Draw = Callable[[str, Tensor], Tensor]  # name and tensor to the tensor's part of a direction, float32 on the CPU
POINTS = 9  # along a line, from which the noise of a loss is found
PROBES = 8  # directions along which the curvature of a loss is found
WIDER = 10.0  # times the usual distance: second differences are less exact than first ones
CAUTION = 2.0  # a step is shorter than what is best along one direction: other batches have other slopes


@contextmanager
def moving(parameters: Parameters) -> Iterator[Callable[[Draw, float], None]]:
    """Yield a function that puts every parameter at its place plus a multiple of a direction; put all back at the end.

    The function takes the direction and the distance; it starts from the parameters' own place each time.
    """
    places = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def move(draw: Draw, distance: float) -> None:
        for name, parameter in parameters.items():
            direction = draw(name, parameter).to(parameter)
            parameter.copy_(places[name] + distance * direction)

    with torch.no_grad():
        try:
            yield move
        finally:
            for name, parameter in parameters.items():
                parameter.copy_(places[name])


def slopes(
    losses: Sequence[Losses], parameters: Parameters, draws: Sequence[Draw], distance: float, *, antithetic: bool = True
) -> tuple[Tensor, Tensor]:
    """Return rho of each direction and example, (directions, examples), and the examples' losses, both float64.

    Args:
        losses: of the micro-batches; their examples are taken together.
        parameters: what is moved; as before afterwards.
        draws: one direction each.
        distance: e.
        antithetic: as above, two passes a direction. Otherwise [l(theta + e z) - l(theta)] / e: one, and one in all.
    """
    with moving(parameters) as move:
        here = None if antithetic else evaluated(losses)
        found, seen = [], []
        for draw in draws:
            move(draw, distance)
            ahead = evaluated(losses)
            if here is None:
                move(draw, -distance)
                behind = evaluated(losses)
                found.append((ahead - behind) / (2 * distance))
                seen.append((ahead + behind) / 2)
            else:
                found.append((ahead - here) / distance)
    return torch.stack(found), torch.stack(seen).mean(0) if here is None else here


def evaluated(losses: Sequence[Losses]) -> Tensor:
    """Return the losses of all examples, (examples,) float64 on the CPU, without a graph."""
    with torch.no_grad():
        values = [micro_batch().detach().to("cpu", torch.float64) for micro_batch in losses]
    return torch.cat(values) if values else torch.zeros(0, dtype=torch.float64)


def along(draws: Sequence[Draw], rho: Sequence[float], name: str, tensor: Tensor) -> Tensor:
    """Return 1/n sum_k rho_k z_k, the part of `tensor`, in its dtype on the CPU: each product and sum rounded once."""
    total = torch.zeros(tensor.shape, dtype=tensor.dtype)
    for draw, slope in zip(draws, rho, strict=True):
        total += draw(name, tensor).to(total) * (slope / len(draws))
    return total


def scale_of(parameters: Parameters) -> float:
    """Return the root mean square of all parameters together, or 1 where all are zero, as new biases are."""
    count = sum(parameter.numel() for parameter in parameters.values())
    squares = sum(float(parameter.detach().double().square().sum()) for parameter in parameters.values())
    return math.sqrt(squares / count) if squares else 1.0


def noise_of(values: Sequence[float]) -> float:
    """Return the standard deviation of the errors of a function, from its values at equally spaced points of a line.

    A smooth function leaves little in differences of high order, errors leave sigma^2 (2k)! / (k!)^2 in the square of
    the k-th (Moré and Wild, "Estimating Computational Noise", 2011). This is the median over the three highest orders
    that at least three differences are left of.
    """
    found, differences = [], list(values)
    for order in range(1, len(values) - 2):
        differences = [after - before for before, after in pairwise(differences)]
        square = sum(d * d for d in differences) / len(differences)
        found.append(math.sqrt(square / math.comb(2 * order, order)))
    return median(found[-3:])


@dataclass(frozen=True, kw_only=True)
class NoiseFloor:
    """How exact a slope is at a distance.

    Attributes:
        loss: standard deviation of the error with which the mean loss of the batch is computed.
        slope: that of rho, which comes of it: loss / (sqrt(2) e).
        signal: the size of rho itself, along one direction.
    """

    loss: float
    slope: float
    signal: float


@dataclass(kw_only=True)
class Mezo:
    """Forward passes along random directions.

    Attributes:
        perturbation: MeZO's epsilon: how far parameters are moved, in units of their root mean square at the beginning
            (of 1, if all are 0).
        directions: n; 2n forward passes a step.
        antithetic: both sides of a direction are tried; otherwise one, in n + 1 passes a step, with an error of O(e).
        seed: of the directions.
        rho: slopes of all steps so far, one tensor (directions,) float32 each.
        distance: perturbation times the unit; known from the first step on.
    """

    needs_gradients: ClassVar[bool] = False
    perturbation: float = 1e-3
    directions: int = 1
    antithetic: bool = True
    seed: int = 0
    rho: list[Tensor] = field(default_factory=list, init=False, repr=False)
    distance: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not 0 < self.perturbation < math.inf:
            raise UsageError(f"the perturbation is {self.perturbation:g}; use a finite number above 0, such as 1e-3")
        if self.directions < 1:
            raise UsageError(f"there are {self.directions} directions; use at least 1")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"the seed {self.seed} is out of range; use 0 to 2^63 - 1")

    def estimate(self, losses: Sequence[Losses], parameters: Parameters, *, step: int) -> float:
        """Set `.grad` of every parameter to the estimate, keep the slopes; return the mean loss around the parameters.

        A batch without examples has the gradient 0 and no loss: not a number.
        """
        self.observe(parameters, step)
        found, values = slopes(
            losses, parameters, self.draws(step), self._moved_by(parameters), antithetic=self.antithetic
        )
        self.rho.append(self.summed_up(found, step).to(torch.float32))
        self._set_gradients(parameters, self.rho[-1], step)
        return float(values.mean())

    def follow(self, rho: Tensor, parameters: Parameters, *, step: int) -> None:
        """Set `.grad` of every parameter to what `estimate` set it to when it found the slopes `rho` (directions,)."""
        self.observe(parameters, step)
        self._set_gradients(parameters, rho, step)

    def noise_floor(self, losses: Sequence[Losses], parameters: Parameters) -> NoiseFloor:
        """Measure, by 9 forward passes within the distance, what of a slope is error; parameters are left as they are.

        Distances are well chosen if the error of a slope is far below the slope.
        """
        distance, draw = self._moved_by(parameters), self.draws(0)[0]
        values = []
        with moving(parameters) as move:
            for place in range(POINTS):
                move(draw, distance * (2 * place / (POINTS - 1) - 1))
                values.append(float(evaluated(losses).mean()))
        error = noise_of(values)
        signal = abs(values[-1] - values[0]) / (2 * distance)
        return NoiseFloor(loss=error, slope=error / (math.sqrt(2) * distance), signal=signal)

    def rate(self, losses: Sequence[Losses], parameters: Parameters) -> float:
        """Return a learning rate for plain descent, 1 / 2c with the curvature c = mean |z'Hz|; 17 forward passes.

        A step of r rho z changes the loss by -r rho^2 + r^2 rho^2 z'Hz / 2, least at r = 1 / z'Hz. Curvatures of
        different models and tensors differ by orders of magnitude, so that there is no usual rate.

        Raises:
            DataError: the loss is flat or not finite around the parameters.
        """
        distance, found = WIDER * self._moved_by(parameters), []
        here = float(evaluated(losses).mean())
        with moving(parameters) as move:
            for number in range(PROBES):
                total = -2 * here
                for side in (distance, -distance):
                    move(self._direction(0, number), side)
                    total += float(evaluated(losses).mean())
                found.append(abs(total) / distance**2)
        curvature = fmean(found)
        if not 0 < curvature < math.inf:
            raise DataError("the loss is flat or not finite around the start, so no learning rate follows; pass --lr")
        return 1 / (CAUTION * curvature)

    def draws(self, step: int) -> list[Draw]:
        """Return the directions of a step."""
        return [self._direction(step, number) for number in range(self.directions)]

    def observe(self, parameters: Parameters, step: int) -> None:
        """See the parameters before each step; for methods that learn from where they went."""

    def summed_up(self, found: Tensor, step: int) -> Tensor:  # noqa: ARG002
        """Return one slope per direction, of those of the examples (directions, examples)."""
        return found.mean(1) if found.shape[1] else torch.zeros(len(found))

    def state(self) -> dict[str, Tensor]:
        """Return the slopes (steps, directions) and the distance; both tell of the data."""
        rho = torch.stack(self.rho) if self.rho else torch.zeros(0, self.directions)
        return {"rho": rho, "distance": torch.tensor(self.distance or 0.0, dtype=torch.float64)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` returned."""
        self.rho = list(state["rho"])
        self.distance = float(state["distance"]) or None

    def _direction(self, step: int, number: int) -> Draw:
        return lambda name, tensor: noise.normal(self.seed, step, number, name, tensor.shape)

    def _moved_by(self, parameters: Parameters) -> float:
        if self.distance is None:
            self.distance = self.perturbation * scale_of(parameters)
        return self.distance

    def _set_gradients(self, parameters: Parameters, rho: Tensor, step: int) -> None:
        draws, values = self.draws(step), rho.tolist()
        for name, parameter in parameters.items():
            parameter.grad = self.direction_of(name, along(draws, values, name, parameter)).to(parameter)

    def direction_of(self, name: str, gradient: Tensor) -> Tensor:  # noqa: ARG002
        """Return what becomes of the estimate (…) of one tensor; for methods that remove a part of it."""
        return gradient


METHOD = Mezo
