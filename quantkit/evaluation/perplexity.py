"""Perplexity of a model on a text, by the field's protocol: windows do not overlap, loss in float32."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.calibrate.team import Team
from quantkit.evaluation.loading import Model, quiet

BATCH_TOKENS = 1024  # how many tokens run at once, at least one window
CHUNK = 512  # positions whose float32 logits are alive at once, whatever the vocabulary


@dataclass(frozen=True)
class Perplexity:
    """A measured perplexity.

    Attributes:
        perplexity: exp(loss), infinite where that overflows.
        loss: mean cross-entropy per predicted token, in nats.
        tokens: predicted tokens: all but the first of each window.
        windows: number of windows.
        reference: that of the model that it is held against, on the same windows.
    """

    perplexity: float
    loss: float
    tokens: int
    windows: int
    reference: "Perplexity | None" = None


@torch.no_grad()
@quiet()
def perplexity(
    model: Model, windows: Tensor, progress: Callable[[int, int], None] | None = None, team: Team | None = None
) -> Perplexity:
    """Return the perplexity of `model` on `windows`, (windows, seqlen) int64, seqlen at least 2.

    Every token of a window but its first is predicted from the tokens before it in the same window.
    `progress` is told (windows done, windows in all). Of several processes each takes every so-many-th batch.
    """
    team = team or Team()
    loss, tokens, done = 0.0, 0.0, 0
    for batch in list(batches(windows))[team.rank :: team.size]:
        logits = model(batch.to(model.device), use_cache=False).logits
        for predicted, target in chunks(logits, batch):
            loss += F.cross_entropy(predicted, target, reduction="sum").item()
            tokens += len(target)
        done += len(batch)
        if progress:
            progress(min(done * team.size, len(windows)), len(windows))
    loss, tokens = team.total(loss, tokens)
    return Perplexity(perplexity=exp(loss / tokens), loss=loss / tokens, tokens=int(tokens), windows=len(windows))


def batches(windows: Tensor) -> Iterator[Tensor]:
    """Yield the windows in batches of about `BATCH_TOKENS` tokens."""
    yield from torch.split(windows, max(1, BATCH_TOKENS // windows.shape[1]))


def chunks(logits: Tensor, batch: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (float32 logits (positions, vocabulary), the tokens that follow), `CHUNK` positions at a time."""
    predicted = torch.split(logits[:, :-1].flatten(0, 1), CHUNK)
    targets = torch.split(batch[:, 1:].flatten().to(logits.device), CHUNK)
    for part, target in zip(predicted, targets, strict=True):
        yield part.float(), target


def exp(loss: float) -> float:
    """Return e to the power of `loss`, infinity where it overflows, NaN for NaN."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
