"""Faults in a packed model: perplexity against the rate of flipped bits, for every protection.

    python scripts/bench/faults.py work DIRECTORY      # stories15m in the shared folder; goes on where it was cut off
    python scripts/bench/faults.py show DIRECTORY      # the tables of docs/resilience.md

`work` quantizes the model to 4 bits in groups of 32, lets the original write the stories that are judged, protects copies
of the output in each way, and runs a campaign on each: at least 100 trials a rate, the same bits hit in all of them.
"""

import argparse
import json
import os
import shutil
import time
from pathlib import Path

import torch

import quantkit
from quantkit.resilience import scale_file
from quantkit.resilience.scales import SCALE_KINDS

MODEL = Path(os.environ.get("QUANTKIT_SHARED", "shared")) / "models" / "stories15m"
FEWER = 40  # trials of what no claim about protections rests on
BOUNDS = ("ranger", "layer", "neuron", "hybrid")
RATES = (1e-7, 1e-6, 1e-5, 1e-4)
WHAT = {"seqlen": 64, "windows": 2, "bos": True}
SHORT = {"decays": (10.0, 0.1), "epochs": 2}  # of the training of thresholds
CALIBRATION = {"samples": 8, "seqlen": 48}
TARGETS = ("codes", "scales", "zeros", "norms", "embeddings", "kv", "activations")


def variants():
    """Return name → (bounds, protection of scales)."""
    both = {"hybrid+secded": ("hybrid", "secded"), "hybrid+secded64": ("hybrid", "secded64")}
    return {"none": (None, None), **{s: (None, s) for s in SCALE_KINDS}, **{b: (b, None) for b in BOUNDS}, **both}


def prepare(directory):
    """Quantize, and write what is judged."""
    base, text = directory / "none", directory / "stories.txt"
    if not base.is_dir():
        quantkit.quantize(MODEL, wbits=4, group_size=32, method="gptq", calibration="embedded", seqlen=128, output=base)
    if not text.is_file():
        stories = (
            quantkit.generate(MODEL, "Once upon a time", max_new_tokens=120, temperature=1.0, seed=s) for s in range(4)
        )
        text.write_text("\n".join(story.strip() for story in stories) + "\n", encoding="utf-8")
    return base, str(text)


def protected(directory, base, name, bounds, scales):
    """Return a copy of the checkpoint with this protection."""
    copy = directory / name
    if not copy.is_dir():
        partial = directory / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(base, partial)
        if bounds:
            quantkit.protect(partial, resilience=quantkit.Resilience(kind=bounds, **SHORT), calibration="self", **CALIBRATION)
        if scales:
            scale_file.write(partial, scales)
        partial.rename(copy)
    return copy


def load_seconds(model):
    """Return the least of five loads."""
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        quantkit.load(model, device="cpu")
        taken.append(time.perf_counter() - start)
    return min(taken)


def work(directory, names, trials):
    directory.mkdir(parents=True, exist_ok=True)
    base, text = prepare(directory)
    for name, (bounds, scales) in variants().items():
        if names and name not in names:
            continue
        model = protected(directory, base, name, bounds, scales)
        targets = ("codes", "scales", "zeros", *(("bounds",) if bounds else ()))
        campaign(model, directory / f"rates-{name}.json", targets=targets, text=text, trials=trials)
    if not names or "bits" in names:
        campaign(base, directory / "bits.json", targets=("scales",), sweep="bits", text=text, trials=FEWER)
    for target in TARGETS:
        if not names or "targets" in names:
            campaign(base, directory / f"target-{target}.json", targets=(target,), text=text, trials=FEWER)
    if not names or "load" in names:
        times = {name: load_seconds(directory / name) for name in variants() if (directory / name).is_dir()}
        (directory / "load.json").write_text(json.dumps(times))


def campaign(model, output, *, trials, **how):
    """Run a campaign unless it is finished."""
    if output.is_file():
        return
    start = time.perf_counter()
    rates = RATES if how.get("sweep") != "bits" else (0.0,)
    quantkit.faults(model, rates=rates, trials=trials, output=output, device="cpu", **WHAT, **how)
    print(f"{output.stem}: {time.perf_counter() - start:.0f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("work", "show"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--only", nargs="*", default=(), help="names of variants, bits, targets or load")
    parser.add_argument("--trials", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "work":
        work(args.directory, args.only, args.trials)


if __name__ == "__main__":
    main()
