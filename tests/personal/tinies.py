"""Tiny packed models, their dense twins in float64, and examples to train them with."""

import json
from pathlib import Path

import torch
from families import VOCABULARY, save_tiny, save_tokenizer
from packed import exact
from torch import nn

import quantkit
from quantkit.personal.protocols import Batch
from quantkit.runtime.linear import HalfEmbedding, HalfLinear, PackedLinear


def packed(family, directory, **options):
    """Write a tiny model of `family`, rounded to 4 bits; return where it lies."""
    save_tiny(family, directory / "dense")
    save_tokenizer(directory / "dense")
    settings = {"method": "rtn", "wbits": 4, "group_size": 32, "samples": 4, "seqlen": 16, "allow_short": True}
    quantkit.quantize(directory / "dense", output=directory / "w4", calibration="embedded", **settings, **options)
    return directory / "w4"


def twin(directory):
    """Return the same weights, dense, in float64, in modules of PyTorch alone."""
    model = quantkit.load(directory, device="cpu")
    for name, module in list(model.named_modules()):
        made = None
        if isinstance(module, PackedLinear):
            weight = exact(module.unpack())
            made = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            made.weight = nn.Parameter(weight.T if module.layout.transposed else weight)
            made.bias = module.bias
        elif isinstance(module, HalfLinear):
            made = nn.Linear(*module.weight.shape[::-1], module.bias is not None)
            made.weight, made.bias = nn.Parameter(module.weight), module.bias
        elif isinstance(module, HalfEmbedding):
            made = nn.Embedding.from_pretrained(module.weight)
        if made is not None:
            model.set_submodule(name, made)
    return model.double().requires_grad_(False)


def batch(examples=3, length=9, *, seed=0, padded=True):
    """Return random tokens, the later examples shorter, the later half scored."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (examples, length), generator=generator)
    attention = torch.ones(examples, length, dtype=torch.bool)
    for row in range(examples if padded else 0):
        attention[row, length - row :] = False
    scored = attention.clone()
    scored[:, : length // 2] = False
    return Batch(tokens=tokens, attention=attention, scored=scored, label=torch.arange(examples) % 2)


def write_rows(path: Path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


TEXTS = [{"text": f"The dog said hello to cat {number}."} for number in range(24)]
