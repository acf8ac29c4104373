"""The three files that quantkit leaves beside the weights, and what they promise.

recipe.toml   what was asked for; `quantkit quantize --recipe` repeats it
report.json   what happened: versions, predictions and facts, one entry per block, and the manifest of every tensor
check.json    a few token sequences and the largest logits of the calibrated model there, for `quantkit check`
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

RECIPE, REPORT, CHECK = "recipe.toml", "report.json", "check.json"
TOP_LOGITS = 64
DENSE = "dense"  # the scheme of a run that quantizes nothing


def tensor_manifest(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, list[Any]]:
    """Return {tensor name: [safetensors dtype, shape]} as report.json keeps it, sorted by name."""
    return {name: [dtype, list(shape)] for name, (dtype, shape) in sorted(tensors.items())}


def check_document(tokens: Tensor, logits: Tensor) -> dict[str, Any]:
    """Return what check.json holds.

    Args:
        tokens: (sequences, tokens) int64.
        logits: (sequences, tokens, vocabulary) float32 of the calibrated model.

    Only the largest logits of each position are kept, with their token ids: a few hundred kilobytes whatever the
    vocabulary, and any corrupted weight moves them.
    """
    top = logits.topk(min(TOP_LOGITS, logits.shape[-1]), dim=-1)
    return {
        "tokens": tokens.tolist(),
        "top_ids": top.indices.tolist(),
        "top_logits": [[[float(f"{x:.6g}") for x in row] for row in rows] for rows in top.values.tolist()],
        "spread": float(logits.std()),
    }


def recorded_logits(document: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Return (tokens int64, ids int64, logits float32) of a check document, shapes as in `check_document`.

    Raises:
        KeyError, TypeError, ValueError: the document is not one.
    """
    try:
        tokens = torch.tensor(document["tokens"], dtype=torch.int64)
        ids = torch.tensor(document["top_ids"], dtype=torch.int64)
        values = torch.tensor(document["top_logits"], dtype=torch.float32)
    except (RuntimeError, OverflowError) as error:  # a number that int64 cannot hold
        raise ValueError(str(error)) from error
    if ids.shape != values.shape or ids.shape[:2] != tokens.shape:
        raise ValueError("tokens, ids and logits do not belong together")
    return tokens, ids, values
