"""A tokenizer.json as llama.cpp has to be told of it: tokens with types and scores, and the name of how text is split.

llama.cpp knows byte-level BPE (`gpt2`), where it goes by a name for the way text is split into words, and the BPE of
SentencePiece (`llama`), where it goes by a score for each token. The names stand for the regular expressions of its
`src/llama-vocab.cpp`, the numbers of the token types are those of the GGUF specification.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import ModelError
from quantkit.untrusted import parse_json, read_document

FILE = "tokenizer.json"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# (what splits text, one after the other; whether a word that is a token is never split) → llama.cpp's name
_SPLITTING = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGIT, _GPT2), False): "smollm",
    ((_WORDS + r"\p{N}{1,3}" + _REST,), True): "llama-bpe",
    ((_WORDS + r"\p{N}{1,3}" + _REST,), False): "smaug-bpe",
    ((_WORDS + r"\p{N}" + _REST,), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenizer:
    """What a GGUF file says of a tokenizer.

    Attributes:
        model: `gpt2` or `llama`.
        splitting: llama.cpp's name of the regular expressions; `default` for `llama`, which has none.
        tokens: the tokens, by id.
        types: of each token.
        scores: of each token of `llama`, the greater the earlier it is merged; empty for `gpt2`.
        space_first: whether a space is put before the text.
    """

    model: str
    splitting: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    space_first: bool


def read_tokenizer(directory: Path) -> Tokenizer:
    """Return what llama.cpp has to know of the tokenizer in `directory`.

    Raises:
        ModelError: there is none, or none that llama.cpp knows.
    """
    path = directory / FILE
    try:
        content = parse_json(read_document(path))
        return _read(content)
    except ModelError as error:
        raise ModelError(f"{path} {error}; no GGUF file can be written for it") from error
    except OSError as error:
        raise ModelError(f"{directory} has no {FILE}, and a GGUF file holds the tokenizer; add it") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is no tokenizer of the tokenizers library; download it again") from error


def _read(content: Mapping[str, Any]) -> Tokenizer:
    model, added = content["model"], {token["id"]: token for token in content["added_tokens"]}
    if model["type"] != "BPE":
        raise ModelError(f"is a tokenizer of the kind {model['type']}, which quantkit cannot describe to llama.cpp")
    texts = {index: text for text, index in model["vocab"].items()}
    texts |= {index: token["content"] for index, token in added.items()}
    if sorted(texts) != list(range(len(texts))):
        raise ModelError("leaves out ids between its tokens")
    sentencepiece = bool(model.get("byte_fallback"))
    tokens = [texts[index] for index in range(len(texts))]
    unknown = model.get("unk_token") if sentencepiece else None
    return Tokenizer(
        model="llama" if sentencepiece else "gpt2",
        splitting="default" if sentencepiece else _splitting(content),
        tokens=tokens,
        types=[_type(text, added.get(index), unknown) for index, text in enumerate(tokens)],
        scores=_scores(tokens, model["merges"]) if sentencepiece else [],
        space_first=sentencepiece and _space_first(content),
    )


def _type(text: str, added: Mapping[str, Any] | None, unknown: str | None) -> int:
    if unknown is not None:  # of SentencePiece
        if text == unknown:
            return UNKNOWN
        if len(text) == 6 and text.startswith("<0x"):
            return BYTE
    if added is None:
        return NORMAL
    return CONTROL if added["special"] else USER_DEFINED


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """Return minus the place of each token among the merges, the order of SentencePiece's own scores for its BPE.

    Characters, which no merge makes, come last.
    """
    places: dict[str, int] = {}
    for place, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        places.setdefault("".join(pair), place)
    return [-float(places.get(token, len(merges))) for token in tokens]


def _splitting(content: Mapping[str, Any]) -> str:
    expressions = tuple(_expressions(content["pre_tokenizer"]))
    name = _SPLITTING.get((expressions, bool(content["model"].get("ignore_merges"))))
    if name is None:
        raise ModelError("splits text in a way for which quantkit knows no name of llama.cpp's")
    return name


def _expressions(splitter: Mapping[str, Any]) -> Iterator[str]:
    """Yield the regular expressions by which a pre-tokenizer splits, one after the other."""
    kind = splitter["type"]
    if kind == "Sequence":
        for part in splitter["pretokenizers"]:
            yield from _expressions(part)
    elif kind == "Split" and splitter["behavior"] == "Isolated" and not splitter["invert"]:
        yield splitter["pattern"]["Regex"]
    elif kind == "Digits" and splitter["individual_digits"]:
        yield _DIGIT
    elif kind == "ByteLevel" and not splitter["add_prefix_space"]:
        yield from [_GPT2] if splitter.get("use_regex", True) else []
    else:
        yield kind  # a name is no expression of the table, so it is refused


def _space_first(content: Mapping[str, Any]) -> bool:
    """Return whether normalizer or pre-tokenizer put a space before the text."""
    parts = [content.get("normalizer") or {}, content.get("pre_tokenizer") or {}]
    parts += parts[0].get("normalizers", [])
    return any(
        part.get("type") == "Prepend" or (part.get("type") == "Metaspace" and part.get("prepend_scheme") != "never")
        for part in parts
    )
