"""Sums over the calibration tokens that reach the linears, kept once for all linears that share an input."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import count
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from quantkit.calibrate.memory import release_freed
from quantkit.calibrate.passes import Window
from quantkit.calibrate.team import Team
from quantkit.model.block import Site


class Statistic(Protocol):
    """What is accumulated; made anew for every group of linears with one input."""

    def add(self, inputs: Tensor) -> None:
        """Take in `inputs`, (tokens, in) float32."""

    def merge(self, team: Team, inputs: Tensor) -> None:
        """Add what the other processes took in; `inputs`, (0, in), says of what size and where."""


S = TypeVar("S", bound=Statistic)


class Hessian:
    """H = (2 / tokens) sum x x^T, (in, in) float32: the second derivative of a linear's squared output error.

    Frantar et al., GPTQ, arXiv 2210.17323, section 3.1.
    """

    def __init__(self) -> None:
        self.tokens, self.total = 0, torch.zeros(())

    def add(self, inputs: Tensor) -> None:
        """Add 2 x x^T of every token x."""
        self.total = self.total.to(inputs) + 2 * inputs.T @ inputs
        self.tokens += len(inputs)

    def merge(self, team: Team, inputs: Tensor) -> None:
        """Add the sums of the other processes."""
        if not self.tokens:
            self.total = inputs.T @ inputs
        team.sum(self.total)
        self.tokens = int(team.total(self.tokens)[0])

    @property
    def value(self) -> Tensor:
        """The mean over all tokens so far."""
        return self.total / max(self.tokens, 1)


class Range:
    """Per input channel the smallest and largest value and the mean magnitude, each (in,) float32."""

    def __init__(self) -> None:
        self.tokens = 0
        self.low = self.high = self.magnitude = torch.zeros(())

    def add(self, inputs: Tensor) -> None:
        """Widen the range to hold every token."""
        low, high = inputs.aminmax(dim=0)
        self.low = torch.minimum(self.low, low) if self.tokens else low
        self.high = torch.maximum(self.high, high) if self.tokens else high
        self.magnitude = self.magnitude.to(inputs) + inputs.abs().sum(dim=0)
        self.tokens += len(inputs)

    def merge(self, team: Team, inputs: Tensor) -> None:
        """Widen the range to hold what the other processes saw."""
        if not self.tokens:
            zeros = inputs.sum(dim=0)
            self.low, self.high, self.magnitude = zeros + torch.inf, zeros - torch.inf, zeros
        team.minimum(self.low)
        team.maximum(self.high)
        team.sum(self.magnitude)
        self.tokens = int(team.total(self.tokens)[0])
        if not self.tokens:  # nobody saw anything
            self.low = self.high = self.magnitude = torch.zeros(())

    @property
    def largest(self) -> Tensor:
        """Largest magnitude of each channel."""
        return torch.maximum(-self.low, self.high)

    @property
    def mean_magnitude(self) -> Tensor:
        """Mean magnitude of each channel."""
        return self.magnitude / max(self.tokens, 1)


class _Listening:
    """Hooks on linears for the duration of a context."""

    def __init__(self, heard: Mapping[nn.Module, Statistic]) -> None:
        self.heard = heard
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        self.handles = [linear.register_forward_pre_hook(self._hear) for linear in self.heard]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _hear(self, linear: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.heard[linear].add(inputs[0].detach().flatten(0, -2).float())


@torch.no_grad()
def input_statistics(
    window: Window,
    make: Callable[[], S],
    *,
    sites: Iterable[Site] | None = None,
    parameters: Mapping[str, Tensor] | None = None,
) -> dict[str, S]:
    """Return a statistic of the input of every site, by full module name, over the actual stream.

    Args:
        window: the blocks and their inputs.
        make: makes an empty statistic; linears of one group (`site.group`) of a block get the same object.
        sites: which sites; None: all of the window.
        parameters: replacements as in `Window.forward`, for example of linears that are rounded already.
    """
    wanted = list(window.sites if sites is None else sites)
    shared: dict[str, S] = {}
    of_site: dict[str, S] = {}
    heard: dict[nn.Module, Statistic] = {}
    for site in wanted:
        block_name = site.name.removesuffix(site.local_name)
        key = f"{block_name}{site.group}"
        if key not in shared:
            shared[key] = make()
            heard[site.linear] = shared[key]  # the first of a group hears for all
        of_site[site.name] = shared[key]
    with _Listening(heard):
        for batch in range(len(window.inputs)):
            window.forward(batch, parameters)
    release_freed()  # what follows takes the largest matrices of a run
    if not window.team.alone:
        for linear, statistic in heard.items():
            statistic.merge(window.team, _no_inputs(linear))
    return of_site


def _no_inputs(linear: nn.Module) -> Tensor:
    """Return no inputs of a linear, (0, in) float32."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight.new_zeros(0, weight.shape[isinstance(linear, nn.Linear)])


def groups_in_order(window: Window) -> list[list[Site]]:
    """Return the sites of the window, those that share an input together, in the order in which inputs reach them.

    The order of a module's children is not that order in every family (Phi-3 lists `o_proj` before `qkv_proj`), so the
    first batch is run and watched. Linears that it does not reach come last.
    """
    clock = count()
    first = replace(window, inputs=window.inputs[:1])
    turns = input_statistics(first, lambda: _Turn(clock))
    groups: dict[_Turn, list[Site]] = defaultdict(list)
    for site in window.sites:
        groups[turns[site.name]].append(site)
    return [groups[turn] for turn in sorted(groups, key=lambda turn: turn.place)]


class _Turn:
    """Takes its place when the first input arrives; after all others until then."""

    def __init__(self, clock: Iterator[int]) -> None:
        self.clock, self.place = clock, math.inf

    def add(self, inputs: Tensor) -> None:  # noqa: ARG002  that some came is enough
        """Take the next place, once."""
        if self.place == math.inf:
            self.place = next(self.clock)

    def merge(self, team: Team, inputs: Tensor) -> None:
        """Take the first place that a process saw: what comes before it in every process still does."""
        place = inputs.new_full((1,), self.place)
        team.minimum(place)
        self.place = float(place)
