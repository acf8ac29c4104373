"""Bits chosen by measured loss (--target-bpw) beside one width for all, at the same number of bits.

    python scripts/bench/bits.py MODEL TRAIN TEST --targets 3.0 3.5 4.0 4.5 --uniform 2 3 4 --group-size 32

Symmetric, because transformers loads several widths in one checkpoint only without zero points. Bits per weight count
the codes and scales of the quantized linears.
"""

import argparse
import sys

from common import Figures, machine, markdown, measure, parser, perplexity, recipe

from quantkit import methods
from quantkit.core.scheme import QuantScheme
from quantkit.recipe import Recipe


def main() -> None:
    """Measure what is missing and print the table."""
    args = _arguments()
    print(f"{machine(args)}\n")
    full = measure(args, "full", None)
    cells = {f"all linears {bits} bits": f"uniform-{bits}" for bits in args.uniform}
    cells |= {f"--target-bpw {target:g}": f"target-{target:g}" for target in args.targets}
    found = {name: measure(args, f"bits-{args.method}-{stem}", wanted(args, stem)) for name, stem in cells.items()}
    rows = sorted(((name, run) for name, run in found.items() if run), key=lambda row: row[1]["bits_per_weight"])
    print(markdown(["", "bits per weight", "perplexity"], [[name, *_figures(run)] for name, run in rows]))
    print(f"\nNot quantized: {perplexity(full and full['perplexity'])}. Method {args.method}.")


def wanted(args: argparse.Namespace, stem: str) -> Recipe:
    """Return the recipe of `uniform-3` or `target-3.25`."""
    kind, _, number = stem.partition("-")
    setting = QuantScheme(bits=int(number) if kind == "uniform" else 4, group_size=args.group_size, symmetric=True)
    target = {} if kind == "uniform" else {"target_bpw": float(number)}
    return recipe(args, setting, method=args.method, **target)


def _figures(run: Figures) -> list[str]:
    return [f"{run['bits_per_weight']:.2f}", perplexity(run["perplexity"])]


def _arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--targets", type=float, nargs="+", default=[3.0, 3.5, 4.0, 4.5])
    made.add_argument("--uniform", type=int, nargs="+", default=[2, 3, 4])
    made.add_argument("--group-size", type=int, default=32)
    made.add_argument("--method", choices=methods.names("quantizers"), default="gptq")
    return made.parse_args()


if __name__ == "__main__":
    sys.exit(main())
