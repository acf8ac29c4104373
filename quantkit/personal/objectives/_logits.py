"""The logits that an objective wants, and no others: those of a large vocabulary would fill the memory."""

import inspect

import torch
from torch import Tensor, nn

from quantkit.personal.protocols import Batch


def scored_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the model says before each scored token: logits (scored, vocabulary) float32, and where.

    The other two are int64 (scored,): the example of each, and the token that is there. The head is asked for no
    position at which no example has a scored token behind it.
    """
    scored = batch.scored[:, 1:]
    rows, columns = scored.nonzero(as_tuple=True)
    wanted = torch.nonzero(scored.any(0)).flatten()
    chooses = "logits_to_keep" in inspect.signature(model.forward).parameters
    logits = model(
        input_ids=batch.tokens,
        attention_mask=batch.attention.long(),
        use_cache=False,
        **({"logits_to_keep": wanted} if chooses else {}),
    ).logits
    place = torch.searchsorted(wanted, columns) if chooses else columns
    return logits[rows, place].float(), rows, batch.tokens[rows, columns + 1]
