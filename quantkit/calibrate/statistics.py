"""Sums over the calibration tokens that reach the linears, kept once for all linears that share an input."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from quantkit.calibrate.passes import Window
from quantkit.model.block import Site


class Statistic(Protocol):
    """What is accumulated; made anew for every group of linears with one input."""

    def add(self, inputs: Tensor) -> None:
        """Take in `inputs`, (tokens, in) float32."""


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
    return of_site


def groups_in_order(window: Window) -> list[list[Site]]:
    """Return the sites of the window, those that share an input together, in the order in which inputs reach them.

    The order of a module's children is not that order in every family (Phi-3 lists `o_proj` before `qkv_proj`), so the
    first batch is run and watched. Linears that it does not reach come last.
    """
    heard: list[_Turn] = []
    first = replace(window, inputs=window.inputs[:1])
    turns = input_statistics(first, lambda: _Turn(heard))
    groups: dict[_Turn, list[Site]] = defaultdict(list)
    for site in window.sites:
        groups[turns[site.name]].append(site)
    return [groups.pop(turn) for turn in heard] + list(groups.values())


class _Turn:
    """Enters itself in `heard` when the first input arrives."""

    def __init__(self, heard: list["_Turn"]) -> None:
        self.heard = heard

    def add(self, inputs: Tensor) -> None:  # noqa: ARG002  that some came is enough
        """Take the next turn, once."""
        if self not in self.heard:
            self.heard.append(self)
