"""Perplexity with quantized weights and activations: rounding, equivalent transforms, training, windows, rotation.

    python scripts/bench/activations.py MODEL TRAIN TEST --settings w8a8 w6a6 w4a4 --updates 64
    python scripts/bench/activations.py MODEL TRAIN TEST --settings w4a4 --rows rtn let --updates 0

One scale per row of the weights; every linear's input, the queries, the keys and the values quantized per token, at
calibration and when the exported checkpoint is judged. `LET untrained` moves the scales that SmoothQuant (arXiv
2211.10438, equation 4) computes and trains nothing; its bounds are RTN's. Trained rows take batches of 8 and rates that
fall linearly, as the presets do; the augmented loss is the paper's.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common import machine, markdown, measure, parser, perplexity, recipe, scheme, title

from quantkit.core.scheme import QuantScheme
from quantkit.recipe import Recipe

LOOP = {"schedule": "linear", "lwc_lr": 0.03}


@dataclass(frozen=True)
class Row:
    """A row of the table: its method and what is learned, whether it rotates."""

    name: str
    method: str
    options: Mapping[str, Any]
    rotate: bool = False
    trained: bool = True


LET = {"let": True, **LOOP}
ROWS = {
    "rtn": Row("RTN", "rtn", {}, trained=False),
    "rtn-rotation": Row("RTN, rotation", "rtn", {}, rotate=True, trained=False),
    "let": Row("LET untrained", "omniquant", {"let": True, "lwc": False}, trained=False),
    "let-rotation": Row(
        "LET untrained, rotation", "omniquant", {"let": True, "lwc": False}, rotate=True, trained=False
    ),
    "lwc-let": Row("LWC + LET", "omniquant", LET),
    "lwc-let-window": Row("LWC + LET, window of 2", "omniquant", {**LET, "window": 2}),
    "lwc-let-rotation": Row("LWC + LET, rotation", "omniquant", LET, rotate=True),
    "all": Row("LWC + LET, window of 2, rotation", "omniquant", {**LET, "window": 2}, rotate=True),
    "rounding": Row(
        "the same, with learned rounding", "omniquant", {**LET, "window": 2, "rounding": True}, rotate=True
    ),
}


def main() -> None:
    """Measure what is missing and print the table."""
    args = _arguments()
    print(f"{machine(args)}\n")
    full = measure(args, "full", None)
    lines = [[ROWS[row].name, *(_cell(args, row, setting) for setting in args.settings)] for row in args.rows]
    print(markdown(["", *(title(setting) for setting in args.settings)], lines))
    print(f"\nNot quantized: {perplexity(full and full['perplexity'])}. {args.updates} updates for each window.")


def wanted(args: argparse.Namespace, row: Row, setting: QuantScheme) -> Recipe:
    """Return the recipe of a cell."""
    options = dict(row.options)
    if row.method == "omniquant":
        options["updates"] = args.updates if row.trained else 0
    return recipe(args, setting, method=row.method, options=options, rotate=row.rotate)


def _cell(args: argparse.Namespace, name: str, setting: QuantScheme) -> str:
    figures = measure(args, f"activations-{name}-{setting}", wanted(args, ROWS[name], setting))
    return perplexity(figures and figures["perplexity"])


def _arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--settings", type=scheme, nargs="+", default=[scheme(text) for text in ("w8a8", "w6a6", "w4a4")])
    made.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    made.add_argument("--updates", type=int, default=64, help="for each window")
    return made.parse_args()


if __name__ == "__main__":
    sys.exit(main())
