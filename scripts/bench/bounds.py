"""What bounds on activations cost where nothing is faulty: perplexity, bytes, time, and the work of finding them.

    python scripts/bench/bounds.py MODEL TRAIN TEST --samples 24 --seqlen 256 --windows 40 --threads 1

MODEL is rounded to 4 bits in groups of 32 first, run packed, and judged on a text that no threshold was found or
accepted on. Times are processor time of the same windows with bounds over that without, in turns, in one process.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from common import Figures, cell, markdown, parser
from common import machine as name_machine

import quantkit
from quantkit.calibrate.data import evaluation_windows, load_tokenizer
from quantkit.calibrate.text import read_text
from quantkit.evaluation.perplexity import perplexity
from quantkit.runtime import packed_model

ROWS = (
    *(("ranger", "profiled"), ("layer", "progressive"), ("layer", "joint")),
    *(("neuron", "progressive"), ("hybrid", "progressive"), ("hybrid", "joint")),
)
TURNS = 3


def packed(args: argparse.Namespace) -> Path:
    """Return the packed model, made if it is not there."""
    output: Path = args.work / "w4g32"
    if not output.exists():
        quantkit.quantize(args.model, output=output, method="rtn", wbits=4, group_size=32, device=args.device)
    return output


def one(args: argparse.Namespace, kind: str, method: str) -> Figures:
    """Protect a copy of the model in one way, and judge it beside the model without bounds."""
    with tempfile.TemporaryDirectory() as directory:
        copy = shutil.copytree(packed(args), Path(directory) / "model")
        start = time.process_time()
        text = {"calibration": args.train, "samples": args.samples, "seqlen": args.seqlen}
        facts = quantkit.protect(copy, resilience=kind, method=method, device=args.device, **text).facts
        found = time.process_time() - start
        rows = evaluation_windows(
            read_text(args.test), load_tokenizer(copy), seqlen=args.seqlen, windows=args.windows, bos=False
        )
        bare, bounded = (packed_model.load(copy, device=args.device, bounds=bounds) for bounds in (False, True))
        seconds = {id(model): 0.0 for model in (bare, bounded)}
        for _ in range(TURNS):
            for model in (bare, bounded):
                start = time.process_time()
                perplexity(model, rows)
                seconds[id(model)] += time.process_time() - start
        return {
            "without": perplexity(bare, rows).perplexity,
            "perplexity": perplexity(bounded, rows).perplexity,
            "damage": facts["damage"],
            "bytes": facts["bytes"],
            "time": seconds[id(bounded)] / seconds[id(bare)],
            "cpu_seconds": found,
        }


def main() -> None:
    """Compute what is missing, print the table."""
    made = parser(__doc__)
    made.add_argument("--rows", nargs="+", choices=[f"{kind}-{method}" for kind, method in ROWS], help="default: all")
    args = made.parse_args()
    machine = name_machine(args)
    key = {name: str(getattr(args, name)) for name in ("model", "train", "test", "samples", "seqlen", "windows")}
    shown = []
    for kind, method in ROWS:
        name = f"{kind}-{method}"
        if args.rows and name not in args.rows:
            continue
        found = cell(args, f"bounds-{name}", key, lambda k=kind, m=method: one(args, k, m))
        if found:
            change = f"{found['perplexity']:.4f} ({found['perplexity'] / found['without'] - 1:+.2%})"
            held_out, seconds = f"{found['damage']:+.2f} %", f"{found['cpu_seconds']:.0f}"
            shown.append((kind, method, change, held_out, f"{found['bytes']:,}", f"{found['time']:.2f}", seconds))
    print(markdown(("bounds", "method", "perplexity", "held out", "bytes", "time", "CPU s to find"), shown))
    print(f"\n{machine}.")


if __name__ == "__main__":
    sys.exit(main())
