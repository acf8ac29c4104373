"""Faults in a packed model: perplexity against the rate of flipped bits, for every protection.

    python scripts/bench/faults.py work DIRECTORY      # stories15m in the shared folder; goes on where it was cut off
    python scripts/bench/faults.py show DIRECTORY      # the tables and the figure of docs/resilience.md

`work` quantizes the model to 4 bits in groups of 32, lets the original write the stories that are judged, protects
copies of the output in each way, and runs a campaign on each: 100 trials a rate, the same bits hit in all of them.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import quantkit
from quantkit.fault_plot import draw, read_results
from quantkit.resilience import scale_file, side_file
from quantkit.resilience.scales import SCALE_KINDS

MODEL = Path(os.environ.get("QUANTKIT_SHARED", "shared")) / "models" / "stories15m"
RATES = (1e-7, 1e-6, 1e-5, 1e-4)
WHAT = {"seqlen": 64, "windows": 2, "bos": True}
FEWER = 40  # trials of what no claim about protections rests on
BOUNDS = ("ranger", "layer", "neuron", "hybrid")
SHORT = {"margin": 1.1, "decays": (10.0, 0.1), "epochs": 1}  # of the training of thresholds
CALIBRATION = {"samples": 48, "seqlen": 128}
TARGETS = ("codes", "scales", "zeros", "norms", "embeddings", "kv", "activations")
VARIANTS: dict[str, tuple[str | None, str | None]] = {
    "none": (None, None),
    **{kind: (None, kind) for kind in SCALE_KINDS},
    **{kind: (kind, None) for kind in BOUNDS},
    "hybrid+secded": ("hybrid", "secded"),
}
TINY = ("none", "clamp", "parity", "secded64", "secded", "ranger", "hybrid")
DRAWN = ("none", "ranger", "hybrid", "clamp", "parity", "secded", "hybrid+secded")


def work(directory: Path, only: Sequence[str], trials: int) -> None:
    """Do what is not done yet."""
    directory.mkdir(parents=True, exist_ok=True)
    base, text = _prepare(directory)

    def is_meant(name: str) -> bool:
        return not only or name in only

    for name, (bounds, scales) in VARIANTS.items():
        if is_meant(name):
            model = _protected(directory, name, bounds, scales)
            targets = ("codes", "scales", "zeros", *(("bounds",) if bounds else ()))
            _campaign(model, directory / f"rates-{name}.json", targets=targets, text=text, trials=trials)
    if is_meant("bits"):
        _campaign(base, directory / "bits.json", targets=("scales",), sweep="bits", text=text, trials=FEWER)
    for target in TARGETS:
        if is_meant("targets"):
            _campaign(base, directory / f"target-{target}.json", targets=(target,), text=text, trials=FEWER)
    if is_meant("tiny"):
        _tiny(directory, trials)
    if is_meant("clean"):
        _clean(directory)
    if is_meant("load"):
        times = {name: _load_seconds(directory / name) for name in VARIANTS if (directory / name).is_dir()}
        (directory / "load.json").write_text(json.dumps(times))


def _tiny(directory: Path, trials: int) -> None:
    """The embedded model, whose scales are bfloat16: there a flipped exponent is a factor of 2^128."""
    place = directory / "tiny"
    place.mkdir(exist_ok=True)
    if not (place / "none").is_dir():
        quantkit.quantize("tiny", wbits=4, group_size=32, method="rtn", output=place / "none")
    for name in TINY:
        model = _protected(place, name, *VARIANTS[name])
        targets = ("codes", "scales", "zeros", *(("bounds",) if VARIANTS[name][0] else ()))
        _campaign(model, place / f"rates-{name}.json", targets=targets, text="embedded-test", trials=trials)


def _prepare(directory: Path) -> tuple[Path, str]:
    """Quantize, and write what is judged."""
    base, text = directory / "none", directory / "stories.txt"
    if not base.is_dir():
        quantkit.quantize(MODEL, wbits=4, group_size=32, method="gptq", calibration="embedded", seqlen=128, output=base)
    if not text.is_file():
        _write_stories(text, range(4))
    return base, str(text)


def _write_stories(file: Path, seeds: Sequence[int]) -> None:
    """Let the original model write one story for each seed."""
    how = {"max_new_tokens": 120, "temperature": 1.0}
    stories = (quantkit.generate(MODEL, "Once upon a time", seed=seed, **how).strip() for seed in seeds)
    file.write_text("\n".join(stories) + "\n", encoding="utf-8")


def _clean(directory: Path) -> None:
    """Measure what protections cost where there are no faults, on more text than a trial judges."""
    text, found = directory / "clean.txt", {}
    if not text.is_file():
        _write_stories(text, range(100, 124))
    for name in VARIANTS:
        if (directory / name).is_dir():
            where = {"text": text, "seqlen": 128, "bos": True, "runtime": "packed", "device": "cpu"}
            found[name] = quantkit.evaluate(directory / name, **where).perplexity
    (directory / "clean.json").write_text(json.dumps(found))


def _protected(directory: Path, name: str, bounds: str | None, scales: str | None) -> Path:
    """Return a copy of the checkpoint with this protection."""
    copy, partial = directory / name, directory / f"{name}.partial"
    if not copy.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
        bounded = bounds and directory / bounds
        shutil.copytree(bounded if bounded and bounded.is_dir() else directory / "none", partial)
        if bounds and not side_file.path_of(partial).is_file():
            choice = quantkit.Resilience(kind=bounds, **SHORT)
            quantkit.protect(partial, resilience=choice, calibration="self", **CALIBRATION)
        if scales:
            quantkit.protect_scales(partial, scales)
        partial.rename(copy)
    return copy


def _campaign(model: Path, output: Path, *, trials: int, **how: Any) -> None:  # noqa: ANN401  of quantkit.faults
    """Run a campaign unless it is finished."""
    if output.is_file():
        return
    start = time.perf_counter()
    rates = RATES if how.get("sweep") != "bits" else (0.0,)
    quantkit.faults(model, rates=rates, trials=trials, output=output, device="cpu", **WHAT, **how)
    print(f"{output.stem}: {time.perf_counter() - start:.0f} s", flush=True)


def _load_seconds(model: Path) -> float:
    """Return the least CPU time of three loads."""
    taken = []
    for _ in range(3):
        start = time.process_time()
        quantkit.load(model, device="cpu")
        taken.append(time.process_time() - start)
    return min(taken)


def show(directory: Path, figure: Path) -> None:
    """Print the tables, and draw the figure."""
    found = {name: directory / f"rates-{name}.json" for name in VARIANTS}
    results = {name: read_results([file])[0] for name, file in found.items() if file.is_file()}
    seconds = json.loads((directory / "load.json").read_text()) if (directory / "load.json").is_file() else {}
    tiny = {name: directory / "tiny" / f"rates-{name}.json" for name in TINY}
    print("\n".join(_rates_table(results)), end="\n\n")
    print("\n".join(_rates_table({n: read_results([f])[0] for n, f in tiny.items() if f.is_file()})), end="\n\n")
    print("\n".join(_cost_table(directory, results, seconds)), end="\n\n")
    clean = json.loads((directory / "clean.json").read_text()) if (directory / "clean.json").is_file() else {}
    for name, value in clean.items():
        print(f"| {name} | {value:.4f} | {value / clean['none'] - 1:+.2%} |")
    print("\n".join(_bits_table(read_results([directory / "bits.json"])[0])), end="\n\n")
    targets = {name: directory / f"target-{name}.json" for name in TARGETS}
    print("\n".join(_targets_table({n: read_results([f])[0] for n, f in targets.items() if f.is_file()})), end="\n\n")
    for tensor in results["none"]["tensors"][:8]:
        print(f"| `{tensor['tensor']}` | {tensor['flips']:,} | {tensor['harm']:.2f} ± {tensor['error']:.2f} |")
    drawn = [name for name in DRAWN if name in results]
    draw([results[name] for name in drawn], figure, drawn)


def _number(value: float | None) -> str:
    if value is None:
        return "NaN"
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}" if value < 1e6 else f"{value:.0e}"


def _rates_table(results: dict[str, Any]) -> Iterator[str]:
    yield "| protection | without faults | " + " | ".join(f"{rate:g}" for rate in RATES) + " |"
    yield "|---|" + "---:|" * (1 + len(RATES))
    for name, facts in results.items():
        cells = []
        for row in facts["rows"]:
            lost = f" ({row['not_finite']:.0%} NaN)" if row["not_finite"] else ""
            cells.append(f"{_number(row['median'])} / {_number(row['p95'])}{lost}")
        yield f"| {name} | {facts['baseline']:.3f} | " + " | ".join(cells) + " |"


def _cost_table(directory: Path, results: dict[str, Any], seconds: dict[str, float]) -> Iterator[str]:
    """Bytes in the side files against those of the scales, and how often a trial at 1e-5 stays within a tenth."""
    scales = results["none"]["bits"]["scales"] / 8
    yield "| protection | bytes | of the scales | load | trials within 10 % at 1e-6 | 1e-5 | 1e-4 |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for name, facts in results.items():
        files = (path_of(directory / name) for path_of in (scale_file.path_of, side_file.path_of))
        size = sum(file.stat().st_size for file in files if file.is_file())
        good = (
            sum(float(value) <= 1.1 * facts["baseline"] for value in facts["values"][f"{rate:g}"])
            / len(facts["values"][f"{rate:g}"])
            for rate in RATES[1:]
        )
        load = f"{seconds[name]:.2f} s" if name in seconds else ""
        yield f"| {name} | {size:,} | {size / scales:.1%} | {load} | " + " | ".join(f"{s:.0%}" for s in good) + " |"


def _bits_table(facts: dict[str, Any]) -> Iterator[str]:
    yield "| bit | median | worst 5 % | NaN |"
    yield "|---:|---:|---:|---:|"
    for row in facts["rows"]:
        yield (f"| {row['condition']} | {_number(row['median'])} | {_number(row['p95'])} | {row['not_finite']:.0%} |")


def _targets_table(results: dict[str, Any]) -> Iterator[str]:
    yield "| target | bits | " + " | ".join(f"{rate:g}" for rate in RATES) + " |"
    yield "|---|---:|" + "---:|" * len(RATES)
    for name, facts in results.items():
        bits = f"{facts['bits'][name]:,}" if name in facts["bits"] else "passing"
        cells = (
            f"{_number(row['median'])} / {_number(row['p95'])}"
            + (f" ({row['not_finite']:.0%} NaN)" if row["not_finite"] else "")
            for row in facts["rows"]
        )
        yield f"| {name} | {bits} | " + " | ".join(cells) + " |"


def main() -> None:
    """Do what is asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("work", "show"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--only", nargs="*", default=(), help="names of variants, bits, targets or load")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--figure", type=Path, default=Path("docs/resilience.svg"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "work":
        work(args.directory, args.only, args.trials)
    else:
        show(args.directory, args.figure)


if __name__ == "__main__":
    main()
