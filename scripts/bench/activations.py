"""Perplexity where activations are quantized too: RTN, transforms without and with training, windows and rotation.

    python scripts/bench/activations.py stories15m tinystories/train.jsonl tinystories/test.jsonl --threads 1
    python scripts/bench/activations.py MODEL TRAIN TEST --settings w4a4 --presets --updates 400 --work .bench/presets
    python scripts/bench/activations.py MODEL TRAIN TEST --table --presets

LET without training is SmoothQuant's scaling (Xiao et al., arXiv 2211.10438) at all the places that OmniQuant knows,
between unclipped bounds: with clipping `updates=0` would not start from RTN's bounds but from those times 0.982. The
learned rows differ from OmniQuant's own setting in what every preset differs in, batches of 8 and a learning rate that
falls linearly; the augmented loss and the learning rates are the paper's. --set changes hyper-parameters of these rows.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from common import Figures, hyper_parameter, machine, markdown, measure, parser, perplexity, recipe, scheme, title

from quantkit.core.scheme import QuantScheme

CAPTION = (
    "Quantized and judged: the input of every linear per token; Q, K (both after the rotary embedding) and V per token "
    "and head; dynamic scales. The softmax's output, embeddings and head are not."
)


@dataclass(frozen=True)
class Row:
    """How a row of the table quantizes: a method with options, or a preset."""

    name: str
    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None
    rotate: bool = False


def rows(args: argparse.Namespace) -> list[Row]:
    """Return the rows of the table, without the one of the model itself."""
    learned = {"updates": args.updates, "lwc": True, "let": True, "schedule": "linear", **dict(args.set)}
    windows = {**learned, "window": args.window}
    made = [
        Row("RTN", "rtn"),
        Row("RTN + rotation", "rtn", rotate=True),
        Row("LET without training", "omniquant", {"updates": 0, "lwc": False, "let": True}),
        Row("LWC + LET", "omniquant", learned),
        Row(f"LWC + LET + window {args.window}", "omniquant", windows),
        Row("LWC + LET + rotation", "omniquant", learned, rotate=True),
        Row(f"LWC + LET + window {args.window} + rotation", "omniquant", windows, rotate=True),
    ]
    return made + [Row(name, preset=name) for name in ("balanced", "best") if args.presets]


def run(args: argparse.Namespace, row: Row, setting: QuantScheme) -> Figures | None:
    """Return the figures of one cell."""
    wanted = recipe(args, setting, preset=row.preset, method=row.method, options=row.options, rotate=row.rotate)
    return measure(args, f"activations-{setting}-{row.name}", wanted)


def table(args: argparse.Namespace) -> str:
    """Return the table: a row for each way, a column for each setting."""
    full = measure(args, "unquantized", None)
    lines = [["unquantized", *[perplexity(full and full["perplexity"])] * len(args.settings)]]
    for row in rows(args):
        found = [run(args, row, setting) for setting in args.settings]
        lines.append([row.name, *(perplexity(cell and cell["perplexity"]) for cell in found)])
    return markdown(["", *map(title, args.settings)], lines)


def main() -> None:
    """Measure and print."""
    made = parser(__doc__)
    made.add_argument("--settings", type=scheme, nargs="+", default=[*map(scheme, ("w8a8", "w6a6", "w4a4"))])
    made.add_argument("--updates", type=int, default=200, help="for each window")
    made.add_argument("--window", type=int, default=2, help="blocks in a window, in the rows that say so")
    made.add_argument("--presets", action="store_true", help="measure balanced and best too")
    made.add_argument("--set", type=hyper_parameter, action="append", default=[], metavar="NAME=VALUE")
    args = made.parse_args()
    where = machine(args)
    print(f"{table(args)}\n\n{CAPTION}\n{args.updates} updates a window. {where}")


if __name__ == "__main__":
    main()
