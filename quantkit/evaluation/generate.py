"""Continuing a text, greedily or by sampling, the same on every run."""

import math

import torch

from quantkit.errors import ModelError, UsageError
from quantkit.evaluation.loading import Model, Tokenizer, context_length, quiet


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

    Greedy at temperature 0; otherwise tokens are drawn, and the global random state is left as it was. The prompt is
    not repeated.

    Raises:
        ModelError: its generation_config.json asks for what cannot be done, or its numbers are none.
        UsageError: the prompt fills the context, or is empty where the tokenizer has no BOS; a value out of range.
    """
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise UsageError(f"temperature must be 0 or a positive number, not {temperature}")
    ids = _prompt_ids(tokenizer, prompt)
    context = context_length(model)
    if context and len(ids) >= context:
        raise UsageError(f"the prompt has {len(ids)} tokens, which fills the model's context of {context}")
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    tokens = torch.tensor([ids], device=model.device)
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            output = model.generate(  # type: ignore[operator]
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=min(max_new_tokens, context - len(ids)) if context else max_new_tokens,
                pad_token_id=tokenizer.eos_token_id,  # nothing is padded, but without it transformers warns
                **sampling,
            )
        except torch.OutOfMemoryError:
            raise
        except (
            ValueError,
            TypeError,
            IndexError,
            AttributeError,
            RuntimeError,
        ) as error:  # settings that do not fit, or no numbers
            raise ModelError(
                f"the model cannot go on with the prompt as its generation_config.json says: {error}"
            ) from error
    return _text(tokenizer, ids, output[0, len(ids) :].tolist())


def _prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    ids = list(tokenizer(prompt, verbose=False)["input_ids"])
    if not ids and tokenizer.bos_token_id is not None:
        ids = [int(tokenizer.bos_token_id)]
    if not ids:
        raise UsageError("the tokenizer has no BOS token to begin with; give a prompt that is not empty")
    return ids


def _text(tokenizer: Tokenizer, ids: list[int], new: list[int]) -> str:
    """Return the text of `new`, decoded behind the prompt: alone, it could lose its leading space."""

    def decode(tokens: list[int]) -> str:
        text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    before, whole = decode(ids), decode(ids + new)
    return whole.removeprefix(before) if whole.startswith(before) else decode(new)
