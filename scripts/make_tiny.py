"""Makes the embedded model and its texts: writes model_zoo/tiny and calibration/embedded*.jsonl.

The texts come from `tiny_grammar`; tokenizer and model are trained here, from one seed, on the CPU alone.
"""

import argparse
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tiny_grammar import documents
from tiny_training import Recipe, make_model, next_token_loss, train
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Text = tuple[str, float]
ROOT = Path(__file__).resolve().parent.parent
WINDOW = 256
TRAIN_TEXTS, TOKENIZER_TEXTS, CHUNK = 60_000, 8_000, 4_000
CALIBRATION_TOKENS, TEST_TOKENS = 60_000, 25_000
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
FLOOR = "bound from the grammar's own choices"
CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# tiny

A small Llama that really was trained: {parameters} parameters ({inner} of them in 5 blocks of hidden
size 128, 4 query heads on 2 key-value heads, inner size 384; input and output embeddings tied), stored as
bfloat16 ({size} MB). Vocabulary: {recipe.vocabulary} byte-level BPE tokens. Context: 256 tokens.
The gains of its norms start log-normally spread (sigma {recipe.spread}), so that some channels stand
out as they do in large models and careless rounding costs something.
It is here so that every path of the toolkit can be tried, tested and taught offline, in seconds.

It knows little stories, lists, sums, letters and facts of an invented world, written by the grammar in
`scripts/tiny_grammar.py`, and nothing else. `<s>` opens every text; the next `<s>` is also where a text ends.

| Perplexity of `calibration/embedded-test.jsonl` | |
|---|---|
{rows}

Every text is tokenized with its `<s>`; all are joined to one stream and cut in windows of 256 tokens that do
not overlap, the last partial one dropped; loss and arithmetic in float32. Rounded: the linears of the blocks
alone, to an asymmetric min-max grid per group of 32 inputs. The bound: the surprise of every random choice
that made the texts, per token; who knows the grammar needs no more. No text of the test is in training or
calibration.

Made by `python scripts/make_tiny.py`: grammar, tokenizer, {recipe.steps} steps on {tokens} million tokens,
seed {recipe.seed}, {recipe.threads} threads, some minutes on two CPU cores. Text and weights are our own:
Apache-2.0.
"""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The three splits; no text of `test` is in another."""

    train: list[str]
    calibration: list[str]
    test: list[str]
    test_nats: float


def make_tokenizer(vocabulary: int, texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the grammar's texts: any bytes can be written, `<s>` opens every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[BOS, EOS, PAD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts[:TOKENIZER_TEXTS], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    )


def windows(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """The texts, each with its `<s>`, as one stream cut in windows; the last partial one is dropped."""
    stream = list(itertools.chain.from_iterable(tokenizer(texts)["input_ids"]))
    count = len(stream) // WINDOW
    return torch.tensor(stream[: count * WINDOW]).view(count, WINDOW)


def batches(tokenizer: PreTrainedTokenizerFast, texts: list[str], recipe: Recipe) -> Iterator[Tensor]:
    """Batches of windows of the texts, in chunks shuffled with the seed, without end."""
    generator = torch.Generator().manual_seed(recipe.seed)
    source = itertools.cycle(texts)
    while True:
        chunk = windows(tokenizer, list(itertools.islice(source, CHUNK)))
        order = torch.randperm(len(chunk), generator=generator)
        yield from (part for part in chunk[order].split(recipe.batch) if len(part) == recipe.batch)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, ids: Tensor) -> float:
    """Exponential of the mean loss over all windows."""
    losses = [next_token_loss(model, part) * len(part) for part in ids.split(16)]
    return math.exp(torch.stack(losses).sum().item() / len(ids))


def unigram_perplexity(ids: Tensor) -> float:
    """Perplexity of the text under its own token frequencies: the best without any context."""
    counts = torch.tensor(list(Counter(ids[:, 1:].flatten().tolist()).values()), dtype=torch.float64)
    share = counts / counts.sum()
    return math.exp(-(share * share.log()).sum().item())


def rounded(weight: Tensor, bits: int, group: int = 32) -> Tensor:
    """Weights rounded to nearest on an asymmetric min-max grid per group of inputs."""
    grouped = weight.float().unflatten(1, (-1, group))
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale = (high - low).clamp_min(1e-8) / (2**bits - 1)
    return (((grouped - low) / scale).round() * scale + low).flatten(1).to(weight.dtype)


@torch.no_grad()
def figures(folder: Path, ids: Tensor) -> dict[str, float]:
    """Perplexities of the saved model, in float32: as it is, and with the linears of its blocks rounded."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    linears = [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    originals = [linear.weight.clone() for linear in linears]
    measured = {
        "unigrams of the text itself": unigram_perplexity(ids),
        "bfloat16 weights": perplexity(model, ids),
    }
    for bits in (4, 3, 2):
        for linear, original in zip(linears, originals, strict=True):
            linear.weight.copy_(rounded(original, bits))
        measured[f"{bits}-bit, rounded to nearest"] = perplexity(model, ids)
    return measured


def write_texts(path: Path, texts: list[str]) -> None:
    """One `{"text": …}` a line."""
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    path.write_text("".join(lines), encoding="utf-8")


def enough(tokenizer: PreTrainedTokenizerFast, source: Iterator[Text], tokens: int) -> list[Text]:
    """The first texts that have at least so many tokens together."""
    chosen, total = [], 0
    while total < tokens:
        chosen.append(next(source))
        total += len(tokenizer(chosen[-1][0])["input_ids"])
    return chosen


def make_texts(tokenizer: PreTrainedTokenizerFast, train_texts: list[str]) -> Texts:
    """The training texts and enough of the other two splits."""
    calibration = [text for text, _ in enough(tokenizer, documents("calibration"), CALIBRATION_TOKENS)]
    seen = {*train_texts, *calibration}
    fresh = (pair for pair in documents("test") if pair[0] not in seen)
    test = enough(tokenizer, fresh, TEST_TOKENS)
    surprise = sum(nats for _, nats in test)
    return Texts(train=train_texts, calibration=calibration, test=[text for text, _ in test], test_nats=surprise)


def save(tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM, folder: Path) -> None:
    """The model folder as real models have it; a text also ends where the next one would open."""
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    GenerationConfig(bos_token_id=0, eos_token_id=[1, 0], pad_token_id=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.pop("backend", None)  # both as transformers before 5 and other loaders know them
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def write_card(folder: Path, model: LlamaForCausalLM, recipe: Recipe, measured: dict[str, float]) -> None:
    """The README of the model, with the figures just measured."""
    values = {
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "inner": f"{sum(p.numel() for p in model.model.layers.parameters()):,}",
        "size": f"{(folder / 'model.safetensors').stat().st_size / 1e6:.1f}",
        "rows": "\n".join(f"| {name} | {value:.3f} |" for name, value in measured.items()),
        "tokens": f"{recipe.steps * recipe.batch * WINDOW / 1e6:.1f}",
    }
    (folder / "README.md").write_text(CARD.format(recipe=recipe, **values), encoding="utf-8")


def make(recipe: Recipe, root: Path) -> None:
    """Train tokenizer and model, save them and the texts, measure, and write the figures down."""
    torch.set_num_threads(recipe.threads)
    torch.use_deterministic_algorithms(True)
    folder, calibration = root / "model_zoo" / "tiny", root / "calibration"
    for place in (folder, calibration):
        place.mkdir(parents=True, exist_ok=True)
    train_texts = [text for text, _ in itertools.islice(documents("train"), TRAIN_TEXTS)]
    tokenizer, model = make_tokenizer(recipe.vocabulary, train_texts), make_model(recipe)
    splits = make_texts(tokenizer, train_texts)
    write_texts(calibration / "embedded.jsonl", splits.calibration)
    write_texts(calibration / "embedded-test.jsonl", splits.test)
    train(model, batches(tokenizer, splits.train, recipe), recipe)
    save(tokenizer, model, folder)
    ids = windows(tokenizer, splits.test)
    count = sum(len(row) for row in tokenizer(splits.test)["input_ids"])
    measured = figures(folder, ids) | {FLOOR: math.exp(splits.test_nats / count)}
    write_card(folder, model, recipe, measured)
    print((folder / "README.md").read_text(encoding="utf-8"))


def main() -> None:
    """Make everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--root", type=Path, default=ROOT, help="where model_zoo/ and calibration/ are written")
    arguments = parser.parse_args()
    make(Recipe(steps=arguments.steps), arguments.root)


if __name__ == "__main__":
    main()
