"""Perplexity of pruned models, alone and with 4 bits, beside llm-compressor on the same tokens; and what it costs.

    python scripts/bench/pruning.py MODEL TRAIN TEST --samples 64 --seqlen 256 --windows 80 --peers

Sparsities are 50 % and 2:4 of all linears of the decoder. `W4` rounds what is kept by GPTQ, asymmetric, in groups of
--group-size. The last column is the processor time of a run over that of one forward pass of the whole model over the
calibration tokens; it holds loading, both streams, the errors of the blocks and writing. Peers run in a process and an
environment of their own (see peers.py), their checkpoints are dense float32, ours have the model's dtype.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import peers
import torch
from common import Figures, cell, markdown, measure, parser, perplexity
from common import machine as name_machine
from peer_quantkit import tokens as write_tokens
from safetensors.torch import load_file

from quantkit import api
from quantkit.core.scheme import QuantScheme
from quantkit.evaluation.loading import load_model
from quantkit.model import names
from quantkit.recipe import Recipe, from_defaults, with_changes

METHODS, SPARSITIES = ("magnitude", "wanda", "sparsegpt", "mfac"), ("0.5", "2:4")
PEERS = ("wanda", "sparsegpt")


def recipe(args: argparse.Namespace, method: str | None, sparsity: str | None, *, four_bits: bool) -> Recipe:
    """Return the recipe of one cell."""
    sizes = {"text": args.train, "samples": args.samples, "seqlen": args.seqlen, "batch_size": args.batch_size or 8}
    options = {"sparsity": sparsity} if method else {}
    if method == "mfac":
        options |= {"recomputations": args.mfac_steps, "tokens": args.mfac_tokens}
    if not four_bits:
        return from_defaults(args.model, {**sizes, "dense": True}, prune=method, options=options)
    scheme = QuantScheme(bits=4, group_size=args.group_size)
    base = dataclasses.replace(Recipe(model=args.model), scheme=scheme)
    return with_changes(base, sizes, method="gptq", prune=method, options=options)


def peer(args: argparse.Namespace, method: str, sparsity: str) -> Figures:
    """Run llm-compressor on the tokens that quantkit draws, evaluate what it wrote."""
    work = Path(tempfile.mkdtemp(prefix="quantkit-bench-"))
    try:
        drawn = work / "tokens.safetensors"
        write_tokens([_directory(args), args.train, str(args.samples), str(args.seqlen), "0", str(drawn)])
        python = peers.install(args.environments.resolve(), "llm-compressor")
        command = [str(python), str(Path(__file__).parent / "peer_llmcompressor.py"), "--model", _directory(args)]
        command += ["--tokens", str(drawn), "--bits", "16", "--group-size", "-1", "--output", str(work / "model")]
        command += ["--figures", str(work / "figures.json"), "--algorithm", method, "--sparsity", sparsity]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=_environment(args.threads))
        figures = json.loads((work / "figures.json").read_text(encoding="utf-8"))
        model = str(work / "model")
        judged = api.evaluate(model, text=args.test, seqlen=args.eval_seqlen, windows=args.windows, device="cpu")
        weights = load_file(work / "model" / "model.safetensors")
        linears = [w for n, w in weights.items() if ".layers." in n and w.ndim == 2]
        zeros = sum(int((w == 0).sum()) for w in linears) / sum(w.numel() for w in linears)
        return {"perplexity": judged.perplexity, "zeros": zeros, **figures}
    finally:
        shutil.rmtree(work)


def forward(args: argparse.Namespace) -> Figures:
    """Measure one forward pass of the whole model over the calibration tokens, in processor time."""
    work = Path(tempfile.mkdtemp(prefix="quantkit-bench-"))
    try:
        write_tokens([_directory(args), args.train, str(args.samples), str(args.seqlen), "0", str(work / "t")])
        tokens = load_file(work / "t")["tokens"]
    finally:
        shutil.rmtree(work)
    model, _ = load_model(args.model, device="cpu")
    start = time.process_time()
    with torch.no_grad():
        for batch in tokens.split(args.batch_size or 8):
            model(batch, use_cache=False)
    return {"cpu_seconds": time.process_time() - start}


def _directory(args: argparse.Namespace) -> str:
    return str(names.resolve(args.model).path)


def _environment(threads: int) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {**kept, **dict.fromkeys(names, str(threads)), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def _rows(
    args: argparse.Namespace, judged: argparse.Namespace, key: dict[str, str], sparsity: str
) -> list[tuple[str, str, Figures, Figures]]:
    """Return method, sparsity, and the figures alone and with 4 bits."""
    rows = []
    for method in args.methods:
        name = f"{method}-{sparsity.replace(':', 'of')}"
        alone = measure(judged, name, recipe(args, method, sparsity, four_bits=False)) or {}
        both = {}
        if method in args.with_w4:
            both = measure(judged, f"{name}-w4", recipe(args, method, sparsity, four_bits=True)) or {}
        rows.append((method, sparsity, alone, both))
    for method in PEERS if args.peers else ():
        name = f"peer-{method}-{sparsity.replace(':', 'of')}"
        run = cell(args, name, key, lambda m=method: peer(args, m, sparsity)) or {}
        rows.append((f"llm-compressor {method}", sparsity, run, {}))
    return rows


def _arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--eval-seqlen", type=int, help="tokens of the windows that are judged; default: --seqlen")
    made.add_argument("--group-size", type=int, default=32)
    made.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    made.add_argument("--sparsities", nargs="+", default=list(SPARSITIES))
    made.add_argument("--with-w4", nargs="*", choices=METHODS, default=list(METHODS), help="methods with W4 too")
    made.add_argument("--mfac-steps", type=int, default=8)
    made.add_argument("--mfac-tokens", type=int, default=8192)
    made.add_argument("--peers", action="store_true", help="run llm-compressor too")
    made.add_argument("--environments", type=Path, default=Path(".bench-peers/environments"))
    return made.parse_args()


def main() -> None:
    """Compute what is missing, print the tables."""
    args = _arguments()
    args.eval_seqlen = args.eval_seqlen or args.seqlen
    machine = name_machine(args)
    judged = argparse.Namespace(**{**vars(args), "seqlen": args.eval_seqlen})
    key = {name: str(getattr(args, name)) for name in ("model", "train", "samples", "seqlen", "test", "eval_seqlen")}
    key["windows"] = str(args.windows)
    once = cell(args, "forward", {**key, "threads": args.threads}, lambda: forward(args)) or {}
    full = measure(judged, "full", None) or {}
    w4 = (args.with_w4 and measure(judged, "w4", recipe(args, None, None, four_bits=True))) or {}
    rows = [row for sparsity in args.sparsities for row in _rows(args, judged, key, sparsity)]
    header = ("method", "sparsity", "perplexity", "with W4", "CPU s", "forward passes")
    shown = [
        (
            method,
            "50 %" if sparsity == "0.5" else sparsity,
            perplexity(alone.get("perplexity")),
            perplexity(both.get("perplexity")),
            f"{alone['cpu_seconds']:.0f}" if alone else "–",
            f"{alone['cpu_seconds'] / once['cpu_seconds']:.1f}" if alone and once else "–",
        )
        for method, sparsity, alone, both in rows
    ]
    print(markdown(header, shown))
    print(f"\nOriginal: {perplexity(full.get('perplexity'))}; W4 g{args.group_size} by GPTQ without pruning: ", end="")
    print(f"{perplexity(w4.get('perplexity'))}. {machine}.")


if __name__ == "__main__":
    sys.exit(main())
