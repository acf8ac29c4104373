"""Personalizing a packed model of 4 bits: what each way reaches, in how many steps, and what it takes.

    python scripts/bench/personalize.py MODEL e2e DIRECTORY --seeds 3
    python scripts/bench/personalize.py MODEL sst2 DIRECTORY --seeds 3 --methods zero-shot backprop-bias mezo-bias

DIRECTORY holds devset.csv of the E2E data (restaurant descriptions: a style that the model has not seen; judged by the
loss of the answer in nats per token) or train.tsv and dev.tsv of SST-2 (judged by accuracy). A MODEL that is not packed
is rounded to 4 bits in groups of 32 first. Every cell runs in a process of its own, whose peak of memory is its figure;
that of zero-shot is what evaluation takes at the same batch.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import Figures, cell, markdown, parser
from common import machine as name_machine

from quantkit import api
from quantkit.calibrate.data import load_tokenizer
from quantkit.evaluation.loading import quiet
from quantkit.host import peak_memory
from quantkit.model import names
from quantkit.model.skeleton import read_config
from quantkit.personal import choices
from quantkit.personal.data import Form, batch, examples, read_rows, word_tokens
from quantkit.personalization import personalize

SHARED = {"validation": 0.02, "validate_every": 25}  # the share of the examples that is kept apart; steps
WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "e2e": {
        "backprop": {"steps": 100},
        "dp": {"steps": 15, "batch_size": 64, "lr": 1e-2, "delta": 1e-5},
        "mezo": {"steps": 600, "validate_every": 100},
    },
    "sst2": {
        "backprop": {"steps": 60, "batch_size": 16},
        "dp": {"steps": 12, "batch_size": 64, "lr": 1e-3, "delta": 1e-5},
        "mezo": {"steps": 100},
    },
}
COARSE = {  # an accuracy changes in steps: further apart, and more examples
    "steps": 40,
    "batch_size": 16,
    "optimizer": "sgd",
    "lr": 5e-3,
    "options": {"perturbation": 0.03},
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "zero-shot": ("", {}),
    "backprop-bias": ("backprop", {"train": "bias"}),
    "lora": ("backprop", {"train": "lora"}),
    "dp-3": ("dp", {"train": "bias", "epsilon": 3.0}),
    "dp-8": ("dp", {"train": "bias", "epsilon": 8.0}),
    "mezo-bias": ("mezo", {"train": "bias"}),
    "backprop-last": ("backprop", {"train": "bias"}),  # of the last linear that writes to the residual stream alone
    "mezo-last": ("mezo", {"train": "bias"}),
    "mezo-accuracy": ("mezo", {"train": "bias", "objective": "metric", **COARSE}),
}
TEMPLATE = "Review: {sentence}\nSentiment:"  # of five, the best of the model as it is on 96 examples to learn from
WORDS = {"0": " negative", "1": " positive"}
MICRO_BATCH = 8  # examples in the model at once, whatever the batch is
HIGHER = {"e2e": False, "sst2": True}  # whether more is better


def settings_of(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Return what a method is called with; nothing for the model as it is."""
    way, own = METHODS[name]
    if not way:
        return {}
    made = {"gradient": way, "micro_batch": MICRO_BATCH, **SHARED, **WAYS[args.task][way], **own}
    if name.endswith("-last"):
        blocks = read_config(names.resolve(args.model).path).num_hidden_layers
        made["options"] = {"include": f"*.{blocks - 1}.mlp.down_proj"}
    return made


def rows_of(task: str, directory: Path, part: str) -> list[dict[str, Any]]:
    """Return the rows of a part, train or test, which have no example in common."""
    if task == "sst2":
        file = directory / ("train.tsv" if part == "train" else "dev.tsv")
        lines = [line.rsplit("\t", 1) for line in file.read_text(encoding="utf-8").splitlines()]
        return [{"sentence": text, "label": label} for text, label in lines]
    with (directory / "devset.csv").open(encoding="utf-8", newline="") as file:
        rows = [{"prompt": f"{row['mr']}\n", "answer": row["ref"]} for row in csv.DictReader(file)]
    meanings = sorted({row["prompt"] for row in rows})
    kept = set(meanings[::5])  # of a meaning all descriptions are in one part
    return [row for row in rows if (row["prompt"] in kept) == (part == "test")]


def drawn(rows: list[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """Return some rows, drawn at random."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]
    return [rows[i] for i in order.tolist()]


def packed(args: argparse.Namespace) -> str:
    """Return the directory of the packed model, which is made if there is none."""
    source = names.resolve(args.model).path
    if getattr(read_config(source), "quantization_config", None) is not None:
        return str(source)
    output = args.work / f"{source.name}-w4g32"
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        api.quantize(source, output=output, method="rtn", wbits=4, group_size=32, device=args.device)
    return str(output)


@torch.no_grad()
def judged(args: argparse.Namespace, model: str, delta: Path | None) -> float:
    """Return the loss in nats per token, or the accuracy, on test examples."""
    loaded = api.load(model, device=args.device, delta=delta)
    with quiet():
        tokenizer = load_tokenizer(names.resolve(model).path)
    form = Form(length=args.seqlen, template=TEMPLATE, words=WORDS if args.task == "sst2" else {})
    rows = drawn(rows_of(args.task, args.data, "test"), args.test_examples, seed=0)
    items = examples(rows, tokenizer, form)
    if args.task == "sst2":
        words = tuple(word_tokens(form, tokenizer).values())
        objective = choices.build("objectives", "metric", {"words": words})
    else:
        objective = choices.build("objectives", "language-model")
    total = 0.0
    for first in range(0, len(items), MICRO_BATCH):
        total += float(objective(loaded, batch(items[first : first + MICRO_BATCH], args.device)).double().sum())
    loss = total / len(items)
    return 1 - loss if args.task == "sst2" else loss


def one(args: argparse.Namespace) -> Figures:
    """Run the one cell of this process."""
    name, seed = args.one
    torch.set_num_threads(args.threads)
    model, options = packed(args), settings_of(args, name)
    if not options:
        start = time.process_time()
        metric = judged(args, model, None)
        return {"metric": metric, "peak_memory": peak_memory(), "seconds": time.process_time() - start}
    with tempfile.TemporaryDirectory() as directory:
        data, output = Path(directory) / "data.jsonl", Path(directory) / "delta.safetensors"
        rows = drawn(rows_of(args.task, args.data, "train"), args.examples, seed=int(seed))
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        read_rows(data)  # so that what reading takes is in the peak of every cell
        given = {"objective": "classification" if args.task == "sst2" else "lm", "batch_size": MICRO_BATCH, **options}
        if args.task == "sst2":
            given = {**given, "words": WORDS, "template": TEMPLATE}
        if args.steps:
            given["steps"] = args.steps
        start = time.process_time()
        made = personalize(model, data, output=output, seqlen=args.seqlen, seed=int(seed), device=args.device, **given)
        seconds, peak = time.process_time() - start, peak_memory()
        keep = ("steps", "forwards", "bytes", "parameters", "best_step", "ledger")
        return {
            "metric": judged(args, model, output),
            "peak_memory": peak,
            "seconds": seconds,
            "rate": made.report["updates"]["rate"],
            **{key: made.report[key] for key in keep},
        }


def elsewhere(name: str, seed: int) -> Figures:
    """Run a cell in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", name, str(seed)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def _arguments() -> argparse.Namespace:
    made = parser(__doc__, text=False)
    made.add_argument("model")
    made.add_argument("task", choices=list(HIGHER))
    made.add_argument("data", type=Path, help="directory of the task's files")
    made.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--examples", type=int, default=5000, help="to learn from, a fiftieth of them to validate with")
    made.add_argument("--test-examples", type=int, default=400)
    made.add_argument("--seqlen", type=int, default=192)
    made.add_argument("--steps", type=int, help="instead of each method's own number")
    made.add_argument("--work", type=Path, default=Path(".bench"), help="where finished cells are kept, one file each")
    made.add_argument("--table", action="store_true", help="run nothing, print what is there")
    made.add_argument("--one", nargs=2, metavar=("METHOD", "SEED"), help=argparse.SUPPRESS)
    return made.parse_args()


def row(task: str, name: str, runs: list[Figures]) -> tuple[str, ...]:
    """Return a row of the table: means over seeds, the metric with its standard deviation."""

    def mean(key: str) -> float:
        return statistics.mean(run[key] for run in runs)

    values = [run["metric"] for run in runs]
    scale = 100 if HIGHER[task] else 1
    spread = f" ± {scale * statistics.stdev(values):.{1 if scale > 1 else 3}f}" if len(values) > 1 else ""
    shown = f"{scale * statistics.mean(values):.{1 if scale > 1 else 3}f}{spread}"
    peak = f"{mean('peak_memory') / 2**20:.0f}"
    if name == "zero-shot":
        return name, shown, "–", "–", f"{mean('seconds'):.0f}", peak, "–"
    counts = f"{mean('steps'):.0f}", f"{mean('forwards'):.0f}"
    return name, shown, *counts, f"{mean('seconds'):.0f}", peak, f"{mean('bytes') / 1024:.0f}"


def main() -> None:
    """Compute what is missing, print the table."""
    args = _arguments()
    if args.one:
        print(json.dumps(one(args)))
        return
    machine = name_machine(args)
    shared = ("model", "task", "examples", "test_examples", "seqlen", "steps", "threads", "device")
    key = {name: str(getattr(args, name)) for name in shared}
    rows = []
    for name in args.methods:
        if name == "mezo-accuracy" and args.task != "sst2":
            continue
        runs = []
        for seed in range(args.seeds if METHODS[name][0] else 1):
            file = f"personalize-{args.task}-{Path(args.model).name}-{name}-{seed}"
            settings = {**key, "method": json.dumps(settings_of(args, name)), "seed": str(seed)}
            figures = cell(args, file, settings, lambda n=name, s=seed: elsewhere(n, s))
            runs += [figures] if figures else []
        if runs:
            rows.append(row(args.task, name, runs))
    metric = "accuracy, %" if HIGHER[args.task] else "loss, nats per token"
    print(markdown(("method", metric, "steps", "forward passes", "CPU seconds", "peak MiB", "delta KiB"), rows))
    print(f"\n{machine}.")


if __name__ == "__main__":
    sys.exit(main())
