"""What each part is worth: learned clipping, transforms, windows, rounding, weights, distillation, rotation, in turn.

    python scripts/bench/ablation.py MODEL TRAIN TEST --settings w2g32 w4a4 --seeds 3

The base has every part that its setting is for; each row switches one off, or another on in its place. Mean and
standard deviation over seeds, which draw other calibration text, other batches and another rotation. Lengths are short
(--updates, --distill), the same in every row.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from common import difference, machine, markdown, measure, parser, recipe, scheme, spread, title

from quantkit.core.scheme import UNQUANTIZED, QuantScheme
from quantkit.recipe import Recipe

BASE = {"schedule": "linear", "init": "search", "rounding": True, "window": 2, "aug_loss": False}

REACH = 0.35  # of learned weights, so that they move as far as learned rounding: half a step with batches of 8


@dataclass(frozen=True)
class Row:
    """A row of the table: what differs from the base, of OmniQuant's hyper-parameters and of the recipe."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    distill: bool = True
    rotate: bool | None = None


COMMON = [
    Row("everything"),
    Row("without LWC", {"lwc": False}),
    Row("without the window", {"window": 1}),
    Row("without rounding", {"rounding": False}),
    Row("weights instead of rounding", {"rounding": False, "weights": True}),
    Row("without distillation", distill=False),
]
WEIGHTS = [
    *COMMON,
    Row("without searched bounds", {"init": "nearest"}),
    Row("with LET", {"let": True}),
    Row("with rotation", rotate=True),
]
ACTIVATIONS = [*COMMON, Row("without LET", {"let": False}), Row("without rotation", rotate=False)]


def main() -> None:
    """Measure what is missing and print one table for each setting."""
    args = _arguments()
    print(machine(args))
    for setting in args.settings:
        rows = [row for row in rows_of(setting) if not args.rows or row.name in args.rows]
        found = {row.name: _values(args, row, setting) for row in rows}
        lines = [[row.name, spread(found[row.name]), difference(found[row.name], found[rows[0].name])] for row in rows]
        print(f"\n{title(setting)}\n\n{markdown(['', 'perplexity', 'against everything'], lines)}")
    print(f"\n{args.seeds} seeds; {args.updates} updates for each window, {args.distill} of the whole model.")


def rows_of(setting: QuantScheme) -> list[Row]:
    """Return the rows of a setting; the first is the base."""
    return WEIGHTS if setting.activation_bits == UNQUANTIZED else ACTIVATIONS


def wanted(args: argparse.Namespace, row: Row, setting: QuantScheme, seed: int) -> Recipe:
    """Return the recipe of one run."""
    activations = setting.activation_bits != UNQUANTIZED
    options = {**BASE, "lwc_lr": 0.1 if setting.bits < 4 else 0.03, "let": activations, "amp": not activations}
    rotate = activations if row.rotate is None else row.rotate
    made = recipe(
        args,
        setting,
        method="omniquant",
        options={**options, "weights_lr": REACH / args.updates, **row.options, "updates": args.updates},
        rotate=rotate,
        seed=seed,
    )
    if not row.distill:
        return made
    lr = 3e-3 if setting.bits < 3 else 1e-3
    return with_pass(made, "distill", {"updates": args.distill, "lr": lr, "norms_lr": lr, "amp": not activations})


def with_pass(made: Recipe, name: str, options: Mapping[str, Any]) -> Recipe:
    """Return the recipe with one more pass."""
    return replace(made, passes={**made.passes, name: options})


def _values(args: argparse.Namespace, row: Row, setting: QuantScheme) -> list[float]:
    stem = row.name.replace(" ", "-")
    runs = [
        measure(args, f"ablation-{setting}-{stem}-{seed}", wanted(args, row, setting, seed))
        for seed in range(args.seeds)
    ]
    return [run["perplexity"] for run in runs if run]


def _arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--settings", type=scheme, nargs="+", default=[scheme(text) for text in ("w2g32", "w4a4")])
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--rows", nargs="+", help="only these, by name; the first is what the others are compared with")
    made.add_argument("--updates", type=int, default=48, help="for each window")
    made.add_argument("--distill", type=int, default=16, help="updates of the whole model")
    return made.parse_args()


if __name__ == "__main__":
    sys.exit(main())
