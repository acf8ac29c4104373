"""What each part of the learned methods contributes: perplexity without it, or with it, over several seeds.

    python scripts/bench/ablation.py stories15m tinystories/train.jsonl tinystories/test.jsonl --threads 1
    python scripts/bench/ablation.py MODEL TRAIN TEST --settings w4a4 --seeds 5 --updates 200 --distill 64
    python scripts/bench/ablation.py MODEL TRAIN TEST --table

The base is the preset `balanced` with windows of two blocks and fewer updates; where activations are quantized, with a
rotation and without distillation, which are rows there. The steps of rounding and weights grow as their number shrinks,
so that they come as far as in the preset. The seed decides which text is calibrated on, the order of the batches, and
the rotation.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from common import difference, hyper_parameter, machine, markdown, measure, parser, recipe, scheme, spread, title

from quantkit import presets
from quantkit.core.scheme import UNQUANTIZED, QuantScheme
from quantkit.quantizers.omniquant import OmniQuant


@dataclass(frozen=True)
class Variant:
    """A row: options of the block-wise stage, options of the distillation (None: there is none), rotation."""

    block: Mapping[str, Any]
    distill: Mapping[str, Any] | None
    rotate: bool

    def but(self, **options: Any) -> Self:  # noqa: ANN401
        """Return the row that differs in these options of the block-wise stage."""
        return replace(self, block={**self.block, **options})

    @property
    def passes(self) -> dict[str, Mapping[str, Any]]:
        """The passes of the recipe."""
        return {"omniquant": self.block, **({} if self.distill is None else {"distill": self.distill})}


def variants(args: argparse.Namespace, setting: QuantScheme) -> dict[str, Variant]:
    """Return the rows of one setting's table by name, the base first."""
    activations = setting.activation_bits != UNQUANTIZED
    block, distill = options(args, setting)
    base = Variant({**block, "let": activations}, None if activations else distill, rotate=activations)
    rows = {
        "base: "
        + ("LWC, LET, rounding, window, rotation" if activations else "LWC, rounding, window, distillation"): base,
        "− LWC (bounds are the extremes)": base.but(lwc=False),
        **({"− search for LWC's start": base.but(init="nearest")} if block.get("init") == "search" else {}),
        "− rounding": base.but(rounding=False),
        "weights instead of rounding": base.but(rounding=False, weights=True),
        "− window": base.but(window=1),
    }
    signs = {True: "−", False: "+"}
    rows[f"{signs[activations]} LET"] = base.but(let=not activations)
    rows[f"{signs[activations]} rotation"] = replace(base, rotate=not activations)
    rows[f"{signs[not activations]} distillation"] = replace(base, distill=distill if activations else None)
    return rows


def options(args: argparse.Namespace, setting: QuantScheme) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of the block-wise stage and of the distillation: those of `balanced`, for fewer updates."""
    preset = presets.find("balanced", setting).passes
    method = replace(OmniQuant.for_scheme(setting), **preset["omniquant"])
    longer = method.updates / max(1, args.updates)
    steps = {"rounding_lr": method.rounding_lr * longer, "weights_lr": method.weights_lr * longer}
    chosen = {"updates": args.updates, "window": args.window, **steps, **dict(args.set)}
    return {**preset["omniquant"], **chosen}, {**preset["distill"], "updates": args.distill}


def run(args: argparse.Namespace, setting: QuantScheme, row: str, variant: Variant) -> list[float]:
    """Return the perplexities of one row, those seeds left out that --table has none for."""
    found = []
    for seed in range(args.seeds):
        wanted = recipe(args, setting, passes=variant.passes, rotate=variant.rotate, seed=seed)
        name = f"ablation-{setting}-{row}-{seed}"
        found.append(measure(args, name, wanted))
    return [figures["perplexity"] for figures in found if figures]


def table(args: argparse.Namespace, setting: QuantScheme) -> str:
    """Return the table of one setting: every row's mean, standard deviation and distance to the base."""
    found = {name: run(args, setting, name, variant) for name, variant in variants(args, setting).items()}
    base = next(iter(found.values()))
    lines = [[name, spread(values), difference(values, base)] for name, values in found.items()]
    return markdown([title(setting), "perplexity", "to the base"], lines)


def main() -> None:
    """Measure and print."""
    made = parser(__doc__)
    made.add_argument("--settings", type=scheme, nargs="+", default=[*map(scheme, ("w2g32", "w4a4"))])
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--updates", type=int, default=60, help="for each window")
    made.add_argument("--window", type=int, default=2, help="blocks in a window")
    made.add_argument("--distill", type=int, default=24, help="updates of the whole model")
    made.add_argument("--set", type=hyper_parameter, action="append", default=[], metavar="NAME=VALUE")
    args = made.parse_args()
    where = machine(args)
    tables = [table(args, setting) for setting in args.settings]
    print("\n\n".join(tables))
    print(f"\n{args.updates} updates a window, {args.distill} of the whole model, {args.seeds} seeds. {where}")


if __name__ == "__main__":
    main()
