"""Perplexity after calibration on real text, on the text that ships with quantkit, and on text the model writes itself.

    python scripts/bench/self_calibration.py stories15m tinystories/train.jsonl tinystories/test.jsonl --threads 1
    python scripts/bench/self_calibration.py MODEL TRAIN TEST --settings w3g32 --preset best --seeds 5

Everything is judged on the same test text. The seed decides which text is drawn, or written.
"""

import argparse

from common import difference, hyper_parameter, machine, markdown, measure, parser, recipe, scheme, spread, title

from quantkit.calibrate.text import SELF
from quantkit.core.scheme import QuantScheme


def run(args: argparse.Namespace, setting: QuantScheme, text: str) -> list[float]:
    """Return the perplexities after calibration on `text`, those seeds left out that --table has none for."""
    found = []
    for seed in range(args.seeds):
        wanted = recipe(args, setting, preset=args.preset, options=dict(args.set), text=text, seed=seed)
        kind = "real" if text == args.train else text
        found.append(measure(args, f"self_calibration-{setting}-{args.preset}-{kind}-{seed}", wanted))
    return [figures["perplexity"] for figures in found if figures]


def table(args: argparse.Namespace) -> str:
    """Return the table: a row for each setting and text."""
    lines = []
    for setting in args.settings:
        values = [run(args, setting, text) for text in (args.train, "embedded", SELF)]
        names = "real text", "embedded text", "the model's own text"
        for name, own in zip(names, values, strict=True):
            lines.append([title(setting), name, spread(own), difference(own, values[0])])
    return markdown(["setting", "calibrated on", "perplexity", "to real text"], lines)


def main() -> None:
    """Measure and print."""
    made = parser(__doc__)
    made.add_argument("--settings", type=scheme, nargs="+", default=[*map(scheme, ("w3g32", "w2g32"))])
    made.add_argument("--preset", default="balanced")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--set", type=hyper_parameter, action="append", default=[], metavar="NAME=VALUE")
    args = made.parse_args()
    where = machine(args)
    print(f"{table(args)}\n\nPreset {args.preset}, {args.samples} × {args.seqlen} tokens, {args.seeds} seeds. {where}")


if __name__ == "__main__":
    main()
