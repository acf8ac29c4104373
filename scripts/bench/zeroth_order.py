"""Gradients from forward passes: memory, what the subspace changes, and how far biases come beside exact gradients.

    python scripts/bench/zeroth_order.py memory MODEL
    python scripts/bench/zeroth_order.py subspace tiny --seeds 8
    python scripts/bench/zeroth_order.py biases MODEL --data train.tsv --judge dev.tsv
    python scripts/bench/zeroth_order.py pace MODEL --data train.tsv --batch 8

MODEL is rounded to 4 bits first (`rtn`, groups of --group-size), unless it is a packed checkpoint. `memory` runs every
way in a process of its own. `subspace` trains four soft tokens to name one of two colours for women and for men that
the model knows; it is judged on people whom it was not trained on. `biases` reads lines of sentence, tab, 0 or 1.
`pace` says how much a step can gain in the beginning: from the gradient of --examples, how far those of batches are
from it, and how curved the loss is.
"""

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import machine, markdown
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

import quantkit
from quantkit.calibrate.data import load_tokenizer
from quantkit.host import peak_memory
from quantkit.model import names
from quantkit.personal.gradients.backprop import Backprop
from quantkit.personal.gradients.mezo import CAUTION, Mezo
from quantkit.personal.gradients.subspace_zo import SubspaceZo
from quantkit.personal.parameters.bias import Bias
from quantkit.personal.protocols import Batch, Estimator, Losses, Parameters
from quantkit.personal.updates import Updates

sys.path.append(str(Path(__file__).resolve().parent.parent))
import tiny_world

TOKENS = 4  # of a soft prompt


@dataclass(frozen=True)
class Words:
    """The loss of choosing between some words after the last token; sentences are padded on the left."""

    words: tuple[int, ...]

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits of the words (examples, words)."""
        given = {"input_ids": batch.tokens, "attention_mask": batch.attention.long()}
        return model(**given, use_cache=False, logits_to_keep=1).logits[:, -1, list(self.words)].float()

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return one loss per example."""
        return functional.cross_entropy(self.logits(model, batch), batch.label, reduction="none")


@dataclass(frozen=True)
class Everywhere:
    """The loss of a language model at every token."""

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return one loss per example."""
        logits = model(input_ids=batch.tokens, use_cache=False).logits[:, :-1].transpose(1, 2)
        return functional.cross_entropy(logits, batch.tokens[:, 1:], reduction="none").mean(1)


def padded(rows: Sequence[Sequence[int]], labels: Sequence[int]) -> Batch:
    """Return a batch of rows of tokens, padded on the left."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    seen = torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in rows])
    return Batch(tokens=tokens, attention=seen, scored=torch.zeros_like(seen), label=torch.tensor(labels))


def part(whole: Batch, rows: Tensor) -> Batch:
    """Return some examples."""
    assert whole.label is not None
    return Batch(
        tokens=whole.tokens[rows], attention=whole.attention[rows], scored=whole.scored[rows], label=whole.label[rows]
    )


@torch.no_grad()
def judged(objective: Words, model: nn.Module, held_out: Batch) -> tuple[float, float]:
    """Return mean loss and accuracy."""
    logits = torch.cat(
        [objective.logits(model, part(held_out, rows)) for rows in torch.arange(len(held_out.tokens)).split(64)]
    )
    return float(functional.cross_entropy(logits, held_out.label)), float(
        (logits.argmax(1) == held_out.label).double().mean()
    )


def trained(  # noqa: PLR0913
    estimator: Estimator,
    objective: Words,
    model: nn.Module,
    parameters: Parameters,
    examples: Batch,
    updates: Updates,
    *,
    batch: int,
    seed: int,
    see: Callable[[int], None] = lambda _: None,
) -> None:
    """Train, and call `see` with the number of steps after each."""
    optimizer, generator = updates.begin(parameters), torch.Generator().manual_seed(seed)
    for step in range(updates.steps):
        rows = torch.randint(len(examples.tokens), (batch,), generator=generator)
        with torch.set_grad_enabled(estimator.needs_gradients):
            estimator.estimate([Losses(objective, model, part(examples, rows))], parameters, step=step)
        updates.take(optimizer, step)
        see(step + 1)


# memory


def one_process(args: argparse.Namespace) -> None:
    """Evaluate a batch, or make steps on it, and print the peak memory."""
    model = quantkit.load(args.model, device="cpu")
    loaded = peak_memory()
    tokens = torch.randint(3, 1000, (args.batch, args.seqlen), generator=torch.Generator().manual_seed(0))
    seen = torch.ones_like(tokens, dtype=torch.bool)
    batch = Batch(tokens=tokens, attention=seen, scored=seen, label=tokens[:, 0] % 2)
    losses = Losses(Words((5, 6)) if args.loss == "one word" else Everywhere(), model, batch)
    if args.way == "evaluation":
        with torch.no_grad():
            for _ in range(4):
                losses()
    else:
        parameters = Bias().attach(model)
        estimator, updates = (Mezo() if args.way == "mezo" else Backprop()), Updates(steps=3, rate=1e-3)
        for parameter in parameters.values():
            parameter.requires_grad_(estimator.needs_gradients)
        optimizer = updates.begin(parameters)
        for step in range(updates.steps):
            with torch.set_grad_enabled(estimator.needs_gradients):
                estimator.estimate([losses], parameters, step=step)
            updates.take(optimizer, step)
    print(json.dumps({"loaded": loaded, "peak": peak_memory()}))


def memory(args: argparse.Namespace) -> str:
    """Return the table of peak memory."""
    rows = []
    for loss in ("every token", "one word"):
        found: dict[str, list[int]] = {}
        for way in ("evaluation", "mezo", "backprop"):
            command = [sys.executable, __file__, "process", args.model, "--way", way, "--loss", loss]
            command += ["--batch", str(args.batch), "--seqlen", str(args.seqlen), "--threads", str(args.threads)]
            outputs = [
                subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(args.seeds)
            ]
            found[way] = [json.loads(output.splitlines()[-1])["peak"] for output in outputs]
        base = statistics.median(found["evaluation"])
        rows += [
            [loss, way, f"{statistics.median(peaks) / 2**20:.1f}", f"{statistics.median(peaks) / base:.3f}"]
            for way, peaks in found.items()
        ]
    return markdown(["loss of", "", "peak, MiB", "over evaluation"], rows)


# the subspace


class Prompted(nn.Module):
    """A model that reads some trained vectors before every text."""

    def __init__(self, model: nn.Module) -> None:
        """Begin with the vectors of real tokens."""
        super().__init__()
        self.model, self.embed = model, model.get_input_embeddings()
        with torch.no_grad():
            self.prompt = nn.Parameter(self.embed(torch.tensor([100, 200, 300, 400])).float().clone())

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **how: Any) -> Any:  # noqa: ANN401
        """Return what the model does."""
        before = self.prompt.expand(len(input_ids), -1, -1)
        seen = torch.cat([torch.ones(len(input_ids), TOKENS, dtype=torch.long), attention_mask], 1)
        return self.model(inputs_embeds=torch.cat([before, self.embed(input_ids)], 1), attention_mask=seen, **how)


def people(tokenizer: PreTrainedTokenizerBase, count: int, which: slice, seed: int) -> Batch:
    """Return sentences about women and men, and which of them it is."""
    draw, rows, labels = random.Random(seed), [], []
    for _ in range(count):
        she = draw.randrange(2)
        name = draw.choice((tiny_world.HE, tiny_world.SHE)[she][which])
        rows.append(tokenizer(f"{name} has a {draw.choice(tiny_world.ANIMALS)} and likes the colour")["input_ids"])
        labels.append(she)
    return padded(rows, labels)


ARMS: dict[str, tuple[Callable[[int], Mezo], int]] = {
    "one side, nothing left out": (lambda seed: SubspaceZo(seed=seed, remove="nothing"), 3),
    "subspace gradient, as published": (lambda seed: SubspaceZo(seed=seed, window=32), 3),
    "subspace gradient, mapped": (lambda seed: SubspaceZo(seed=seed, window=32, coordinates="mapped"), 3),
    "directions cut": (lambda seed: SubspaceZo(seed=seed, window=32, remove="directions"), 3),
    "the more sensitive half of each batch": (lambda seed: SubspaceZo(seed=seed, remove="nothing", sensitive=0.5), 3),
    "both sides, nothing left out": (lambda seed: Mezo(seed=seed), 2),
    "both sides, subspace gradient": (lambda s: SubspaceZo(seed=s, directions=1, antithetic=True, window=32), 2),
}


def subspace(args: argparse.Namespace) -> str:
    """Return the table of losses at equal numbers of forward passes."""
    tokenizer = load_tokenizer(Path(args.model))
    model = Prompted(quantkit.load(args.model, device="cpu")).requires_grad_(False)
    words = Words(tuple(tokenizer(f" {word}")["input_ids"][-1] for word in ("silver", "golden")))
    examples, held_out = people(tokenizer, 512, slice(0, 16), 0), people(tokenizer, 128, slice(16, 24), 1)
    start, parameters = model.prompt.detach().clone(), {"prompt": model.prompt}
    found: dict[str, list[float]] = {}
    rate = args.rate * float(start.square().mean().sqrt())
    for name, (make, passes) in ARMS.items():
        for seed in range(args.seeds):
            model.prompt.copy_(start)
            updates = Updates(steps=args.forwards // passes, rate=rate)
            trained(make(seed), words, model, parameters, examples, updates, batch=args.batch, seed=seed)
            found.setdefault(name, []).append(judged(words, model, held_out)[0])
        print(name, [round(loss, 4) for loss in found[name]], file=sys.stderr, flush=True)
    model.prompt.copy_(start)
    base = "one side, nothing left out"
    rows = [
        [name, interval(losses), interval([a - b for a, b in zip(losses, found[base], strict=True)])]
        for name, losses in found.items()
    ]
    before = judged(words, model, held_out)[0]
    return f"before training: {before:.3f}\n\n" + markdown(["", "loss", f"less that of “{base}”, same seeds"], rows)


def interval(values: Sequence[float]) -> str:
    """Return the mean and half the width of its 95 % confidence interval (Student)."""
    student = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
    half = (
        student.get(len(values), 2.0) * statistics.stdev(values) / math.sqrt(len(values))
        if len(values) > 1
        else math.nan
    )
    return f"{statistics.mean(values):.4f} ± {half:.4f}"


# biases


def reviews(args: argparse.Namespace, path: Path, count: int, seed: int) -> Batch:
    """Return `count` short sentences of a file of lines, in the template, and what they think."""
    tokenizer = load_tokenizer(Path(args.model))
    lines = [line.rsplit("\t", 1) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [(tokenizer(args.template.format(sentence=text.strip()))["input_ids"], int(label)) for text, label in lines]
    rows = [row for row in rows if len(row[0]) <= args.seqlen]
    random.Random(seed).shuffle(rows)
    return padded([row for row, _ in rows[:count]], [label for _, label in rows[:count]])


def label_words(args: argparse.Namespace) -> Words:
    """Return the loss of choosing between the words of the labels."""
    tokenizer = load_tokenizer(Path(args.model))
    return Words(tuple(tokenizer.encode(f" {word}", add_special_tokens=False)[-1] for word in args.words))


def biases(args: argparse.Namespace) -> str:
    """Return the table of gains against forward passes."""
    model, words = quantkit.load(args.model, device="cpu"), label_words(args)
    examples, held_out = reviews(args, args.data, args.examples, 0), reviews(args, args.judge, 200, 1)
    parameters = Bias().attach(model)
    before = judged(words, model, held_out)
    rows = [["none", "0", f"{before[0]:.4f}", f"{before[1]:.3f}", "", ""]]

    def run(name: str, estimator: Estimator, updates: Updates, passes: int, best: float | None) -> float:
        for parameter in parameters.values():
            parameter.requires_grad_(estimator.needs_gradients).data.zero_()
        began, losses = time.process_time(), [before[0]]

        def see(step: int) -> None:
            if step % max(1, args.every // passes) == 0 or step == updates.steps:
                loss, accuracy = judged(words, model, held_out)
                losses.append(min(loss, losses[-1]))
                gained, whole = before[0] - losses[-1], before[0] - (losses[-1] if best is None else best)
                share = gained / whole if whole else 0.0
                told = [name, str(step * passes), f"{losses[-1]:.4f}", f"{accuracy:.3f}", f"{share:.2f}"]
                rows.append([*told, f"{time.process_time() - began:.0f}"])
                print(rows[-1], file=sys.stderr, flush=True)

        trained(estimator, words, model, parameters, examples, updates, batch=args.batch, seed=0, see=see)
        return losses[-1]

    falling = {"schedule": "linear"}  # a constant rate ends wherever the last batches led
    best = run("backprop", Backprop(), Updates(steps=args.steps, rate=args.rate, **falling), 1, None)
    for parameter in parameters.values():
        parameter.data.zero_()
    first = Losses(words, model, part(examples, torch.arange(args.batch)))
    rate = Mezo().rate([first], parameters)
    run("mezo", Mezo(), Updates(steps=args.forwards // 2, rate=rate, optimizer="sgd", **falling), 2, best)
    return markdown(
        ["gradient", "forward passes", "best loss so far", "accuracy", "share of backprop's gain", "CPU seconds"], rows
    )


def pace(args: argparse.Namespace) -> str:
    """Return what a step gains at first: r g2 - r2 c (g2 + s2/batch) / 2, with its rate r and at the best one."""
    model, words, parts = quantkit.load(args.model, device="cpu"), label_words(args), args.examples // args.batch
    examples, parameters = reviews(args, args.data, parts * args.batch, 1), Bias().attach(model)
    found = []
    for rows in torch.arange(len(examples.tokens)).split(args.batch):
        loss = words(model, part(examples, rows)).mean()
        gradients = torch.autograd.grad(loss, [p.requires_grad_() for p in parameters.values()])
        found.append(torch.cat([gradient.flatten() for gradient in gradients]).double())
    of_batch, of_all = (
        float(each.square().sum(-1).mean()) for each in (torch.stack(found), torch.stack(found).mean(0))
    )
    noise = (of_batch - of_all) * parts / (parts - 1)  # s2 / batch
    true = max(0.0, of_all - noise / parts)  # what is left may be nothing that so many examples tell from noise
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    rate = Mezo().rate([Losses(words, model, part(examples, torch.arange(args.batch)))], parameters)
    curvature = 1 / (CAUTION * rate)
    rows = [
        [name, f"{r:.2g}", f"{r * true - r * r * curvature * (true + noise) / 2:.4f}"]
        for name, r in (("that is found", rate), ("best", true / (curvature * (true + noise))))
    ]
    said = f"squared gradient {true:.3g}, of a batch {true + noise:.3g}, curvature {curvature:.3g}\n\n"
    return said + markdown(["rate", "", "gained by a step"], rows)


def _arguments() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("what", choices=["memory", "subspace", "biases", "pace", "process"])
    made.add_argument("model")
    made.add_argument("--data", type=Path)
    made.add_argument("--judge", type=Path)
    made.add_argument("--examples", type=int, default=512)
    made.add_argument("--batch", type=int, default=16)
    made.add_argument("--seqlen", type=int, default=64)
    made.add_argument("--forwards", type=int, default=480)
    made.add_argument("--steps", type=int, default=60, help="of backprop")
    made.add_argument("--every", type=int, default=40, help="forward passes between two rows")
    made.add_argument(
        "--template", default="{sentence} . It was", help="what stands around a sentence, before the word"
    )
    made.add_argument("--words", nargs=2, default=("terrible", "great"), help="what 0 and 1 are called")
    made.add_argument(
        "--rate",
        type=float,
        default=5e-3,
        help="of Adam; of mezo it is found; of `subspace`: in units of the prompt's size",
    )
    made.add_argument("--seeds", type=int, default=5)
    made.add_argument("--group-size", type=int, default=32)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--device", default="cpu")
    made.add_argument("--way", default="mezo")
    made.add_argument("--loss", default="every token")
    return made.parse_args()


def main() -> None:
    """Print a table."""
    args = _arguments()
    said = machine(args)
    if args.what == "process":
        one_process(args)
        return
    with tempfile.TemporaryDirectory() as work:
        if not (Path(args.model) / "recipe.toml").exists():
            source, args.model = args.model, str(Path(work) / "model")
            quantkit.quantize(
                str(names.resolve(source).path), output=args.model, method="rtn", wbits=4, group_size=args.group_size
            )
        print({"memory": memory, "subspace": subspace, "biases": biases, "pace": pace}[args.what](args))
    print(f"\n{said}")


if __name__ == "__main__":
    main()
