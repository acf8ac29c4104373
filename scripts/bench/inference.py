"""Packed inference on a CPU beside dense weights, torch's operator for 4 bits, numba and llama.cpp.

    python scripts/bench/inference.py --threads 1 2
    python scripts/bench/inference.py --no-layer --threads 1 2 --model OUT --original MODEL \
        --gguf OUT/gguf/model.gguf --llama-python LLAMA_ENV/bin/python

The first prints, for one layer and one token, how much of the machine's read bandwidth each kernel reaches, and how
long prompts take; times are the best of many, the kernels taking turns. Weights lie in memory and not in a cache: there
are 128 MiB of copies of each. The second prints tokens per second and the memory of a whole model, each run a process
of its own: a quantkit checkpoint, its original dense, and its GGUF file in an environment that has llama-cpp-python.
numba and llama-cpp-python are optional: what is not installed is said in its row.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from common import machine, markdown
from inference_kernels import Candidate, candidates
from torch import Tensor

from quantkit.model.checkpoint import BYTES, Checkpoint

HERE = Path(__file__).resolve().parent
READ, READING = 2**28, "read"  # bytes that are summed to measure the read bandwidth, which takes turns with kernels
PROMPTS = 16, 64, 256
DTYPES = torch.float32, torch.bfloat16
NAMES = {"ours": "ours, packed", "bfloat16": "transformers, bfloat16", "float32": "transformers, float32"}
Times = dict[str, float]


def layer(args: argparse.Namespace) -> str:
    """Return the tables of one layer."""
    out, width = args.layer
    found = candidates(out, width, args.group_size, torch.get_num_threads())
    token = torch.randn(1, width, generator=torch.Generator().manual_seed(1))
    present = [each for each in found if not each.absent]
    errors = {each.name: each.error(token) for each in present}  # and compiles what is compiled on first use
    best = dict.fromkeys([READING, *(each.name for each in present)], float("inf"))
    values = torch.ones(READ // 4)
    for _ in range(args.repeats):
        best[READING] = min(best[READING], *(_seconds(values.sum) for _ in range(3)))
        for each in present:
            inputs = token.to(each.dtype)
            each(inputs)
            seconds = [_seconds(lambda: [each(inputs) for _ in range(each.rounds)]) for _ in range(3)]  # noqa: B023
            best[each.name] = min(best[each.name], min(seconds) / each.rounds)
    read = READ / best[READING]
    rows = [_row(each, best, errors, read) for each in found]
    header = ["one token", "MB", "ms", "GB/s", "of read bandwidth", "speed, dense bfloat16 = 1", "largest error"]
    sizes = f"{out} × {width}, groups of {args.group_size}; reading memory: {read / 1e9:.1f} GB/s\n\n"
    return sizes + markdown(header, rows) + "\n\n" + prompts(present, args)


def _row(each: Candidate, best: Times, errors: Times, read: float) -> list[str]:
    if each.absent:
        return [each.name, each.absent, *["–"] * 5]
    seconds = best[each.name]
    rate = each.size / seconds
    figures = f"{each.size / 1e6:.1f}", f"{seconds * 1e3:.2f}", f"{rate / 1e9:.1f}", f"{rate / read:.0%}"
    return [each.name, *figures, f"{best['dense bfloat16'] / seconds:.2f}", f"{errors[each.name]:.0e}"]


def prompts(found: Sequence[Candidate], args: argparse.Namespace) -> str:
    """Return the table of several tokens: milliseconds, and the ratio to the dense product of the same activations."""
    dense = {each.dtype: each for each in found if each.name.startswith("dense")}
    ours = [each for each in found if each.name.startswith("ours, C++")]
    columns = [(tokens, dtype) for dtype in DTYPES for tokens in PROMPTS]
    cells: dict[str, list[str]] = {name: [] for name in ("dense", *(each.name for each in ours))}
    for tokens, dtype in columns:
        inputs = torch.randn(tokens, args.layer[1]).to(dtype)
        best = _alternating({"dense": dense[dtype], **{each.name: each for each in ours}}, inputs, args.repeats)
        for name, seconds in best.items():
            cells[name].append(f"{seconds * 1e3:.1f} ({seconds / best['dense']:.2f})")
    header = ["ms (ratio to dense)", *(f"{tokens}, {str(dtype).removeprefix('torch.')}" for tokens, dtype in columns)]
    return markdown(header, [[name, *row] for name, row in cells.items()])


def _alternating(found: dict[str, Candidate], inputs: Tensor, repeats: int) -> Times:
    best = dict.fromkeys(found, float("inf"))
    for each in found.values():
        each.dtype = inputs.dtype
        each(inputs)
    for _ in range(repeats):
        for name, each in found.items():
            best[name] = min(best[name], _seconds(lambda: each(inputs)), _seconds(lambda: each(inputs)))  # noqa: B023
    return best


def whole_model(args: argparse.Namespace) -> str:
    """Return the table of a whole model, for each number of threads."""
    kinds = [("ours", args.model, sys.executable)]
    if args.original:
        kinds += [(kind, args.original, sys.executable) for kind in args.dense]
    if args.gguf:
        kinds.append(("llama.cpp", args.gguf, args.llama_python))
    rows = []
    for threads in args.threads:
        best: dict[str, Times] = {}
        for _ in range(args.rounds):
            for kind, path, python in kinds:
                _keep(best.setdefault(kind, {}), _measured(kind, path, python, threads))
        for kind, figures in best.items():
            speeds = [f"{figures[name]:.1f}" if figures else "–" for name in ("decode", "generate", "prompt")]
            sizes = [f"{figures[name] / 1e6:.0f}" if figures else "–" for name in ("weights", "resident")]
            rows.append([NAMES.get(kind, kind), str(threads), *speeds, *sizes])
    header = ["", "threads", "decode", "generate", "prompt", "weights, MB", "resident, MB"]
    stored = sum(info.elements * BYTES[info.dtype] for info in Checkpoint(args.model).tensors.values())
    held = best["ours"]["weights"] / stored
    note = f"Tokens per second. Weights of ours over the tensors of the checkpoint ({stored / 1e6:.0f} MB): {held:.3f}"
    return markdown(header, rows) + f"\n\n{note}"


def _keep(best: Times, found: Times) -> None:
    for name, value in found.items():
        best[name] = max(best.get(name, 0), value)


def _measured(kind: str, path: Path, python: str, threads: int) -> Times:
    """Return the figures of one process; none where its runtime is not installed."""
    command = [python, str(HERE / "inference_process.py"), kind, str(path), "--threads", str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode and "No module named 'llama_cpp'" in done.stderr:
        print("llama-cpp-python is not installed; see --llama-python", file=sys.stderr)
        return {}
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    figures: Times = json.loads(done.stdout.splitlines()[-1])
    print(kind, threads, figures, file=sys.stderr, flush=True)
    return figures


def _seconds(call) -> float:  # noqa: ANN001
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="a table for each")
    made.add_argument("--layer", type=int, nargs=2, default=(4096, 4096), metavar=("OUT", "IN"))
    made.add_argument("--no-layer", action="store_true", help="leave the tables of one layer out")
    made.add_argument("--group-size", type=int, default=128)
    made.add_argument("--repeats", type=int, default=8, help="turns of each kernel; the best counts")
    made.add_argument("--model", type=Path, help="a packed checkpoint, for the table of a whole model")
    made.add_argument("--original", type=Path, help="the model it was made from")
    made.add_argument("--dense", nargs="+", default=("bfloat16", "float32"), help="dtypes in which the original is run")
    made.add_argument("--gguf", type=Path, help="the same weights for llama.cpp")
    made.add_argument("--llama-python", default=sys.executable, help="the interpreter that has llama-cpp-python")
    made.add_argument("--rounds", type=int, default=2, help="processes of each runtime; the best counts")
    args = made.parse_args()
    for threads in [] if args.no_layer else args.threads:
        print(f"\n{_machine(threads)}; {layer(args)}", flush=True)
    if args.model:
        print(f"\n{whole_model(args)}. {_machine(args.threads[-1])}")


def _machine(threads: int) -> str:
    return machine(argparse.Namespace(device="cpu", threads=threads))


if __name__ == "__main__":
    main()
