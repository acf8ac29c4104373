"""Calibration text that the model writes itself, for those who have neither data nor a network.

After LLM-QAT (Liu et al., arXiv 2305.17888, section 3.1): each sequence starts with one token and goes on with tokens
drawn from the model's own distribution at temperature 1. There the first token is drawn from the vocabulary, and the
next few are the most likely ones; here the first is BOS where the tokenizer has one, which is how texts begin, so that
no few need be forced into sense.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from quantkit.errors import ModelError

MOST_AT_ONCE = 64  # sequences; more make no step faster
SMALL_CACHE = 64 * 2**20  # elements of keys and values that are no matter, however small the model is


@torch.no_grad()
def sample_tokens(  # noqa: PLR0913
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    at_once: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Return sequences that `model` wrote, (samples, seqlen) int64.

    Where the model ends a text, BOS begins the next one in the place of EOS, as between the joined documents of other
    calibration text; without a BOS the EOS stays. `at_once` sequences are written side by side; the arguments decide
    the result, and the global random state is neither used nor changed. `progress` is told (tokens done, tokens in
    all).

    Raises:
        ModelError: the model's logits are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    first = _first_tokens(model, tokenizer, samples, generator)
    draws = torch.rand(samples, seqlen, generator=generator, dtype=torch.float64)
    tokens = torch.empty(samples, seqlen, dtype=torch.int64)
    done = 0
    for start in range(0, samples, at_once):
        part = slice(start, start + at_once)
        tokens[part, 0], cache = first[part], None
        for place in range(1, seqlen):
            new = tokens[part, 0 if cache is None else place - 1 : place]  # all of them if the model keeps no cache
            output = model(input_ids=new.to(model.device), past_key_values=cache, use_cache=True)
            cache = getattr(output, "past_key_values", None)
            drawn = draw(output.logits[:, -1], draws[part, place])
            if tokenizer.bos_token_id is not None:
                drawn[drawn == tokenizer.eos_token_id] = tokenizer.bos_token_id
            tokens[part, place] = drawn
            done += len(drawn)
            if progress:
                progress(done, samples * (seqlen - 1))
    return tokens


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Return the tokens that the numbers `uniform` of [0, 1) select from softmax(logits), by its cumulative sums.

    Shapes (batch, vocabulary) and (batch,), the result is on the CPU. The numbers, not the device, decide.

    Raises:
        ModelError: the logits of a token are no distribution.
    """
    cumulative = logits.float().softmax(-1).cumsum(-1, dtype=torch.float64).cpu()
    if not cumulative[:, -1].isfinite().all():
        raise ModelError("the model's logits are not finite, so it can write no text; its weights are damaged")
    below = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, below, right=True).squeeze(1).clamp_(max=logits.shape[-1] - 1)


def sequences_at_once(parameters: int, config: PretrainedConfig, seqlen: int) -> int:
    """Return how many sequences are written side by side: as many as keep the cache no larger than the weights.

    It depends on sizes alone, not on the memory that is free, because rounding depends on it: two runs give the same.
    """
    return min(MOST_AT_ONCE, max(1, max(parameters, SMALL_CACHE) // cache_elements(config, seqlen)))


def cache_elements(config: PretrainedConfig, seqlen: int) -> int:
    """Return how many numbers the keys and values of one sequence are at most."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    stored_heads = getattr(text, "num_key_value_heads", None) or heads
    return int(2 * text.num_hidden_layers * seqlen * stored_heads * head_dim)


def _first_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: int, generator: torch.Generator
) -> Tensor:
    if tokenizer.bos_token_id is not None:
        return torch.full((samples,), int(tokenizer.bos_token_id))
    known = min(len(tokenizer), model.config.get_text_config().vocab_size)
    words = torch.tensor(sorted(set(range(known)) - set(tokenizer.all_special_ids)))
    return words[torch.randint(len(words), (samples,), generator=generator)]
