"""How far a model's predictions are from those of the model that it was made from."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.evaluation.loading import Model, quiet
from quantkit.evaluation.perplexity import batches, chunks, exp

# where the bars of the histogram end: below, between two neighbours, and above
EDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True)
class Divergence:
    """A measured divergence, over all predicted tokens.

    Attributes:
        kl: mean KL(reference || model) of the next-token distributions, in nats.
        kl_median, kl_p99, kl_max: of the divergences of single positions, the median, the 99th percentile (the
            smallest one that at least that share does not exceed) and the largest.
        kl_histogram: positions below the first of `EDGES`, between two neighbours, and above the last.
        top1_agreement: share of positions where both find the same token most likely.
        perplexity: of the model.
        reference_perplexity: of the reference.
        tokens: predicted tokens.
    """

    kl: float
    kl_median: float
    kl_p99: float
    kl_max: float
    kl_histogram: tuple[int, ...]
    top1_agreement: float
    perplexity: float
    reference_perplexity: float
    tokens: int


@torch.no_grad()
@quiet()
def divergence(
    model: Model,
    reference: Model,
    windows: Tensor,
    progress: Callable[[int, int], None] | None = None,
) -> Divergence:
    """Return how `model` differs from `reference` on `windows`, (windows, seqlen) int64, in one pass.

    Raises:
        ModelError: the vocabularies differ.
    """
    vocabularies = [each.config.get_text_config().vocab_size for each in (model, reference)]
    if vocabularies[0] != vocabularies[1]:
        raise ModelError(
            f"the vocabularies differ, {vocabularies[0]} and {vocabularies[1]} tokens; "
            "give the model that it was made from"
        )
    measured = []
    done = 0
    for batch in batches(windows):
        logits = model(batch.to(model.device), use_cache=False).logits
        expected = reference(batch.to(reference.device), use_cache=False).logits.to(logits.device)
        pairs = zip(chunks(logits, batch), chunks(expected, batch), strict=True)
        measured += [_measure(p.log_softmax(-1), q.log_softmax(-1), target).cpu() for (q, target), (p, _) in pairs]
        done += len(batch)
        if progress:
            progress(done, len(windows))
    return _summary(torch.cat(measured, dim=1).double())


def _measure(p: Tensor, q: Tensor, target: Tensor) -> Tensor:
    """Return per position KL(p||q), whether the argmax is the same, loss of q and of p: (4, positions).

    p and q are log-probabilities, (positions, vocabulary).
    """
    # a token of probability 0 contributes nothing, but 0·(-inf - q) would be NaN
    terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
    agreeing = (p.argmax(-1) == q.argmax(-1)).to(p.dtype)
    losses = [F.nll_loss(value, target, reduction="none") for value in (q, p)]
    return torch.stack([terms.sum(-1), agreeing, *losses])


def _summary(measured: Tensor) -> Divergence:
    """Return the figures of (4, positions) float64, the rows as `_measure` gives them."""
    kl, agreement, loss, reference_loss = measured.mean(dim=1).tolist()
    ordered = measured[0].sort().values
    positions = len(ordered)
    bars = torch.bucketize(ordered, torch.tensor(EDGES, dtype=torch.float64), right=True)
    return Divergence(
        kl=kl,
        kl_median=float(ordered[math.ceil(0.5 * positions) - 1]),
        kl_p99=float(ordered[math.ceil(0.99 * positions) - 1]),
        kl_max=float(ordered[-1]),
        kl_histogram=tuple(torch.bincount(bars, minlength=len(EDGES) + 1).tolist()),
        top1_agreement=agreement,
        perplexity=exp(loss),
        reference_perplexity=exp(reference_loss),
        tokens=positions,
    )
