"""Bounded activations of a small CNN under flipped bits: accuracy against the rate of faults, protection by protection.

    python scripts/studies/cnn_resilience.py --quick                 # a minute
    python scripts/studies/cnn_resilience.py --plots docs            # for docs/resilience-cnn.md, minutes

The order to be seen is that of ProAct (arXiv 2406.06313): none < Ranger <= layer-wise <= hybrid at high rates.
"""

import argparse
import copy
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cnn_report
import torch
from cnn_faults import Faults
from digits_cnn import Digits, accuracy, digits, network, train
from torch import nn

from quantkit import Resilience, bound_module

RATES = {"q15.16": (1e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4), "int8": (1e-5, 1e-4, 1e-3, 3e-3, 1e-2)}
BUDGET = 0.5  # points
SEARCHED = (1e-6, 1e-5, 3e-5)  # rates of the interval search
# each protection: its choice, and in how many copies its thresholds are stored
PROTECTIONS: dict[str, tuple[Resilience | None, int]] = {
    "none": (None, 1),
    "ranger": (Resilience(kind="ranger"), 1),
    "layer": (Resilience(kind="layer", form="zero", budget=BUDGET), 1),
    "hybrid": (Resilience(kind="hybrid", form="zero", budget=BUDGET), 1),
    "neuron": (Resilience(kind="neuron", form="zero", method="joint", budget=BUDGET), 1),
    "interval": (Resilience(kind="layer", form="zero", method="interval", budget=BUDGET), 1),
    "layer, joint": (Resilience(kind="layer", form="zero", method="joint", budget=BUDGET), 1),
    "hybrid, joint": (Resilience(kind="hybrid", form="zero", method="joint", budget=BUDGET), 1),
    "neuron, progressive": (Resilience(kind="neuron", form="zero", budget=BUDGET), 1),
    "hybrid, clamp": (Resilience(kind="hybrid", form="clamp", budget=BUDGET), 1),
    "layer, voted": (Resilience(kind="layer", form="zero", budget=BUDGET), 3),
    "hybrid, voted": (Resilience(kind="hybrid", form="zero", budget=BUDGET), 3),
    "neuron, voted": (Resilience(kind="neuron", form="zero", method="joint", budget=BUDGET), 3),
}


def protect(model: nn.Module, choice: Resilience | None, data: Digits, words: str, trials: int) -> dict[str, Any]:
    """Bound `model` in place; return how, and how many bytes the thresholds take."""
    if choice is None:
        return {"bytes": 0}
    bare = Faults(copy.deepcopy(model), words)  # thresholds are made for the words that are stored
    model.load_state_dict(bare.model.state_dict())
    bounds = bound_module(
        model,
        data.train[0],
        resilience=choice,
        held_out=data.held_out,
        evaluate=_searched(model, data, words, trials) if choice.way == "interval" else None,
        rates=SEARCHED,
    )
    return {**bounds.facts, "bytes": bounds.bytes}


def _searched(model: nn.Module, data: Digits, words: str, trials: int) -> Callable[[float], float]:
    """Return accuracy in per cent at a rate, on images that nothing is judged on."""
    return lambda rate: 100 * mean(campaign(Faults(model, words), data.held_out, rate, trials))[0]


def campaign(
    faults: Faults, images: tuple[torch.Tensor, torch.Tensor], rate: float, trials: int, *, weights: bool = True
) -> list[float]:
    """Return the accuracy of each of so many injections."""
    found = []
    for seed in range(trials):
        with faults.at(rate, seed, weights=weights):
            found.append(accuracy(faults.model, images))
    return found


def mean(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the half width of its 95 % band."""
    centre = sum(values) / len(values)
    variance = sum((value - centre) ** 2 for value in values) / max(1, len(values) - 1)
    return centre, 1.96 * math.sqrt(variance / len(values))


def study(words: str, trials: int, seed: int = 0, names: Sequence[str] = tuple(PROTECTIONS)) -> list[dict[str, Any]]:
    """Return a row for each protection: how it was made, its accuracy without faults, and under each rate."""
    data, original = digits(seed), network(seed)
    train(original, data.train, seed=seed)
    rows = []
    for name in names:
        choice, copies = PROTECTIONS[name]
        model = copy.deepcopy(original)
        facts = protect(model, choice, data, words, trials=8)
        faults = Faults(model, words, copies=copies)
        points = {rate: mean(campaign(faults, data.test, rate, trials)) for rate in RATES[words]}
        bounds_alone = mean(campaign(faults, data.test, 1e-3, trials, weights=False)) if choice else None
        rows.append(
            {
                "name": name,
                "words": words,
                "trials": trials,
                "clean": accuracy(model, data.test),
                "held_out": accuracy(model, data.held_out),
                "points": points,
                "bounds_alone": bounds_alone,
                **facts,
            }
        )
        print(
            name, f"{rows[-1]['clean']:.4f}", {rate: f"{a:.3f}±{b:.3f}" for rate, (a, b) in points.items()}, flush=True
        )
    return rows


def main() -> None:
    """Run the study, print its tables, draw its plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", choices=[*RATES], default="q15.16")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--quick", action="store_true", help="ten injections, four protections")
    parser.add_argument("--plots", type=Path, help="directory to draw into")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--only", nargs="+", choices=[*PROTECTIONS], help="protections")
    given = parser.parse_args()
    torch.set_num_threads(1)
    names = given.only or (["none", "ranger", "layer", "hybrid"] if given.quick else [*PROTECTIONS])
    rows = study(given.words, 10 if given.quick else given.trials, names=names)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print(cnn_report.tables(rows))
    if given.plots:
        cnn_report.plot(rows, given.plots / "resilience-cnn.svg")


if __name__ == "__main__":
    main()
