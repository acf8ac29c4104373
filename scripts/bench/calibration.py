"""Time of an update of the learned methods over forward and backward of the same dense block with the same loss.

    python scripts/bench/calibration.py --threads 1 --processor-time
    python scripts/bench/calibration.py --hidden 1024 --mlp 2816 --heads 16 --tokens 1024
    python scripts/bench/calibration.py --gpu-7b --device cuda

One run, interleaved: a few dense steps, a few updates of each method, over and over; medians. The updates are those
that `OmniQuant.apply` makes of a Llama block with random weights, optimizer included; the dense step has the gradients
of all its parameters, as training needs them, and no optimizer. --processor-time counts what the process got of the
processor, not what the clock shows: for machines that others use too, with one thread.

--gpu-7b calibrates one block of LLaMA-2-7B's shape on 128 x 2048 tokens, 20 times each, in batches of --batch
sequences, and prints the time of 32 such blocks and the peak memory beside what OmniQuant's paper reports (arXiv
2308.13137, table A1). Without a GPU it says so and measures the small shape.
"""

import argparse
import copy
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import machine, markdown, parser
from random_llama import write

from quantkit.calibrate.engine import Engine
from quantkit.calibrate.passes import Window
from quantkit.calibrate.record import record
from quantkit.core.scheme import UNQUANTIZED, QuantScheme
from quantkit.model.checkpoint import Checkpoint
from quantkit.model.device import native_bfloat16
from quantkit.model.skeleton import Skeleton
from quantkit.quantizers.omniquant import OmniQuant

DROPPED = 2  # the first updates of an `apply`: the optimizer makes its state
EPOCHS, SEQUENCES, LAYERS = 20, 128, 32  # of --gpu-7b


@dataclass(frozen=True)
class Shape:
    """A block and the tokens of an update: `batch` sequences of `tokens`, of which there are `batches`."""

    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    tokens: int
    batch: int
    batches: int = 2

    def __str__(self) -> str:
        heads = f"{self.heads} heads" + (f" ({self.kv_heads} kv)" if self.kv_heads != self.heads else "")
        return f"{self.hidden}/{self.mlp}, {heads}, {self.batch} × {self.tokens} tokens"


@dataclass(frozen=True)
class Row:
    """A method: its hyper-parameters, whether activations have 4 bits, the goal of its ratio, None without one."""

    name: str
    options: Mapping[str, Any]
    activations: bool = False
    goal: float | None = None


SMALL = Shape(288, 768, 6, 6, 256, 8)  # stories15m's
MEDIUM = Shape(1024, 2816, 16, 16, 1024, 1)
LLAMA_7B = Shape(4096, 11008, 32, 32, 2048, 8, SEQUENCES // 8)
ROWS = [
    Row("LWC", {"let": False}, goal=1.25),
    Row("LWC + LET", {"let": True}, goal=1.5),
    Row("LWC + LET, W4A4", {"let": True}, activations=True),
    Row("LWC + rounding", {"let": False, "rounding": True}),
]


def make_window(shape: Shape, args: argparse.Namespace, *, activations: bool) -> Window:
    """Return a window of one block with random weights and random tokens before it; its targets are its own output."""
    with tempfile.TemporaryDirectory() as directory:
        path, device = Path(directory), torch.device(args.device)
        write(path, 1, shape.hidden, inner=shape.mlp, heads=shape.heads, kv_heads=shape.kv_heads)
        skeleton, checkpoint = Skeleton(path), Checkpoint(path)
        scheme = QuantScheme(group_size=args.group_size or None, activation_bits=4 if activations else UNQUANTIZED)
        schemes = {skeleton.module_name(0, name): scheme for name in skeleton.block_linears(0)}
        engine = Engine(
            skeleton=skeleton,
            checkpoint=checkpoint,
            passes=[],
            schemes=schemes,
            scale_dtype=torch.bfloat16,
            device=device,
        )
        generator = torch.Generator().manual_seed(0)
        batches = torch.randint(1000, (shape.batches, shape.batch, shape.tokens), generator=generator)
        with engine.outer_weights():
            recording = record(skeleton, list(batches), device)
        block = engine.load(0)
    inputs = [hidden.to(engine.storage) for hidden in recording.hidden]
    window = Window(
        blocks=[block], inputs=inputs, references=[[]], arguments=recording.arguments, device=device, amp=_amp(args)
    )
    with torch.no_grad():
        targets = [window.forward(batch).to(engine.storage) for batch in range(len(inputs))]
    return replace(window, references=[targets], error_rtn=float("inf"), amp=False)


def dense_step(window: Window, args: argparse.Namespace) -> Callable[[], float]:
    """Return what measures one forward and backward of the dense block, in seconds."""
    block = copy.copy(window.blocks[0])
    block.module = copy.deepcopy(block.module).requires_grad_()
    dense = replace(window, blocks=[block], amp=_amp(args))

    def step() -> float:
        block.module.zero_grad(set_to_none=True)
        start = _now(args)
        output = dense.forward(0).float()
        (output - dense.targets[0].to(output)).square().mean().backward()
        return _now(args) - start

    return step


def updates(window: Window, method: OmniQuant, args: argparse.Namespace) -> list[float]:
    """Return the seconds of each update that the method makes, without the first ones; the window is then as before."""
    stamps: list[float] = []
    block, before = window.blocks[0], {}
    for name, parameter in block.module.named_parameters():
        before[name] = parameter.data
    fresh = replace(window, notes={}, tick=lambda _: stamps.append(_now(args)))
    method.apply(fresh)
    if {"fallback", "diverged"} & set(fresh.notes):
        sys.exit(f"the run does not count: {fresh.notes}")
    for name, parameter in block.module.named_parameters():
        parameter.data = before[name]
    for site in block.sites:
        site.learned = site.quantized = None
    return [later - earlier for earlier, later in itertools.pairwise(stamps)][DROPPED - 1 :]


def compare(shape: Shape, args: argparse.Namespace) -> list[list[str]]:
    """Return the table's rows of one shape."""
    windows = {row.name: make_window(shape, args, activations=row.activations) for row in ROWS}
    dense = dense_step(windows["LWC"], args)
    times: dict[str, list[float]] = {row.name: [] for row in ROWS}
    plain = [dense() for _ in range(DROPPED)][:0]
    for repeat in range(args.repeats):
        for row in ROWS:
            method = OmniQuant(updates=args.updates + DROPPED, amp=args.amp, **row.options)
            plain += [dense() for _ in range(args.updates)]
            times[row.name] += updates(windows[row.name], method, args)
        print(f"{shape}: repeat {repeat + 1} of {args.repeats}", file=sys.stderr, flush=True)
    base = statistics.median(plain)
    rows = [[str(shape), "dense forward and backward", f"{base * 1e3:.1f}", "1", ""]]
    return rows + [[str(shape), *line(row, statistics.median(times[row.name]), base)] for row in ROWS]


def line(row: Row, seconds: float, base: float) -> list[str]:
    """Return a row of the table: milliseconds, the ratio, and the goal with whether it is met."""
    ratio = seconds / base
    goal = "" if row.goal is None else f"≤ {row.goal} {'met' if ratio <= row.goal else 'missed'}"
    return [row.name, f"{seconds * 1e3:.1f}", f"{ratio:.2f}", goal]


def whole_7b(args: argparse.Namespace) -> str:
    """Calibrate one block of LLaMA-2-7B's shape as long as the paper does; return the table."""
    shape = replace(LLAMA_7B, batch=args.batch or LLAMA_7B.batch)
    shape = replace(shape, batches=SEQUENCES // shape.batch)
    rows = []
    for name, activations, paper in (("LWC, W4A16", False, "1.1"), ("LWC + LET, W4A4", True, "1.6")):
        window = make_window(shape, args, activations=activations)
        torch.cuda.reset_peak_memory_stats(args.device)
        count = min(args.updates, EPOCHS * shape.batches)
        method = OmniQuant(updates=count + DROPPED, let=activations)
        seconds = statistics.median(updates(window, method, args))
        block = seconds * EPOCHS * shape.batches
        peak = torch.cuda.max_memory_allocated(args.device) / 1e9
        figures = f"{seconds * 1e3:.1f}", str(EPOCHS * shape.batches), f"{block:.1f}", f"{block * LAYERS / 60:.1f}"
        rows.append([name, *figures, f"{peak:.1f}", paper])
    header = "method, ms an update, updates, s a block, min of 32 blocks, peak GB, OmniQuant's hours (A100-80G)"
    return f"{shape}, {EPOCHS} epochs of {SEQUENCES} sequences\n\n" + markdown(header.split(", "), rows)


def profile(shape: Shape, args: argparse.Namespace) -> None:
    """Print for each method which operations its updates spend their time in."""
    for row in ROWS:
        window = make_window(shape, args, activations=row.activations)
        with torch.profiler.profile() as found:
            OmniQuant(updates=5, amp=args.amp, **row.options).apply(window)
        print(f"\n{row.name}\n{found.key_averages().table(sort_by='self_cpu_time_total', row_limit=25)}")


def _amp(args: argparse.Namespace) -> bool:
    return args.amp and native_bfloat16(torch.device(args.device))


def _now(args: argparse.Namespace) -> float:
    if torch.device(args.device).type == "cuda":
        torch.cuda.synchronize(args.device)
    return time.process_time() if args.processor_time else time.perf_counter()


def main() -> None:
    """Measure and print."""
    made = parser(__doc__, text=False)
    for name in ("hidden", "mlp", "heads", "kv-heads", "tokens", "batch"):
        made.add_argument(f"--{name}", type=int, help="without --hidden: stories15m's shape and a medium one")
    made.add_argument("--group-size", type=int, default=32, help="0: one scale per row")
    made.add_argument("--updates", type=int, default=6, help="that are timed in each repeat")
    made.add_argument("--repeats", type=int, default=4)
    made.add_argument("--amp", action="store_true", help="matrix products in bfloat16, as GPUs always have them")
    made.add_argument("--processor-time", action="store_true", help="instead of the clock's; with one thread")
    made.add_argument("--gpu-7b", action="store_true")
    made.add_argument("--profile", action="store_true", help="print where the time goes instead")
    args = made.parse_args()
    if args.processor_time and (args.threads > 1 or torch.device(args.device).type == "cuda"):
        made.error("--processor-time means something only with --threads 1 on a CPU")
    where = machine(args)
    if args.gpu_7b and torch.device(args.device).type == "cuda":
        print(f"{whole_7b(args)}\n\n{where}")
        return
    if args.gpu_7b:
        print("There is no GPU here (--device cuda), so this is the small shape.\n")
    shapes = _shapes(args)
    if args.profile:
        profile(shapes[0], args)
        return
    rows = [row for shape in shapes for row in compare(shape, args)]
    print(markdown(["shape", "update", "ms", "ratio", "goal"], rows))
    kind = "bfloat16" if _amp(args) or torch.device(args.device).type == "cuda" else "float32"
    print(f"\nW4 g{args.group_size}, matrix products in {kind}. {where}")


def _shapes(args: argparse.Namespace) -> list[Shape]:
    if args.hidden is None:
        return [SMALL] if args.gpu_7b else [SMALL, MEDIUM]
    heads = args.heads or args.hidden // 64
    mlp = args.mlp or args.hidden * 11 // 4
    return [Shape(args.hidden, mlp, heads, args.kv_heads or heads, args.tokens or 1024, args.batch or 1)]


if __name__ == "__main__":
    main()
