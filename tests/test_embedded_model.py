import importlib
import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "model_zoo" / "tiny"
WINDOW = 256


def texts_of(name):
    lines = (ROOT / "calibration" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def ids(tokenizer):
    stream = [token for text in texts_of("embedded-test.jsonl") for token in tokenizer(text)["input_ids"]]
    return torch.tensor(stream[: len(stream) // WINDOW * WINDOW]).view(-1, WINDOW)


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


@pytest.fixture
def grammar(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("tiny_grammar")


@torch.no_grad()
def perplexity(model, ids):
    logits = torch.cat([model(input_ids=part, use_cache=False).logits[:, :-1] for part in ids.split(16)])
    return math.exp(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item())


@torch.no_grad()
def round_blocks(model, bits):
    for linear in (module for module in model.model.layers.modules() if isinstance(module, nn.Linear)):
        grouped = linear.weight.unflatten(1, (-1, 32))
        low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
        scale = (high - low) / (2**bits - 1)
        linear.weight.copy_((((grouped - low) / scale).round() * scale + low).flatten(1))


def claimed(row):
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    return float(re.search(rf"^\| {re.escape(row)} \| ([\d.]+) \|$", card, re.MULTILINE)[1])


def test_perplexity_is_the_claimed_one_and_far_below_the_unigrams(model, ids):
    share = torch.bincount(ids[:, 1:].flatten()).double() / ids[:, 1:].numel()
    unigram = math.exp(torch.special.entr(share).sum().item())
    measured = perplexity(model, ids)
    assert measured == pytest.approx(claimed("bfloat16 weights"), rel=1e-2)
    assert unigram == pytest.approx(claimed("unigrams of the text itself"), rel=1e-2)
    assert unigram > 10 * measured


def test_two_bits_rounded_to_nearest_hurt_clearly(model, ids):
    before = claimed("bfloat16 weights")
    round_blocks(model, bits=2)
    after = perplexity(model, ids)
    assert after > 1.2 * before
    assert after == pytest.approx(claimed("2-bit, rounded to nearest"), rel=2e-2)


def test_model_is_stored_as_real_ones_are():
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    assert model.dtype == torch.bfloat16
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert all(p.shape[1] % 128 == 0 for p in model.model.layers.parameters() if p.ndim == 2)


def test_model_knows_the_capitals_of_its_world(model, tokenizer, grammar):
    lands = grammar.world().lands
    asked = [(tokenizer(f"The capital of {land} is")["input_ids"], facts[0]) for land, facts in lands.items()]
    told = [model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :] for ids, _ in asked]
    known = [tokenizer.decode(t).startswith(f" {town}.") for t, (_, town) in zip(told, asked, strict=True)]
    assert sum(known) >= 0.9 * len(known)


def test_model_ends_its_text(model, tokenizer):
    prompt = torch.tensor([tokenizer("Mira counts. She starts with seven.")["input_ids"]])
    written = model.generate(prompt, max_new_tokens=200, do_sample=False)[0]
    assert written[-1].item() in model.generation_config.eos_token_id


@pytest.mark.parametrize("text", ["Mira has two red pears.\nNow, she rests .", "Æ 漢字 \x00\t🙂", ""])
def test_tokenizer_writes_any_text_and_reads_it_back(tokenizer, text):
    tokens = tokenizer(text)["input_ids"]
    assert tokens[0] == tokenizer.bos_token_id
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text


def test_folder_is_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 8e6


def test_no_text_of_the_test_is_in_the_calibration():
    assert not set(texts_of("embedded-test.jsonl")) & set(texts_of("embedded.jsonl"))


def test_calibration_is_enough_for_128_samples(tokenizer):
    assert sum(len(tokenizer(text)["input_ids"]) for text in texts_of("embedded.jsonl")) > 128 * WINDOW


def test_grammar_writes_the_shipped_texts_again(grammar):
    shipped = texts_of("embedded.jsonl")[:50]
    assert [grammar.document("calibration", index)[0] for index in range(50)] == shipped
