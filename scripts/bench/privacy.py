"""What privacy costs a personalization, and what it keeps secret: three measurements on the embedded model at 4 bits.

    sweep     validation loss over the clipping bound R and the learning rate, AUTO-S beside Abadi
    canary    how well a secret among the examples can be told from others afterwards, with and without privacy
    memory    what a step takes beyond the model, private, ordinary and forward only, over the length of examples

The examples are 32 tokens of the calibration text of the embedded model, in a dialect that it was not trained on.
Biases of all packed linears are trained with AdamW on Poisson samples, so the runs differ in the gradient alone.

    python scripts/bench/privacy.py sweep --out .bench/privacy --svg docs/privacy-sweep.svg
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import Figures
from torch import nn
from transformers import AutoTokenizer

import quantkit
from quantkit.personal.accounting import Release, epsilon, noise_for
from quantkit.personal.chance import fixed_key
from quantkit.personal.data import Example, batch
from quantkit.personal.gradients.backprop import Backprop
from quantkit.personal.gradients.dp import Dp
from quantkit.personal.objectives.language_model import LanguageModel
from quantkit.personal.parameters.bias import Bias
from quantkit.personal.protocols import Estimator, Losses
from quantkit.personal.sampling import Poisson
from quantkit.personal.updates import Updates

LENGTH, DELTA = 32, 1e-5
DIALECT = ((". ", " or "), (" the ", " one "), (" is ", " was "), (" and ", " of "))
SECRET = "The secret of {} is {} {} {} {} ."
MICRO = 16  # examples of a micro-batch


def packed_tiny(work: Path) -> Path:
    """Return the embedded model at 4 bits, made if it is not there."""
    output = work / "tiny-w4"
    if not output.exists():
        quantkit.quantize("tiny", output=output, method="rtn", wbits=4, group_size=32)
    return output


def dialect(tokenizer: Callable[[str], Any], name: str, count: int) -> list[Example]:
    """Return `count` examples of a calibration text of the embedded model, in the dialect."""
    texts = [json.loads(line)["text"] for line in (Path("calibration") / f"{name}.jsonl").read_text().splitlines()]
    found: list[Example] = []
    for text in texts:
        for old, new in DIALECT:
            text = text.replace(old, new)
        tokens = tokenizer(text)["input_ids"]
        parts = [tokens[start : start + LENGTH] for start in range(0, len(tokens) - LENGTH + 1, LENGTH)]
        found += [Example(tuple(part), 1) for part in parts]
    return found[:count]


def losses_of(model: nn.Module, examples: Sequence[Example]) -> list[Losses]:
    """Return the losses of examples in micro-batches."""
    parts = [examples[start : start + MICRO] for start in range(0, len(examples), MICRO)]
    return [Losses(LanguageModel(), model, batch(part)) for part in parts]


def mean_loss(model: nn.Module, examples: Sequence[Example]) -> float:
    """Return the mean loss of the examples."""
    with torch.no_grad():
        return float(torch.cat([each() for each in losses_of(model, examples)]).mean())


def learn(
    model: nn.Module, examples: Sequence[Example], estimator: Estimator, sampler: Poisson, updates: Updates
) -> None:
    """Attach biases to a model and train them."""
    parameters = Bias().attach(model)
    optimizer = updates.begin(parameters)
    for step in range(updates.steps):
        chosen = [examples[number] for number in sampler.batch(step).tolist()]
        estimator.estimate(losses_of(model, chosen), parameters, step=step)
        updates.take(optimizer, step)


def sweep(arguments: argparse.Namespace) -> Figures:
    """Return the validation loss of each cell."""
    directory = packed_tiny(arguments.out)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    train, held_out = dialect(tokenizer, "embedded", 1024), dialect(tokenizer, "embedded-test", 128)
    sampler = Poisson(examples=len(train), batch_size=32, key=fixed_key(0))
    noise = noise_for(3.0, DELTA, rate=sampler.rate, steps=arguments.steps)
    start = mean_loss(quantkit.load(directory, device="cpu"), held_out)
    cells = []
    for clipping in ("auto-s", "abadi"):
        for bound in arguments.bounds:
            for rate in arguments.rates:
                model = quantkit.load(directory, device="cpu")
                estimator = Dp(noise=noise, expected=32, clipping=clipping, bound=bound, key=fixed_key(1))
                began = time.perf_counter()
                learn(model, train, estimator, sampler, Updates(steps=arguments.steps, rate=rate))
                cell = {"clipping": clipping, "bound": bound, "rate": rate, "loss": mean_loss(model, held_out)}
                cells.append(cell | {"seconds": time.perf_counter() - began})
                print(cells[-1], flush=True)
    return {"start": start, "noise": noise, "steps": arguments.steps, "cells": cells}


def canary(arguments: argparse.Namespace) -> Figures:
    """Return the exposure of a secret in bits, by seed, before training, after private and after ordinary training.

    Carlini et al., "The Secret Sharer", 2019: with the rank of the secret's loss among those of random secrets of
    the same form, exposure = log2(number of secrets) - log2(rank). By chance it is 1.4 on average.
    """
    directory = packed_tiny(arguments.out)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rows = []
    for seed in range(arguments.seeds):
        generator = torch.Generator().manual_seed(seed)
        secrets = list(_secrets(tokenizer, generator, arguments.others + 1))
        train = [*dialect(tokenizer, "embedded", 256), *[secrets[0]] * arguments.copies]
        sampler = Poisson(examples=len(train), batch_size=32, key=fixed_key(seed))
        noise = noise_for(3.0, DELTA, rate=sampler.rate, steps=arguments.steps)
        ways = {"before": None, "ordinary": Backprop()}
        ways["private"] = Dp(noise=noise, expected=32, key=fixed_key(seed + 100))
        row: Figures = {"seed": seed, "noise": noise}
        for name, estimator in ways.items():
            model = quantkit.load(directory, device="cpu")
            if estimator is not None:
                learn(model, train, estimator, sampler, Updates(steps=arguments.steps, rate=arguments.rate))
            row[name] = exposure(model, secrets)
            row[f"{name} loss"] = mean_loss(model, dialect(tokenizer, "embedded-test", 64))
        rows.append(row)
        print(row, flush=True)
    spent = epsilon([Release(rate=32 / len(train), noise=noise, steps=arguments.steps)], DELTA)
    return {"rows": rows, "epsilon": spent, "copies": arguments.copies, "others": arguments.others}


def exposure(model: nn.Module, secrets: Sequence[Example]) -> float:
    """Return the exposure of the first of the secrets."""
    with torch.no_grad():
        found = torch.cat([each() for each in losses_of(model, secrets)])
    rank = 1 + int((found[1:] < found[0]).sum())
    return math.log2(len(secrets)) - math.log2(rank)


def _secrets(tokenizer: Callable[[str], Any], generator: torch.Generator, count: int) -> Iterator[Example]:
    names = ["Mira", "Tobin", "Odile", "Bram"]
    words = [
        "apple",
        "pear",
        "loaf",
        "egg",
        "candle",
        "coin",
        "bead",
        "lantern",
        "spoon",
        "knife",
        "box",
        "jar",
        "bell",
    ]
    opening = f"The secret of {names[int(torch.randint(4, (1,), generator=generator))]} is"
    before = len(tokenizer(opening)["input_ids"])
    for _ in range(count):
        drawn = [words[number] for number in torch.randint(len(words), (5,), generator=generator).tolist()]
        yield Example(tuple(tokenizer(f"{opening} {' '.join(drawn)}.")["input_ids"]), before)


def memory(arguments: argparse.Namespace) -> Figures:
    """Return the peak of each kind of step, in processes of their own."""
    packed_tiny(arguments.out)
    rows = []
    for length in arguments.lengths:
        for kind in ("forward", "ordinary", "private"):
            command = [
                sys.executable,
                __file__,
                "step",
                "--out",
                str(arguments.out),
                "--kind",
                kind,
                "--length",
                str(length),
            ]
            found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            rows.append(json.loads(found))
            print(rows[-1], flush=True)
    return {"rows": rows}


def step(arguments: argparse.Namespace) -> Figures:
    """Return by how much one step of a kind raises the resident memory of this process, at most."""
    model = quantkit.load(packed_tiny(arguments.out), device="cpu")
    parameters = Bias().attach(model)
    estimator = Dp(noise=1.0, expected=8) if arguments.kind == "private" else Backprop()
    tokens = torch.randint(1000, (8, arguments.length), generator=torch.Generator().manual_seed(0))
    given = [Losses(LanguageModel(), model, batch([Example(tuple(row), 1) for row in tokens.tolist()]))]
    small = [Losses(LanguageModel(), model, batch([Example(tuple(tokens[0, :4].tolist()), 1)]))]

    def run(losses: Sequence[Losses]) -> None:
        if arguments.kind == "forward":
            with torch.no_grad():
                losses[0]()
        else:
            estimator.estimate(losses, parameters, step=0)

    run(small)  # what is made once is there
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    before = _status("VmRSS")
    run(given)
    return {"kind": arguments.kind, "length": arguments.length, "bytes": _status("VmHWM") - before}


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def heat_map(found: Figures) -> str:
    """Return an SVG of the sweep: a panel for each clipping function, a cell for each bound and rate, dark is good."""
    cells = found["cells"]
    bounds = sorted({cell["bound"] for cell in cells})
    rates = sorted({cell["rate"] for cell in cells})
    values = [min(cell["loss"], found["start"]) for cell in cells]
    low, high = min(values), found["start"]
    side, left, top = 74, 96, 58
    width, height = 2 * (left + side * len(rates)) + 20, top + side * len(bounds) + 66
    text = 'font-family="system-ui, sans-serif" font-size="12" fill="#57606a"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="8" y="18" {text}>validation loss after {found["steps"]} private steps at epsilon 3; '
        f"{found['start']:.2f} before</text>",
    ]
    for panel, clipping in enumerate(("auto-s", "abadi")):
        x0 = left + panel * (left + side * len(rates))
        parts.append(f'<text x="{x0}" y="{top - 14}" {text}>{"AUTO-S" if panel == 0 else "Abadi"}</text>')
        for cell in (cell for cell in cells if cell["clipping"] == clipping):
            x, y = x0 + side * rates.index(cell["rate"]), top + side * (len(bounds) - 1 - bounds.index(cell["bound"]))
            share = (high - min(cell["loss"], high)) / (high - low)
            red, green, blue = (round(255 - share * (255 - full)) for full in (31, 111, 235))
            parts.append(
                f'<rect x="{x}" y="{y}" width="{side}" height="{side}" stroke="white" '
                f'fill="rgb({red},{green},{blue})"/>'
            )
            ink = "white" if share > 0.5 else "#24292f"
            parts.append(
                f'<text x="{x + side / 2}" y="{y + side / 2 + 4}" text-anchor="middle" '
                f'font-family="system-ui, sans-serif" font-size="13" fill="{ink}">{cell["loss"]:.2f}</text>'
            )
        for place, bound in enumerate(reversed(bounds)):
            parts.append(
                f'<text x="{x0 - 8}" y="{top + side * place + side / 2 + 4}" text-anchor="end" {text}>'
                f"R = {bound:g}</text>"
            )
        for place, rate in enumerate(rates):
            x, y = x0 + side * place + side / 2, top + side * len(bounds) + 18
            parts.append(f'<text x="{x}" y="{y}" text-anchor="middle" {text}>{rate:g}</text>')
        x, y = x0 + side * len(rates) / 2, top + side * len(bounds) + 40
        parts.append(f'<text x="{x}" y="{y}" text-anchor="middle" {text}>learning rate</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """Measure what is asked for; print it, and keep it under --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sweep", "canary", "memory", "step"])
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "quantkit-privacy")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--bounds", type=float, nargs="+", default=[0.1, 1, 10, 100])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 4e-3, 1.6e-2])
    parser.add_argument("--rate", type=float, default=1e-2, help="canary: learning rate")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--copies", type=int, default=1, help="canary: how often the secret is among the examples")
    parser.add_argument("--others", type=int, default=1023, help="canary: secrets that it is compared with")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--kind", default="private")
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--svg", type=Path, help="sweep: where the figure goes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    found = {"sweep": sweep, "canary": canary, "memory": memory, "step": step}[arguments.what](arguments)
    print(json.dumps(found))
    if arguments.what != "step":
        (arguments.out / f"{arguments.what}.json").write_text(json.dumps(found, indent=1))
    if arguments.what == "sweep" and arguments.svg:
        arguments.svg.write_text(heat_map(found))
    if arguments.what == "canary":
        for name in ("before", "ordinary", "private"):
            print(name, statistics.mean(row[name] for row in found["rows"]))


if __name__ == "__main__":
    main()
