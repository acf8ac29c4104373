"""Token sequences for calibration and evaluation."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from quantkit.calibrate.text import Corpus
from quantkit.errors import DataError, ModelError

AT_ONCE = 64  # documents that are tokenized together


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer.

    Raises:
        ModelError: there is none, or it cannot be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        if not isinstance(tokenizer.model_max_length, int | float):
            raise TypeError(f"model_max_length is {tokenizer.model_max_length!r}, no number")
        return tokenizer
    except MemoryError:
        raise
    except Exception as error:  # tokenizers raises plain ones
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .:")
        raise ModelError(
            f"{directory} has no tokenizer that can be loaded: {reason}; copy the tokenizer files of the original there"
        ) from error


def calibration_tokens(
    corpora: Sequence[Corpus],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    seqlen: int,
    seed: int,
) -> Tensor:
    """Return at most `samples` sequences of `seqlen` tokens, (samples, seqlen) int64, drawn from the corpora by weight.

    Documents are shuffled, joined and cut; of a stream, windows are drawn without overlap. The result depends on
    nothing but the arguments. Fewer rows come back if the text is too short.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = _shares([corpus.weight for corpus in corpora], samples)
    rows = [
        _draw(corpus, tokenizer, count, seqlen, generator)
        for corpus, count in zip(corpora, counts, strict=True)
        if count
    ]
    drawn = torch.cat(rows)
    return drawn[torch.randperm(len(drawn), generator=generator)]


def evaluation_windows(
    corpora: Sequence[Corpus],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seqlen: int,
    windows: int | None = None,
    bos: bool = False,
) -> Tensor:
    """Return the text as one stream cut into windows, (windows, seqlen) int64, in order, the last partial one dropped.

    With `bos` every window begins with the tokenizer's BOS, which counts towards `seqlen`.

    Raises:
        DataError: the text is shorter than one window, or the tokenizer has no BOS to put first.
    """
    if bos and tokenizer.bos_token_id is None:
        raise DataError("--bos was asked for but the tokenizer has no BOS token")
    stream = list(chain.from_iterable(_tokenize(corpus, tokenizer, corpus.documents) for corpus in corpora))
    body = seqlen - bos
    if len(stream) < body:
        raise DataError(f"the text has {len(stream)} tokens, fewer than one window of {seqlen}; lower --seqlen")
    rows = torch.tensor(stream[: len(stream) // body * body], dtype=torch.int64).view(-1, body)[:windows]
    if bos:
        rows = torch.cat([torch.full((len(rows), 1), int(tokenizer.bos_token_id)), rows], dim=1)
    return rows


def refuse_unknown_tokens(tokens: Tensor, vocabulary: int) -> None:
    """Raise DataError for a token that a model of so many tokens does not have."""
    if tokens.numel() and int(tokens.max()) >= vocabulary:
        raise DataError(
            f"the tokenizer gives token {int(tokens.max())} but the model's vocabulary ends at {vocabulary - 1}; "
            "the tokenizer files belong to another model"
        )


def _tokenize(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, documents: Sequence[str]) -> list[int]:
    # verbose=False: a stream is longer than the model's context on purpose, no warning is due
    tokens: list[int] = []
    for start in range(0, len(documents), AT_ONCE):  # a tokenizer notes hundreds of bytes about each token
        some = list(documents[start : start + AT_ONCE])
        encoded = tokenizer(some, add_special_tokens=not corpus.stream, verbose=False)["input_ids"]
        tokens += chain.from_iterable(encoded)
    return tokens


def _draw(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, count: int, seqlen: int, generator: torch.Generator
) -> Tensor:
    if corpus.stream:
        stream = torch.tensor(_tokenize(corpus, tokenizer, corpus.documents), dtype=torch.int64)
        windows = stream[: len(stream) // seqlen * seqlen].view(-1, seqlen)
        return windows[torch.randperm(len(windows), generator=generator)[:count]]
    tokens: list[int] = []
    order = torch.randperm(len(corpus.documents), generator=generator).tolist()
    for start in range(0, len(order), AT_ONCE):  # tokenize only as much as is needed
        if len(tokens) >= count * seqlen:
            break
        tokens += _tokenize(corpus, tokenizer, [corpus.documents[i] for i in order[start : start + AT_ONCE]])
    whole = min(count, len(tokens) // seqlen)
    return torch.tensor(tokens[: whole * seqlen], dtype=torch.int64).view(whole, seqlen)


def _shares(weights: Sequence[float], total: int) -> list[int]:
    """Split `total` in proportion to the weights; what rounding leaves goes to the largest remainders."""
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares
