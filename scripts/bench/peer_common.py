"""What the drivers of `peers.py` share; they run in the peers' own environments, so nothing of quantkit is imported.

A driver turns one model directory into another whose decoder linears are dense, dequantized float32 and whose other
tensors are the source's. Its seconds go from directory to directory (loading and writing included, imports not), in
wall time and in processor time (its own and that of compilers it calls); its peak memory is the process's.
"""

import argparse
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Task:
    """One run of one tool; `group_size` is -1 for one scale per row, `extra` are the driver's own arguments."""

    model: Path
    tokens: Tensor  # (samples, seqlen) int64
    bits: int
    group_size: int
    output: Path
    extra: list[str]


def arguments() -> tuple[Task, Path]:
    """Return the task of the command line, and where its figures go."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--figures", type=Path, required=True)
    known, extra = parser.parse_known_args()
    tokens = load_file(known.tokens)["tokens"]
    task = Task(
        model=known.model,
        tokens=tokens,
        bits=known.bits,
        group_size=known.group_size,
        output=known.output,
        extra=extra,
    )
    return task, known.figures


def run(quantize: Callable[[Task, nn.Module], Mapping[str, Tensor]]) -> None:
    """Load the model in float32, quantize it, write what `quantize` returns: names and dense values of what it changed.

    Every linear of the decoder has to be among them, and nothing outside the decoder.
    """
    from transformers import AutoModelForCausalLM

    task, figures = arguments()
    start = os.times()
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32).eval()
    expected = {f"{name}.weight" for name in decoder_linears(model)}
    weights = quantize(task, model)
    if strays := (expected - set(weights)) or {name for name in weights if ".layers." not in name}:
        sys.exit(f"the tool did not change the decoder's linears and nothing else: {sorted(strays)[:3]}")
    write_dense(task.model, task.output, weights)
    report(figures, start)


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linears of the decoder blocks by name."""
    named = model.named_modules()
    return {name: module for name, module in named if ".layers." in name and isinstance(module, nn.Linear)}


def on_grid(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Return `weight` (out, in) exactly on its grid in float32, where a tool left it rounded to bfloat16.

    The grid is (code - zero_point) * scale with scale and zero_point (out, groups); the run ends if a value is nowhere
    near it, or if a code does not fit into `bits`.
    """
    groups = scale.shape[1]
    step, zero = (part.float().unsqueeze(-1) for part in (scale, zero_point))
    values = weight.float().view(weight.shape[0], groups, -1)
    codes = (values / step).round() + zero
    if codes.min() < 0 or codes.max() >= 2**bits or not torch.allclose(zero, zero.round()):
        sys.exit(f"codes from {codes.min()} to {codes.max()} do not fit into {bits} bits")
    dense = (codes - zero) * step
    if (dense - values).abs().max() > 0.1 * step.max():
        sys.exit("the weights do not lie on the grid that the tool reports")
    return dense.view_as(weight)


def write_dense(source: Path, output: Path, weights: Mapping[str, Tensor]) -> None:
    """Write `source` with the given weights in their place, as a float32 checkpoint of plain transformers."""
    output.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    for shard in sorted(source.glob("*.safetensors")):
        tensors |= load_file(shard)
    if unknown := set(weights) - set(tensors):
        sys.exit(f"{source} has no tensor {sorted(unknown)[0]}")
    dense = {name: weight.detach().float().contiguous() for name, weight in weights.items()}
    save_file({**tensors, **dense}, output / "model.safetensors", metadata={"format": "pt"})
    for path in source.iterdir():
        if path.is_file() and ".safetensors" not in path.name:
            shutil.copy(path, output)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    (output / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2), encoding="utf-8")


def report(figures: Path, start: os.times_result) -> None:
    """Write the seconds since `start` and this process's peak memory."""
    now, unit = os.times(), 1 if sys.platform == "darwin" else 1024
    measured = {
        "seconds": now.elapsed - start.elapsed,
        "cpu_seconds": sum(now[:4]) - sum(start[:4]),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }
    figures.write_text(json.dumps(measured), encoding="utf-8")
