"""How many bytes and bits linears take once they are stored."""

from collections.abc import Mapping

import torch

from quantkit.allocation import Budget
from quantkit.core.scheme import QuantScheme
from quantkit.exporters.compressed_tensors import CompressedTensors
from quantkit.model.checkpoint import BYTES
from quantkit.recipe import Recipe
from quantkit.workload import Workload


def sizes_of(
    recipe: Recipe,
    shapes: Mapping[str, tuple[int, int]],
    schemes: Mapping[str, QuantScheme],
    budget: Budget | None,
    work: Workload,
) -> tuple[int, float]:
    """Return the bytes of the linears as they will be stored, and the bits of one weight."""
    if recipe.dense:
        return sum(rows * columns for rows, columns in shapes.values()) * work.stored_bytes, 8.0 * work.stored_bytes
    if budget:
        return most_bytes(budget), budget.target
    return packed_bytes(shapes, schemes), bits_per_weight(shapes, schemes)


def packed_bytes(shapes: Mapping[str, tuple[int, int]], schemes: Mapping[str, QuantScheme]) -> int:
    """Return the bytes that the packed linears take, by module name."""
    return sum(
        BYTES[kind] * torch.Size(size).numel()
        for name, shape in shapes.items()
        for kind, size in CompressedTensors().layout(shape, schemes[name], "F16").values()
    )


def most_bytes(budget: Budget) -> int:
    """Return the most bytes that the packed linears may take: the budget, and the shape that is stored with each."""
    return -(-budget.limit // 8) + 2 * BYTES["I64"] * len(budget.shapes)


def bits_per_weight(shapes: Mapping[str, tuple[int, int]], schemes: Mapping[str, QuantScheme]) -> float:
    """Return the stored bits per weight of the linears, scales and zero points included."""
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    bits = sum(size * schemes[name].bits_per_weight(shapes[name][1]) for name, size in sizes.items())
    return bits / sum(sizes.values())
