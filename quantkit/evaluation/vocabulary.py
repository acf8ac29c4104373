"""Two models can be compared token by token only if their tokens are the same."""

from pathlib import Path

from quantkit.calibrate.data import load_tokenizer
from quantkit.errors import ModelError
from quantkit.evaluation.loading import quiet
from quantkit.model import names
from quantkit.model.skeleton import read_config


def refuse_other_tokens(model: str | Path, reference: str | Path, *, revision: str | None = None) -> None:
    """Raise ModelError unless both models have the same tokens, before any weight is read.

    `revision` is that of `model`.
    """
    directories = [
        names.resolve(str(model), revision=revision, weights=False).path,
        names.resolve(str(reference), weights=False).path,
    ]
    with quiet():
        sizes = [read_config(directory).get_text_config().vocab_size for directory in directories]
        tokens = [load_tokenizer(directory).get_vocab() for directory in directories]
    how = "compare models of one family, or use --tasks"
    if sizes[0] != sizes[1]:
        raise ModelError(f"the vocabularies of {model} and {reference} differ, {sizes[0]} and {sizes[1]} tokens; {how}")
    if tokens[0] != tokens[1]:
        token = min(set(tokens[0].items()) ^ set(tokens[1].items()))[0]
        raise ModelError(f"the tokenizers of {model} and {reference} differ, for example in {token!r}; {how}")
