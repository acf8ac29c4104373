"""How a budget of bits per weight is spent: what is decided together, what each width takes, what was chosen.

The loss of a model is taken to be the sum of the losses that its groups of linears cause one by one in their own
blocks. That ignores how errors meet, and is what makes an exact choice possible (`core.allocate`).
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil, prod
from typing import Any

from quantkit.calibrate.sensitivity import TiedLinears
from quantkit.core.allocate import Option, allocate
from quantkit.core.scheme import QuantScheme
from quantkit.errors import UsageError
from quantkit.exporters.compressed_tensors import CompressedTensors
from quantkit.model.checkpoint import BYTES
from quantkit.model.skeleton import Skeleton

WIDTHS = (2, 3, 4, 5, 6, 8)  # 7 bits cost nearly what 8 do, and no runtime is faster with them
Losses = Mapping[TiedLinears, Mapping[QuantScheme, float]]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What `--target-bpw` asks for.

    Attributes:
        target: most bits per quantized weight, scales included.
        schemes: what a linear may become, by growing width.
        ties: the linears that become the same.
        shapes: module name → shape of every linear.
    """

    target: float
    schemes: tuple[QuantScheme, ...]
    ties: tuple[TiedLinears, ...]
    shapes: Mapping[str, tuple[int, int]]

    @classmethod
    def of(
        cls, target: float, scheme: QuantScheme, skeleton: Skeleton, shapes: Mapping[str, tuple[int, int]]
    ) -> "Budget":
        """Return the budget for the linears of `shapes`; `scheme` gives group size and symmetry.

        Raises:
            UsageError: no choice of widths comes to `target` bits per weight.
        """
        schemes = tuple(replace(scheme, bits=bits) for bits in WIDTHS)
        budget = cls(target=target, schemes=schemes, ties=tied_linears(skeleton, shapes), shapes=shapes)
        least, most = (budget.bits(dict.fromkeys(shapes, each)) for each in (schemes[0], schemes[-1]))
        if budget.limit < least:
            raise UsageError(
                f"--target-bpw {target:g} is below the {least / budget.weights:.3f} bits per weight that {schemes[0]} "
                f"takes with its scales; ask for at least {ceil(1000 * least / budget.weights) / 1000:g}, "
                "or use larger groups"
            )
        if budget.limit > most:
            raise UsageError(
                f"--target-bpw {target:g} is above the {most / budget.weights:.3f} bits per weight of {schemes[-1]}; "
                "use --wbits 8"
            )
        return budget

    @property
    def weights(self) -> int:
        """Number of weights that are quantized."""
        return sum(rows * columns for rows, columns in self.shapes.values())

    @property
    def limit(self) -> int:
        """Most bits in all; the target counts as the decimal fraction that it is written as."""
        return int(Fraction(str(self.target)) * self.weights)

    def bits(self, schemes: Mapping[str, QuantScheme]) -> int:
        """Return the stored bits of the linears that `schemes` names: codes and scales, padding included."""
        return sum(stored_bits(self.shapes[name], scheme) for name, scheme in schemes.items())

    def spend(self, losses: Losses) -> "Allocation":
        """Return the choice with the least total loss within the budget."""
        items = [
            [Option(self.bits(dict.fromkeys(tie.linears, scheme)), losses[tie][scheme]) for scheme in self.schemes]
            for tie in self.ties
        ]
        chosen = allocate(items, self.limit)
        choice = {tie: self.schemes[index] for tie, index in zip(self.ties, chosen, strict=True)}
        return Allocation(target=self.target, choice=choice, losses=losses)


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What was chosen.

    Attributes:
        target: most bits per weight that were allowed.
        choice: what each group of linears becomes.
        losses: what was measured.
    """

    target: float
    choice: Mapping[TiedLinears, QuantScheme]
    losses: Losses

    @property
    def schemes(self) -> dict[str, QuantScheme]:
        """Module name → scheme."""
        return {name: scheme for tie, scheme in self.choice.items() for name in tie.linears}

    @property
    def loss(self) -> float:
        """The sum of the measured losses of what was chosen."""
        return sum(self.losses[tie][scheme] for tie, scheme in self.choice.items())

    def facts(self) -> dict[str, Any]:
        """Return what report.json keeps."""
        groups = [
            {
                "block": tie.block,
                "group": tie.group,
                "linears": list(tie.linears),
                "scheme": str(scheme),
                "losses": {str(each): loss for each, loss in self.losses[tie].items()},
            }
            for tie, scheme in self.choice.items()
        ]
        return {"target_bpw": self.target, "loss": self.loss, "groups": groups}


def stored_bits(shape: tuple[int, int], scheme: QuantScheme) -> int:
    """Return the bits of one linear's codes, scales and zero points as they are stored, padding included."""
    layout = CompressedTensors().layout(shape, scheme, "F16")
    layout.pop("weight_shape", None)  # two numbers that say nothing of the weights
    return sum(8 * BYTES[kind] * prod(size) for kind, size in layout.values())


def tied_linears(skeleton: Skeleton, names: Container[str]) -> tuple[TiedLinears, ...]:
    """Return the groups of the linears in `names`, block by block."""
    family = skeleton.architecture
    groups: dict[tuple[int, str], list[str]] = {}
    for index in range(len(skeleton.blocks)):
        for local in skeleton.block_linears(index):
            name = skeleton.module_name(index, local)
            if name in names:
                group = family.group_of(local) if family else local
                groups.setdefault((index, group), []).append(name)
    return tuple(TiedLinears(block, group, tuple(linears)) for (block, group), linears in groups.items())


def describe(schemes: Mapping[str, QuantScheme], bits_per_weight: float) -> str:
    """Return the name of what the linears become: of their scheme, or `mixed 2-4 bit, 3.25 bpw`."""
    distinct = set(schemes.values())
    if len(distinct) == 1:
        return str(distinct.pop())
    widths = [scheme.bits for scheme in distinct]
    return f"mixed {min(widths)}-{max(widths)} bit, {bits_per_weight:.2f} bpw"
