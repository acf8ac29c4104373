"""How far a model's predictions are from those of the model that it was made from."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.evaluation.loading import Model, quiet
from quantkit.evaluation.perplexity import batches, chunks, exp


@dataclass(frozen=True)
class Divergence:
    """A measured divergence, over all predicted tokens.

    Attributes:
        kl: mean KL(reference || model) of the next-token distributions, in nats.
        top1_agreement: share of positions where both find the same token most likely.
        perplexity: of the model.
        reference_perplexity: of the reference.
        tokens: predicted tokens.
    """

    kl: float
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
    sums = torch.zeros(4, dtype=torch.float64)
    tokens = done = 0
    for batch in batches(windows):
        logits = model(batch.to(model.device), use_cache=False).logits
        expected = reference(batch.to(reference.device), use_cache=False).logits.to(logits.device)
        pairs = zip(chunks(logits, batch), chunks(expected, batch), strict=True)
        for (actual, target), (original, _) in pairs:
            sums += _sums(original.log_softmax(-1), actual.log_softmax(-1), target).cpu()
            tokens += len(target)
        done += len(batch)
        if progress:
            progress(done, len(windows))
    kl, agreeing, loss, reference_loss = (sums / tokens).tolist()
    return Divergence(
        kl=kl,
        top1_agreement=agreeing,
        perplexity=exp(loss),
        reference_perplexity=exp(reference_loss),
        tokens=tokens,
    )


def _sums(p: Tensor, q: Tensor, target: Tensor) -> Tensor:
    """Return (Σ KL(p||q), positions with the same argmax, Σ loss of q, of p) from log-probabilities."""
    # a token of probability 0 contributes nothing, but 0·(-inf - q) would be NaN
    terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
    agreeing = (p.argmax(-1) == q.argmax(-1)).sum()
    losses = [F.nll_loss(value, target, reduction="sum") for value in (q, p)]
    return torch.stack([value.double() for value in (terms.sum(-1).double().sum(), agreeing, *losses)])
