"""Pictures made of text."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

# of the digits that show how many bits a linear got: the fewer, the warmer
_COLORS = ("dim", "red", "red", "yellow", "green", "cyan", "blue", "blue", "magenta")


def bits_picture(groups: Sequence[Mapping[str, Any]]) -> Table:
    """One row per group of linears, one digit per block: the bits that it got; a dot where it is not quantized."""
    bits = {(group["group"], group["block"]): _bits_of(group["scheme"]) for group in groups}
    blocks = range(1 + max(block for _, block in bits))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("bits")
    table.add_column(f"blocks 0 to {blocks[-1]}", no_wrap=True)
    table.add_column("mean", justify="right")
    for name in dict.fromkeys(name for name, _ in bits):
        row = [bits.get((name, block), 0) for block in blocks]
        digits = "".join(f"[{_COLORS[width]}]{width or '·'}[/]" for width in row)
        chosen = [width for width in row if width]
        table.add_row(escape(name), digits, f"{sum(chosen) / len(chosen):.1f}")
    return table


def _bits_of(scheme: str) -> int:
    return int(scheme[1 : scheme.index("a")])
