"""Perplexity of RTN and OmniQuant (LWC) at 4, 3 and 2 bits, in one run, as a Markdown table.

    python scripts/bench/weight_only.py MODEL TRAIN.jsonl TEST.jsonl --group-size 32 --samples 64 --seqlen 256

Every figure is measured on the exported checkpoint, loaded by plain transformers. With --referee SCRIPT the same figure
is measured again by that script (called as SCRIPT DIRECTORY TEXT SEQLEN WINDOWS) and the run stops if the two differ.
"""

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from quantkit import api

TOLERANCE = 1e-3  # between quantkit's perplexity and the referee's


def main() -> None:
    """Measure and print."""
    args = _arguments()
    lines = [
        "| bits | FP | RTN | OmniQuant (LWC) | LWC over RTN | bits per weight | seconds RTN | seconds LWC |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as work:
        full = _perplexity(args.model, args)
        for bits in args.bits:
            figures = {
                method: _run(args, Path(work) / f"{method}-{bits}", bits, method) for method in ("rtn", "omniquant")
            }
            (rtn, bpw, rtn_seconds), (lwc, _, lwc_seconds) = figures["rtn"], figures["omniquant"]
            lines.append(
                f"| W{bits} | {full:.4f} | {rtn:.4f} | **{lwc:.4f}** | {lwc / rtn - 1:+.1%} | {bpw:.2f} "
                f"| {rtn_seconds:.0f} | {lwc_seconds:.0f} |"
            )
            print(lines[-1], file=sys.stderr)
    print("\n".join(lines))
    print(f"\n{platform.processor() or platform.machine()}, {args.threads} threads, torch on the CPU.")


def _run(args: argparse.Namespace, output: Path, bits: int, method: str) -> tuple[float, float, float]:
    start = time.monotonic()
    result = api.quantize(
        args.model,
        output=output,
        method=method,
        wbits=bits,
        group_size=args.group_size,
        calibration=args.train,
        samples=args.samples,
        seqlen=args.seqlen,
        seed=args.seed,
        options={"updates": args.updates} if args.updates is not None and method == "omniquant" else {},
        device="cpu",
    )
    seconds = time.monotonic() - start
    return _perplexity(str(output), args), result.report["bits_per_weight"], seconds


def _perplexity(model: str, args: argparse.Namespace) -> float:
    value = api.evaluate(model, text=args.test, seqlen=args.seqlen, windows=args.windows, device="cpu").perplexity
    if args.referee:
        command = [sys.executable, args.referee, model, args.test, str(args.seqlen), str(args.windows)]
        judged = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        if abs(judged - value) > TOLERANCE * value:
            sys.exit(f"quantkit says {value:.4f} for {model}, the referee {judged:.4f}")
    return value


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--windows", type=int, default=80)
    parser.add_argument("--updates", type=int, help="for each block; default: the paper's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--referee")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    return args


if __name__ == "__main__":
    main()
