"""What llama.cpp is told of a tokenizer: tokens, types, how text is split, and scores that merge as merges do."""

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
from gguf_models import BYTES, SPLITTINGS, TINY, split, write_tokenizer
from transformers import AutoTokenizer

from quantkit.errors import ModelError
from quantkit.exporters._gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, read_tokenizer

SHARED = Path(os.environ.get("QUANTKIT_SHARED", Path(__file__).resolve().parents[2].parent / "shared"))


def sentencepiece(directory, **entries):
    """Write a little tokenizer of the kind that is made from a SentencePiece model."""
    texts = ["<unk>", "<s>", "</s>", "<0x0A>", "▁", "a", "b", "ab", "▁ab", "aba"]
    model = {
        "type": "BPE",
        "byte_fallback": True,
        "unk_token": "<unk>",
        "vocab": {text: index for index, text in enumerate(texts)},
        "merges": [["a", "b"], ["▁", "ab"], "ab a"],
    }
    special = [{"id": index, "content": texts[index], "special": True} for index in range(3)]
    added = [*special, {"id": len(texts), "content": "<mine>", "special": False}]
    content = {"added_tokens": added, "normalizer": None, "pre_tokenizer": None, "model": model, **entries}
    (directory / "tokenizer.json").write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize("name", SPLITTINGS)
def test_the_way_of_splitting_is_named(name, tmp_path):
    pre_tokenizer, whole = SPLITTINGS[name]
    read = read_tokenizer(write_tokenizer(tmp_path, {"ignore_merges": whole}, pre_tokenizer=pre_tokenizer))
    assert (read.model, read.splitting) == ("gpt2", name)
    assert not read.scores
    assert not read.space_first


def test_special_tokens_control():
    read = read_tokenizer(TINY)
    assert len(read.tokens) == len(read.types) == 1024
    assert read.tokens[:3] == ["<s>", "</s>", "<pad>"]
    assert read.types == [CONTROL] * 3 + [NORMAL] * 1021


def test_sentencepiece_has_types_and_scores(tmp_path):
    read = read_tokenizer(sentencepiece(tmp_path))
    assert (read.model, read.splitting) == ("llama", "default")
    assert read.types == [UNKNOWN, CONTROL, CONTROL, BYTE, *[NORMAL] * 6, USER_DEFINED]
    score = dict(zip(read.tokens, read.scores, strict=True))
    assert score["ab"] > score["▁ab"] > score["aba"] > score["a"]


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({}, False),
        ({"normalizer": {"type": "Prepend", "prepend": "▁"}}, True),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]}}, True),
        ({"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}}, True),
        ({"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never"}}, False),
    ],
)
def test_a_space_before_the_text_is_seen(entries, expected, tmp_path):
    assert read_tokenizer(sentencepiece(tmp_path, **entries)).space_first == expected


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"pre_tokenizer": split("[a-z]+")},
            "splits text in a way for which quantkit knows no name of llama.cpp's; no",
        ),
        ({"pre_tokenizer": BYTES | {"add_prefix_space": True}}, "splits text in a way"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "splits text in a way"),
        ({"model": {"ignore_merges": True}}, "splits text in a way"),
        ({"model": {"type": "Unigram"}}, "is a tokenizer of the kind Unigram"),
        ({"model": {"vocab": {"a": 0, "b": 2000}}}, "leaves out ids between its tokens"),
        ({"added_tokens": 5}, "is no tokenizer of the tokenizers library; download it again"),
        ({"pre_tokenizer": None}, "is no tokenizer of the tokenizers library"),
    ],
)
def test_what_llama_cpp_does_not_know_is_refused(entries, message, tmp_path):
    with pytest.raises(ModelError, match=message):
        read_tokenizer(write_tokenizer(tmp_path, **entries))


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"has no tokenizer.json, and a GGUF file holds the tokenizer; add it"):
        read_tokenizer(tmp_path)


def merge_by_score(text, score):
    """Merge the neighbours whose token has the best score until there are none, as llama.cpp does; from the left."""
    pieces = list(text)
    while True:
        merged = enumerate(map("".join, pairwise(pieces)))
        pairs = [(score[token], -place) for place, token in merged if token in score]
        if not pairs:
            return pieces
        place = -max(pairs)[1]
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared folder")
def test_scores_merge_as_the_tokenizer_does():
    directory = SHARED / "models" / "stories15m"
    read, tokenizer = read_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    score = dict(zip(read.tokens, read.scores, strict=True))
    for text in ("Once upon a time, there was a little rabbit.", "unbelievably, incomprehensible misunderstandings"):
        expected = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids)
        assert merge_by_score("▁" + text.replace(" ", "▁"), score) == expected
