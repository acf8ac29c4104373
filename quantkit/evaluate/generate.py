"""Continuing a text, greedily or by sampling, the same on every run."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from quantkit.errors import UsageError
from quantkit.evaluate.loading import Model, Tokenizer, context_length, quiet


@torch.no_grad()
def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """Return how `model` continues `prompt`, up to the token that ends a text or the end of the context.

    Greedy at temperature 0; otherwise tokens are drawn from softmax(logits / temperature) by a generator of
    its own, so the global random state stays as it was. The prompt is not repeated.

    Raises:
        UsageError: the prompt is longer than the context, or empty where the tokenizer has no BOS;
            a value that is out of range.
    """
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise UsageError(f"temperature must be 0 or a positive number, not {temperature}")
    ids = _prompt_ids(tokenizer, prompt)
    context = context_length(model)
    if context and len(ids) > context:
        raise UsageError(f"the prompt has {len(ids)} tokens, more than the model's context of {context}")
    room = context - len(ids) + 1 if context else max_new_tokens
    generator = torch.Generator().manual_seed(seed)
    new: list[int] = []
    with quiet():
        for logits in _next_logits(model, ids, new):
            token = _choose(logits, temperature, generator)
            if token in _ends(model, tokenizer):
                break
            new.append(token)
            if len(new) == min(max_new_tokens, room):
                break
        return _text(tokenizer, ids, new)


def _prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    ids = list(tokenizer(prompt, verbose=False)["input_ids"])
    if not ids and tokenizer.bos_token_id is not None:
        ids = [int(tokenizer.bos_token_id)]
    if not ids:
        raise UsageError("the tokenizer has no BOS token to begin with; give a prompt that is not empty")
    return ids


def _ends(model: Model, tokenizer: Tokenizer) -> set[int]:
    """Return the tokens that end a text."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    if configured is None:
        configured = tokenizer.eos_token_id
    return {configured} if isinstance(configured, int) else set(configured or ())


def _next_logits(model: Model, ids: list[int], new: list[int]) -> Iterator[Tensor]:
    """Yield the logits of the token behind `ids` and `new`; the caller appends one to `new` each time."""
    fed, cache = ids, None
    while True:
        tokens = torch.tensor([fed], device=model.device)
        mask = torch.ones(1, len(ids) + len(new), dtype=torch.int64, device=model.device)
        output = model(tokens, attention_mask=mask, past_key_values=cache, use_cache=True)
        yield output.logits[0, -1].float().cpu()
        fed, cache = new[-1:], output.past_key_values


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    # the largest logit first: a tiny temperature then cannot overflow
    probabilities = ((logits - logits.max()) / temperature).softmax(-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _text(tokenizer: Tokenizer, ids: list[int], new: list[int]) -> str:
    """Return the text of `new`, decoded behind the prompt: alone, it could lose its leading space."""

    def decode(tokens: list[int]) -> str:
        text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    before, whole = decode(ids), decode(ids + new)
    return whole.removeprefix(before) if whole.startswith(before) else decode(new)
