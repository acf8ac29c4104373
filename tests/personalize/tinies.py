"""Tiny packed models, their dense twins in float64, and examples to train them with."""

import json
from pathlib import Path

import torch
from families import VOCABULARY, save_tiny, save_tokenizer

import quantkit
from quantkit.evaluation.loading import load_model
from quantkit.personalize.protocols import Batch


def packed(family, directory, **options):
    """Write a tiny model of `family`, rounded to 4 bits; return where it lies."""
    save_tiny(family, directory / "dense")
    save_tokenizer(directory / "dense")
    settings = {"method": "rtn", "wbits": 4, "group_size": 32, "samples": 4, "seqlen": 16, "allow_short": True}
    quantkit.quantize(directory / "dense", output=directory / "w4", calibration="embedded", **settings, **options)
    return directory / "w4"


def twin(directory):
    """Return the same weights, dense, in float64."""
    return load_model(directory, device="cpu")[0].double()


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
