"""Rows of files become examples: columns, what is scored, what is cut, and what is refused, by its row."""

import csv

import pytest
from datasets import Dataset
from families import save_tokenizer
from tinies import write_rows

from quantkit.calibrate.data import load_tokenizer
from quantkit.errors import DataError, UsageError
from quantkit.personal.data import Example, Form, batch, examples, read_rows, split

WORDS = {"0": "n", "1": "p"}
CHAT = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)
    made = load_tokenizer(directory)
    made.chat_template = CHAT
    return made


def texts(tokenizer, made):
    return ["".join(tokenizer.convert_ids_to_tokens(e.tokens)) for e in made]


def scored(tokenizer, example):
    return "".join(tokenizer.convert_ids_to_tokens(example.tokens[example.scored :]))


@pytest.mark.parametrize("end", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_kind_of_file(tmp_path, end):
    rows, path = [{"prompt": f'p{i}, "x"', "answer": f"a{i}"} for i in range(3)], tmp_path / f"data.{end}"
    if end in ("json", "jsonl"):
        write_rows(path, rows)
    elif end == "parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "answer"], delimiter="," if end == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    assert read_rows(path) == rows


@pytest.mark.parametrize(
    ("row", "options", "text", "counts"),
    [
        ({"text": "abc"}, {}, "abc", "bc"),
        ({"prompt": "abc", "answer": "de"}, {}, "abcde</s>", "de</s>"),
        ({"prompt": "abc", "answer": "de"}, {"score": "all"}, "abcde</s>", "bcde</s>"),
        ({"sentence": "abc", "label": 1}, {"words": WORDS, "template": "{sentence}?"}, "abc?p", "p"),
        ({"sentence": "ab", "label": "0", "who": "z"}, {"words": WORDS, "template": "{who}:{sentence}"}, "z:abn", "n"),
        ({"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]}, {},
         "<u>ab\n<a>cd\n", "cd\n"),
        ({"story": "abc"}, {"columns": {"text": "story"}}, "abc", "bc"),
        ({"text": "abcdef"}, {"length": 4, "cut": True}, "abcd", "bcd"),
        ({"prompt": "abcdef", "answer": "g"}, {"length": 4, "cut": True}, "efg</s>", "g</s>"),
    ],
)  # fmt: skip
def test_rows_and_what_is_scored(tokenizer, row, options, text, counts):
    (made,) = examples([row], tokenizer, Form(**{"length": 64, **options}))
    assert texts(tokenizer, [made]) == [text]
    assert scored(tokenizer, made) == counts
    assert made.label == (None if "label" not in row else int(row["label"]))


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"title": "a"}, {}, "has the columns title; needed are messages or prompt.answer or sentence.label or text"),
        ({"text": 5}, {}, "row 2 of data has no text in 'text'"),
        ({"text": " "}, {}, "row 2 of data has no text in 'text'"),
        ({"text": "a"}, {}, "row 2 of data is a single token, which leaves nothing to predict"),
        ({"text": "a" * 65}, {}, "row 2 of data is 65 tokens, more than 64; shorten it, raise --seqlen, or cut"),
        ({"prompt": "a", "answer": "b" * 80}, {"cut": True}, "answer of 81 tokens, which leaves no room"),
        ({"prompt": "a", "answer": ""}, {}, "row 2 of data has no text in 'answer'"),
        ({"sentence": "a", "label": 7}, {"words": WORDS}, "row 2 of data has the label '7', which has no word"),
        ({"sentence": "a", "label": 1}, {}, "labels need words; give one for each"),
        ({"sentence": "a", "label": 1}, {"words": {"0": "no", "1": "y"}}, "word 'no' of label '0' is 2 tokens"),
        ({"sentence": "a", "label": 1}, {"words": {"0": "y", "1": "y"}}, "two labels have the same word"),
        ({"sentence": "a", "label": 1}, {"words": WORDS, "template": "{x}"}, "template '{x}' asks for a column"),
        ({"messages": [{"role": "user", "content": "a"}]}, {}, "row 2 of data has no messages of the form"),
        ({"messages": "hello"}, {}, "row 2 of data has no messages of the form"),
    ],
)
def test_rows_that_are_refused(tokenizer, row, options, message):
    good = {
        "text": {"text": "ab"},
        "prompt": {"prompt": "a", "answer": "b"},
        "sentence": {"sentence": "ab", "label": 0},
        "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "title": {"title": "a"},
    }[next(iter(row))]
    with pytest.raises((DataError, UsageError), match=message):
        examples([good, row], tokenizer, Form(**{"length": 64, **options}), "data")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.txt", "a", "is no .jsonl, .json, .csv, .tsv, .parquet file"),
        ("data.jsonl", "", "has no examples|cannot be read as json"),
        ("data.jsonl", "{", "cannot be read as json"),
        ("data.parquet", "no parquet", "cannot be read as parquet"),
        ("data.csv", "text\n", "cannot be read as csv"),
    ],
)
def test_files_that_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / name)
    with pytest.raises(DataError, match="there is no file"):
        read_rows(tmp_path / "absent.jsonl")


def test_splits_are_drawn_and_never_empty():
    items = [Example((1, number), 1) for number in range(20)]
    train, kept = split(items, 0.25, seed=1)
    assert (len(train), len(kept)) == (15, 5)
    assert sorted(train + kept, key=lambda e: e.tokens) == items
    assert split(items, 0.25, seed=1) == (train, kept)
    assert split(items, 0.25, seed=2) != (train, kept)
    assert split(items, 0, seed=1) == (items, [])
    for share in (0.001, 0.999):
        with pytest.raises(DataError, match="one part would be empty"):
            split(items, share, seed=1)


def test_batches_are_padded_on_the_right():
    made = batch([Example((5, 6, 7), 2, 0), Example((8, 9), 1, 1)])
    assert made.tokens.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert made.attention.tolist() == [[True] * 3, [True, True, False]]
    assert made.scored.tolist() == [[False, False, True], [False, True, False]]
    assert made.label.tolist() == [0, 1]
