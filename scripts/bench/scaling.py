"""Several processes and machines: measured on CPUs, and computed for models and GPUs that are not at hand.

    python scripts/bench/scaling.py measure --processes 1 2 4
    python scripts/bench/scaling.py streams
    python scripts/bench/scaling.py paper

`measure` quantizes the embedded model with 1, 2 and 4 gloo processes of one thread: time by the clock and of the
first process's CPU, bytes that each gives to collectives, and the outputs held against those of one process;
`swapped` is one process that gets the sequences of every batch in another order, for comparison. `streams` lets GPTQ
take its second moments from the original model's hidden states, as it would have to if blocks were given to processes
whole. `paper` computes time, memory, disk and network of large models from the sizes of their configurations, the
counts of `quantkit.costs` and `MACHINE`.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig

from quantkit import api, costs, material, pipeline
from quantkit.calibrate.passes import Window
from quantkit.calibrate.team import Team
from quantkit.model.skeleton import Skeleton
from quantkit.quantizers.gptq import GPTQ
from quantkit.recipe import Recipe, with_changes
from quantkit.workload import Workload, workload

RUNS = {
    "rtn": {"method": "rtn"},
    "gptq": {"method": "gptq"},
    "awq": {"method": "awq"},
    "balanced": {"preset": "balanced", "options": {"updates": 50, "distill.updates": 12}},
}
TEXT = {"calibration": "embedded", "samples": 32, "batch_size": 8, "seqlen": 128}


def main() -> None:
    """Do what is asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["measure", "streams", "paper", "work"])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=RUNS)
    parser.add_argument("--output", type=Path, help="of work, which measure starts")
    args = parser.parse_args()
    if args.what == "measure":
        measure(args.runs, args.processes)
    elif args.what == "streams":
        streams()
    elif args.what == "paper":
        paper()
    else:
        work(args.runs[0], args.output, swapped=args.processes == [0])


def measure(runs: list[str], processes: list[int]) -> None:
    """Print one row for each run and number of processes."""
    print(
        "| | processes | seconds | of the CPU | per process sent | last block's error | codes as of one | perplexity |"
    )
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        for run in runs:
            for count in [1, *(["swapped"] if run == "balanced" else []), *(n for n in processes if n > 1)]:
                output = Path(directory) / f"{run}-{count}"
                seconds, used, sent = _start(
                    run, output, 1 if count == "swapped" else count, swapped=count == "swapped"
                )
                report = json.loads((output / "report.json").read_text())
                found = api.evaluate(output, text="embedded-test", seqlen=128, windows=64, device="cpu")
                share = _same_codes(output, Path(directory) / f"{run}-1")
                cells = [
                    run,
                    count,
                    f"{seconds:.1f}",
                    f"{used:.1f}",
                    f"{sent / 1e6:.1f} MB",
                    f"{report['blocks'][-1]['error']:.4e}",
                ]
                print(f"| {' | '.join(map(str, cells))} | {share:.2%} | {found.perplexity:.4f} |", flush=True)


def work(run: str, output: Path, *, swapped: bool) -> None:
    """Be one of the processes of a run; the first prints seconds and the bytes that it gave to collectives."""
    torch.set_num_threads(1)
    recipe = api.make_recipe("tiny", wbits=3, group_size=32, **TEXT, **RUNS[run])
    with Team.join() as team, _counted() as sent:
        prepared = pipeline.prepare(recipe, "cpu", team=team)
        started, used = time.perf_counter(), time.process_time()
        if swapped:
            material._calibration = _turned(material._calibration, recipe.calibration.batch_size)
        pipeline.execute(prepared, output)
        if team.leads:
            print(json.dumps([time.perf_counter() - started, time.process_time() - used, sum(sent)]))


def _turned(calibration: Callable[..., torch.Tensor], rows: int) -> Callable[..., torch.Tensor]:
    """Return what gives the sequences of every batch the other way round."""
    return lambda *given: torch.cat([batch.flip(0) for batch in calibration(*given).split(rows)])


def _start(run: str, output: Path, count: int, *, swapped: bool) -> list[float]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, __file__, "work", "--runs", run, "--output", str(output)]
    command += ["--processes", "0"] if swapped else []
    started = [
        subprocess.Popen(command, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE)
        for rank in range(count)
    ]
    texts = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        sys.exit(f"a process of {run} failed")
    return json.loads(texts[0])


@contextmanager
def _counted() -> Iterator[list[int]]:
    """Count the bytes of the tensors that are given to collectives."""
    sent: list[int] = []
    originals = {name: getattr(dist, name) for name in ("all_reduce", "broadcast")}

    def counting(call: Callable[..., object], tensor: torch.Tensor, *rest: object) -> object:
        sent.append(tensor.numel() * tensor.element_size())
        return call(tensor, *rest)

    for name, original in originals.items():
        setattr(dist, name, partial(counting, original))
    yield sent
    for name, original in originals.items():
        setattr(dist, name, original)


def _same_codes(output: Path, other: Path) -> float:
    from safetensors.torch import load_file

    same = total = 0
    for file in sorted(output.glob("*.safetensors")):
        reference = load_file(other / file.name)
        for name, tensor in load_file(file).items():
            same, total = same + int(tensor.eq(reference[name]).sum()), total + tensor.numel()
    return same / total


class OnReference(GPTQ):
    """GPTQ whose second moments are those of the original model's hidden states."""

    def apply(self, window: Window) -> None:
        """Round with them; the block's error is that on the actual stream all the same."""
        before = list(PREVIOUS) or window.inputs
        solved = self.solve(replace(window, inputs=before))
        for site in window.sites:
            site.quantized = solved[site.name][0]
        PREVIOUS[:] = window.targets


PREVIOUS: list[torch.Tensor] = []


def streams() -> None:
    """Print perplexities of GPTQ on the actual stream, as it is, and on the reference stream."""
    torch.set_num_threads(1)
    print("| bits | second moments of | last block's error | perplexity |")
    print("|---|---|---|---|")
    for bits in (4, 3, 2):
        for stream in ("actual stream, as quantkit does", "reference stream, whole blocks in parallel"):
            PREVIOUS.clear()
            recipe = api.make_recipe("tiny", wbits=bits, group_size=32, method="gptq", **TEXT)
            method = OnReference() if stream.startswith("reference") else GPTQ()
            with tempfile.TemporaryDirectory() as output, _passes(method):
                report = pipeline.execute(pipeline.prepare(recipe, "cpu"), Path(output) / "out")
                found = api.evaluate(Path(output) / "out", text="embedded-test", seqlen=128, device="cpu")
            print(f"| {bits} | {stream} | {report['blocks'][-1]['error']:.4e} | {found.perplexity:.4f} |", flush=True)


@contextmanager
def _passes(method: GPTQ) -> Iterator[None]:
    original = Recipe.build_passes
    Recipe.build_passes = lambda recipe: {"gptq": method}  # noqa: ARG005
    yield
    Recipe.build_passes = original


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a GPU and what surrounds it do in a second, in bytes and operations."""

    matrix: float = 0.4 * 989e12  # H100 SXM, bfloat16 without sparsity (NVIDIA's data sheet), 40 % of it reached
    memory: float = 0.8 * 3.35e12  # its HBM3 (data sheet), 80 % of it reached
    device_bytes: float = 80e9
    launch: float = 5e-6  # seconds of the smallest operation, started from Python
    inside: float = 0.7 * 450e9  # NVLink of the 8 GPUs of a machine, one direction (data sheet), 70 % of it reached
    outside: float = 0.7 * 50e9  # one 400 Gbit/s InfiniBand port for each GPU (DGX H100), 70 % of it reached
    disk: float = 5e9  # reading from NVMe, for a machine
    writing: float = 2e9  # writing to it
    gpus: int = 8  # in a machine


MACHINE = Machine()
MODELS = {
    "Llama-2-7B": (4096, 11008, 32, 32, 32, 32000),
    "Llama-2-70B": (8192, 28672, 80, 64, 8, 32000),
    "Llama-3.1-405B": (16384, 53248, 126, 128, 8, 128256),
}
PAPER = {"rtn": {}, "fast (gptq)": {"preset": "fast"}, "balanced": {"preset": "balanced"}, "best": {"preset": "best"}}
GPUS = (1, 8, 64)


def paper() -> None:
    """Print a table for each model."""
    for model, shape in MODELS.items():
        skeleton = _skeleton(shape)
        print(f"\n{model}\n")
        print("| | " + " | ".join(f"time, {gpus} GPU{'s' * (gpus > 1)}" for gpus in GPUS), end="")
        print(" | GPU memory, 1 and 8 | host memory | read, written | network per GPU, 8 and 64 |")
        print("|---|---|---|---|---|---|---|---|")
        for name, how in PAPER.items():
            print(f"| {name} | {' | '.join(_cells(skeleton, how))} |")


def _cells(skeleton: Skeleton, how: dict[str, Any]) -> list[str]:
    recipe = _recipe(how)
    base = workload(skeleton, recipe, torch.device("cuda"))
    source = skeleton_bytes(base)
    packed = base.blocks * (0.5 * base.block_parameters + 2.5 * base.block_scales) + 2 * base.outer_parameters
    shared = {gpus: split(base, gpus) for gpus in GPUS}
    times = [_hours(seconds(skeleton, shared[gpus], gpus, packed)) for gpus in GPUS]
    memory = [costs.device_memory(shared[gpus]) for gpus in (1, 8)]
    marked = " / ".join(
        f"{'**' if each > MACHINE.device_bytes else ''}{_giga(each)}{'**' if each > MACHINE.device_bytes else ''}"
        for each in memory
    )
    sent = " / ".join(_giga(traffic(skeleton, shared[gpus], gpus)) for gpus in (8, 64))
    host = costs.host_memory(base, costs.stream_bytes(base)) - costs.host.resident_memory()
    return [*times, marked, _giga(host), f"{_giga(source)}, {_giga(packed)}", sent]


def _recipe(how: dict[str, Any]) -> Recipe:
    recipe = api.make_recipe("model", wbits=4, group_size=128, **(how or {"method": "rtn"}))
    return with_changes(recipe, {"samples": 128, "seqlen": 2048, "batch_size": 8})


def split(base: Workload, gpus: int) -> Workload:
    """Return what one of several GPUs has to do: its rows of batches of 8, or of as many as there are GPUs."""
    whole = max(base.batch_size, gpus)
    columns = base.block_columns
    if gpus >= 3 and base.hessian:  # query, key and value at the same time, gate and up too: 3 widths and the inner one
        columns = 3 * base.width + base.hessian
    return replace(base, samples=base.samples // gpus, batch_size=whole // gpus, block_columns=columns)


def seconds(skeleton: Skeleton, work: Workload, gpus: int, packed: float) -> float:
    """Return the seconds of a run on so many GPUs: computing, sending, reading and writing, one after the other."""
    sweep = 8 / MACHINE.memory  # a float32 number is read and written
    computing = costs.duration(work, costs.Speed(rate=MACHINE.matrix, sweep=sweep, call=MACHINE.launch))
    sending = traffic(skeleton, work, gpus) / (MACHINE.inside if gpus <= MACHINE.gpus else MACHINE.outside)
    reading = 2 * skeleton_bytes(work) / MACHINE.disk  # to be verified, and block by block
    files = reading + packed / MACHINE.writing
    return computing + sending + files


def traffic(skeleton: Skeleton, work: Workload, gpus: int) -> float:
    """Return the bytes that each GPU sends, of reductions in a ring and of broadcasts."""
    if gpus == 1:
        return 0.0
    ring = 2 * (gpus - 1) / gpus
    text = skeleton.config.get_text_config()
    codes = work.block_parameters + 3 * work.block_scales
    each = codes + 4 * work.updates * work.trained * ring  # gradients of every update
    if work.hessian:
        inputs = 3 * text.hidden_size**2 + text.intermediate_size**2  # of qkv, o, gate and up, down
        each += 4 * inputs * ring + codes + 4 * work.block_parameters  # and what was solved elsewhere
    scales = work.blocks * work.block_scales
    whole = (work.whole or 0) * 4 * scales * ring + (work.blocks * codes if work.whole else 0)
    return work.blocks * each + whole


def skeleton_bytes(work: Workload) -> float:
    """Return the size of the weights on the disk."""
    return work.parameters * work.stored_bytes


def _skeleton(shape: tuple[int, ...]) -> Skeleton:
    width, inner, layers, heads, stored_heads, vocabulary = shape
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=stored_heads,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    with tempfile.TemporaryDirectory() as directory:
        config.save_pretrained(directory)
        return Skeleton(Path(directory))


def _hours(duration: float) -> str:
    return f"{duration / 60:.0f} min" if duration < 7200 else f"{duration / 3600:.1f} h"


def _giga(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count < 1e10 else f"{count / 1e9:,.0f} GB"


if __name__ == "__main__":
    main()
