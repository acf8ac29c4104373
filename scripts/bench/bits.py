"""Perplexity of --target-bpw, which gives each linear its bits by measured loss, against one width for all of them.

    python scripts/bench/bits.py stories15m tinystories/train.jsonl tinystories/test.jsonl --threads 1
    python scripts/bench/bits.py MODEL TRAIN TEST --method rtn --targets 2.75 3.25 --group-size 64

Both have the same format, symmetric groups, which transformers loads at several widths in one model. Beside each target
stands the widest uniform width that takes no more bits.
"""

import argparse

from common import Figures, machine, markdown, measure, parser, perplexity, recipe

from quantkit.allocation import WIDTHS
from quantkit.core.scheme import QuantScheme


def run(args: argparse.Namespace, *, target: float | None = None, bits: int | None = None) -> Figures | None:
    """Return the figures for a target, or for one width."""
    setting = QuantScheme(group_size=args.group_size, symmetric=True)
    wanted = {"target_bpw": target} if bits is None else {"bits": bits}
    made = recipe(args, setting, method=args.method, seed=args.seed, **wanted)
    name = f"target{target}" if bits is None else f"w{bits}"
    return measure(args, f"bits-{name}-g{args.group_size}-{args.method}-{args.seed}", made)


def table(args: argparse.Namespace) -> str:
    """Return the table, a row for each target."""
    every = {bits: run(args, bits=bits) for bits in WIDTHS if bits < max(args.targets)}
    uniform = {bits: figures for bits, figures in every.items() if figures}
    return markdown(
        ["target", "bits per weight", "perplexity", "uniform", "bits per weight", "perplexity", "difference"],
        [line(target, run(args, target=target), uniform) for target in args.targets],
    )


def line(target: float, mixed: Figures | None, uniform: dict[int, Figures]) -> list[str]:
    """Return the row of one target; `uniform` has the figures by width."""
    fitting = [bits for bits, figures in uniform.items() if figures["bits_per_weight"] <= target]
    left = [f"{mixed['bits_per_weight']:.3f}", perplexity(mixed["perplexity"])] if mixed else ["–", "–"]
    if not fitting:
        return [f"{target:g}", *left, "–", "–", "–", "–"]
    best = uniform[max(fitting)]
    gain = f"{mixed['perplexity'] / best['perplexity'] - 1:+.2%}" if mixed else "–"
    right = [f"W{max(fitting)}", f"{best['bits_per_weight']:.3f}", perplexity(best["perplexity"]), gain]
    return [f"{target:g}", *left, *right]


def main() -> None:
    """Measure and print."""
    made = parser(__doc__)
    made.add_argument("--targets", type=float, nargs="+", default=[2.5, 3.0, 3.25, 3.5, 4.0, 4.5])
    made.add_argument("--method", default="gptq", help="what quantizes with the bits that were chosen")
    made.add_argument("--group-size", type=int, default=32)
    made.add_argument("--seed", type=int, default=0)
    args = made.parse_args()
    where = machine(args)
    print(f"{table(args)}\n\n{args.method}, symmetric groups of {args.group_size}. {where}")


if __name__ == "__main__":
    main()
