"""Calibration on text that the model writes itself, beside real text of its own kind and the embedded text.

    python scripts/bench/self_calibration.py MODEL TRAIN TEST --settings w3g32 w2g32 --preset balanced

The same preset, number and length of sequences in every cell; what differs is where the text comes from.
"""

import argparse
import sys

from common import machine, markdown, measure, parser, perplexity, recipe, scheme, spread, title

from quantkit import presets
from quantkit.core.scheme import QuantScheme
from quantkit.recipe import Recipe

SOURCES = {"real text": None, "self": "self", "embedded text": "embedded"}


def main() -> None:
    """Measure what is missing and print the table."""
    args = _arguments()
    print(f"{machine(args)}\n")
    full = measure(args, "full", None)
    lines = [[name, *(spread(_values(args, name, setting)) for setting in args.settings)] for name in SOURCES]
    print(markdown(["calibrated on", *(title(setting) for setting in args.settings)], lines))
    print(f"\nNot quantized: {perplexity(full and full['perplexity'])}. Preset {args.preset}, {args.seeds} seed(s).")


def wanted(args: argparse.Namespace, source: str, setting: QuantScheme, seed: int) -> Recipe:
    """Return the recipe of one run."""
    return recipe(args, setting, preset=args.preset, text=SOURCES[source] or args.train, seed=seed)


def _values(args: argparse.Namespace, source: str, setting: QuantScheme) -> list[float]:
    stem = f"self-{args.preset}-{setting}-{source.replace(' ', '-')}"
    runs = [measure(args, f"{stem}-{seed}", wanted(args, source, setting, seed)) for seed in range(args.seeds)]
    return [run["perplexity"] for run in runs if run]


def _arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--settings", type=scheme, nargs="+", default=[scheme(text) for text in ("w3g32", "w2g32")])
    made.add_argument("--preset", choices=presets.NAMES, default=presets.DEFAULT)
    made.add_argument("--seeds", type=int, default=1)
    return made.parse_args()


if __name__ == "__main__":
    sys.exit(main())
