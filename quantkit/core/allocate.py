"""Bits where they help most: one option per item, the least total loss within a budget, exactly.

This is the multiple-choice knapsack problem (Kellerer, Pferschy, Pisinger: Knapsack Problems, 2004, chapter 11).
Items are taken one after another; what is kept of all choices so far are the pairs (bits, loss) that no other pair
beats in both. A pair is dropped as soon as even the relaxed rest, in which options may be mixed, cannot bring it below
a complete choice that is already known (section 11.5). Dropping loses no optimum, so the result is one, up to the
rounding of a sum of floats; neighbouring pairs are so few after it that hundreds of items take well under a second.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

_ROUNDING = 1e-12  # of the largest loss: sums of the same numbers in another order


@dataclass(frozen=True, slots=True)
class Option:
    """What an item may become: the bits that it then takes, and the loss that it then causes."""

    bits: int
    loss: float


def allocate(items: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """Return for each item the index of its option: the least total loss with at most `budget` bits in all.

    Losses are finite. Of several choices with that loss it is one with the fewest bits.

    Raises:
        ValueError: even the smallest options together take more than the budget.
    """
    if not items:
        return []
    if sum(min(option.bits for option in item) for item in items) > budget:
        raise ValueError(f"the smallest options take more than {budget} bits")
    frontiers = [_frontier(item) for item in items]
    rests = _relaxed_rests([[item[i] for i in frontier] for item, frontier in zip(items, frontiers, strict=True)])
    largest = sum(item[frontier[0]].loss for item, frontier in zip(items, frontiers, strict=True))
    bound = _greedy_loss(items, frontiers, budget) + _ROUNDING * largest
    bits, loss = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    steps = []
    for item, frontier, rest in zip(items, frontiers, rests[1:], strict=True):
        bits = (bits[:, None] + torch.tensor([item[i].bits for i in frontier])).flatten()
        loss = (loss[:, None] + torch.tensor([item[i].loss for i in frontier], dtype=torch.float64)).flatten()
        hopeful = (loss + rest.loss(budget - bits) <= bound).nonzero().flatten()
        kept = hopeful[_undominated(bits[hopeful], loss[hopeful])]
        bits, loss = bits[kept], loss[kept]
        steps.append(kept)
    state, chosen = len(bits) - 1, []  # the last pair has the most bits and the least loss
    for frontier, kept in zip(reversed(frontiers), reversed(steps), strict=True):
        state, option = divmod(int(kept[state]), len(frontier))
        chosen.append(frontier[option])
    return chosen[::-1]


@dataclass(frozen=True)
class _Rest:
    """The least loss of some items as a function of their bits, if options could be mixed: linear between corners."""

    bits: Tensor
    losses: Tensor

    def loss(self, bits: Tensor) -> Tensor:
        """Return the function's value for each number of bits; infinite where they are too few."""
        place = torch.searchsorted(self.bits, bits, right=True).clamp(1, max(len(self.bits) - 1, 1))
        left, right = place - 1, place.clamp(max=len(self.bits) - 1)
        width = (self.bits[right] - self.bits[left]).clamp(min=1)
        share = ((bits - self.bits[left]) / width).clamp(max=1)
        value = self.losses[left] + share * (self.losses[right] - self.losses[left])
        return torch.where(bits < self.bits[0], torch.inf, value)


def _relaxed_rests(items: Sequence[Sequence[Option]]) -> list[_Rest]:
    """Return the relaxation of the items from each one on, and at the end that of none."""
    rests, steps = [], torch.zeros(0, 2, dtype=torch.float64)
    least, most = 0, 0.0
    for item in [(), *reversed(items)]:
        if item:
            least, most = least + item[0].bits, most + item[0].loss
            steps = torch.cat([steps, _hull_steps(item)])
            steps = steps[(steps[:, 1] / steps[:, 0]).argsort(descending=True, stable=True)]
        corners = torch.cat([torch.zeros(1, 2, dtype=torch.float64), steps]).cumsum(0)
        rests.append(_Rest(bits=corners[:, 0].long() + least, losses=most - corners[:, 1]))
    return rests[::-1]


def _hull_steps(item: Sequence[Option]) -> Tensor:
    """Return (steps, 2): bits and the loss that they save, between corners of the lower convex hull of an item."""
    hull: list[Option] = []
    for option in item:
        while len(hull) > 1 and _saving(hull[-2], hull[-1]) <= _saving(hull[-2], option):
            hull.pop()
        hull.append(option)
    pairs = [(b.bits - a.bits, a.loss - b.loss) for a, b in pairwise(hull)]
    return torch.tensor(pairs, dtype=torch.float64).view(-1, 2)


def _saving(small: Option, large: Option) -> float:
    return (small.loss - large.loss) / (large.bits - small.bits)


def _greedy_loss(items: Sequence[Sequence[Option]], frontiers: Sequence[Sequence[int]], budget: int) -> float:
    """Return the loss of a good choice: always the upgrade that saves most per bit among those that fit."""
    places = [0] * len(items)
    left = budget - sum(item[frontier[0]].bits for item, frontier in zip(items, frontiers, strict=True))
    steps = sorted(
        (
            (-_saving(item[frontier[a]], item[frontier[b]]), index, a, b)
            for index, (item, frontier) in enumerate(zip(items, frontiers, strict=True))
            for a in range(len(frontier))
            for b in range(a + 1, len(frontier))
        ),
    )
    for _, index, a, b in steps:
        cost = items[index][frontiers[index][b]].bits - items[index][frontiers[index][a]].bits
        if places[index] == a and cost <= left:
            places[index], left = b, left - cost
    return sum(item[frontier[place]].loss for item, frontier, place in zip(items, frontiers, places, strict=True))


def _frontier(item: Sequence[Option]) -> list[int]:
    """Return the indices of the options that no other beats in bits and loss, by growing bits."""
    kept: list[int] = []
    for index in sorted(range(len(item)), key=lambda i: (item[i].bits, item[i].loss)):
        if not kept or item[index].loss < item[kept[-1]].loss:
            kept.append(index)
    return kept


def _undominated(bits: Tensor, loss: Tensor) -> Tensor:
    """Return the indices of the pairs that no other beats in bits and loss, by growing bits."""
    order = loss.argsort(stable=True)
    order = order[bits[order].argsort(stable=True)]
    least = loss[order].cummin(0).values
    before = torch.cat([least.new_full((1,), torch.inf), least[:-1]])
    return order[loss[order] < before]
