"""Reading text, and saying what is wrong with it."""

import json
import time

import pyarrow
import pyarrow.parquet
import pytest

from quantkit.calibrate import text
from quantkit.calibrate.text import Mix, Source, mixes, read_file, read_text
from quantkit.errors import DataError, NetworkError, UsageError

MIX = 'description = "two"\n[[sources]]\nfile = "a.txt"\nweight = 3\n[[sources]]\nfile = "b.jsonl"\n'
SUFFIXES = (".txt", ".jsonl", ".parquet")
PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")


@pytest.fixture
def no_network(monkeypatch):
    """The Hub is at a port of this machine where nobody answers."""
    for name in (*PROXIES, "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


def save(path, documents):
    if path.suffix == ".txt":
        path.write_text("".join(documents), encoding="utf-8")
    elif path.suffix == ".jsonl":
        lines = (json.dumps({"text": document, "other": 1}, ensure_ascii=False) + "\n" for document in documents)
        path.write_text("".join(lines), encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pyarrow.table({"other": [1] * len(documents), "text": documents}), path)
    return path


def refusal(path):
    with pytest.raises(DataError) as caught:
        read_file(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_each_row_is_a_document(tmp_path, suffix):
    documents = ["one\ntwo", "Ærø 漢字 🙂", "", 'quoted "text"', "line\u2028separator\x85\x0c"]
    corpus = read_file(save(tmp_path / f"a{suffix}", documents))
    assert corpus.documents == tuple(documents)
    assert not corpus.stream


def test_a_plain_text_is_one_stream(tmp_path):
    corpus = read_file(save(tmp_path / "a.txt", ["one\n\ntwo Ærø\n"]))
    assert corpus.documents == ("one\n\ntwo Ærø\n",)
    assert corpus.stream


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_byte_order_mark_and_windows_line_ends_are_no_text(tmp_path, suffix):
    path = save(tmp_path / f"a{suffix}", ["one"])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_file(path).documents == ("one",)


def test_blank_lines_of_jsonl_are_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"text": "one"}\n\n  \n{"text": "two"}\n')
    assert read_file(tmp_path / "a.jsonl").documents == ("one", "two")


@pytest.mark.parametrize(
    "line",
    ["not json", '{"text": "open', '{"content": "x"}', '"text"', "[1]", "null", "3"],
)
def test_a_malformed_line_is_named_by_its_number(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "good"}}\n\n{line}\n{{"text": "good"}}\n')
    assert refusal(path) == f'line 3 of {path} is not of the form {{"text": "…"}}'


@pytest.mark.parametrize(("value", "kind"), [("null", "NoneType"), ("3", "int"), ('["a"]', "list")])
def test_a_text_that_is_no_string(tmp_path, value, kind):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "good"}}\n{{"text": {value}}}\n')
    assert refusal(path) == f"`text` in line 2 of {path} is {kind}, not a string"


def test_a_row_of_parquet_without_text_is_named_by_its_number(tmp_path):
    path = save(tmp_path / "a.parquet", ["one", "two", None])
    assert refusal(path) == f"`text` in row 3 of {path} is NoneType, not a string"


def test_parquet_without_the_column(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"]}), tmp_path / "a.parquet")
    assert "is no parquet file with a column `text`" in refusal(tmp_path / "a.parquet")


@pytest.mark.parametrize("content", [b"", b"PAR1 and then nothing", b"text"])
def test_parquet_that_is_none(tmp_path, content):
    (tmp_path / "a.parquet").write_bytes(content)
    assert "is no parquet file with a column `text`" in refusal(tmp_path / "a.parquet")


@pytest.mark.parametrize("documents", [[], [""], [" \n", "\t"]], ids=["nothing", "empty", "blank"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_without_text(tmp_path, suffix, documents):
    path = save(tmp_path / f"a{suffix}", documents)
    assert str(path) in refusal(path)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".raw"])
def test_a_file_that_is_not_utf8(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes('{"text": "café"}\n'.encode("latin-1"))
    message = refusal(path)
    assert message.startswith(f"cannot read {path}")
    assert message.endswith("it must be UTF-8 text")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_is_not_there(tmp_path, suffix):
    with pytest.raises(DataError, match=f"there is no text file {tmp_path / 'a'}{suffix}"):
        read_text(str(tmp_path / f"a{suffix}"))


@pytest.mark.parametrize("name", ["wiki.test.raw", "wiki.tokens", "a.md", "LICENSE"])
def test_a_file_of_any_other_name_is_one_stream(tmp_path, name):
    (tmp_path / name).write_text(" = Title = \n one <unk> two\n")
    (corpus,) = read_text(str(tmp_path / name))
    assert (corpus.documents, corpus.stream) == ((" = Title = \n one <unk> two\n",), True)


@pytest.mark.parametrize("name", ["wiki.raw", "texts/wiki", "texts"])
def test_what_is_neither_a_name_nor_a_file(tmp_path, name):
    (tmp_path / "texts").mkdir()
    with pytest.raises(UsageError, match=r"^unknown text '.*' \(.*\) and there is no such file$"):
        read_text(str(tmp_path / name))


def test_a_file_does_not_hide_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "embedded").write_text("another text")
    assert len(read_text("embedded")[0].documents) > 100
    assert read_text("./embedded")[0].documents == ("another text",)


def test_the_models_own_text_cannot_be_read():
    with pytest.raises(UsageError, match="'self' is text that a model writes for --calibration"):
        read_text("self")


@pytest.mark.parametrize(("name", "hint"), [("embeded", "embedded"), ("wikitext", "wikitext2"), ("c5", "c4")])
def test_an_unknown_name_suggests_the_nearest(name, hint):
    with pytest.raises(UsageError, match=rf"^unknown text '{name}' \(did you mean .*{hint}"):
        read_text(name)


def test_every_mix_that_ships_is_well_formed():
    known = mixes()
    assert {"default", "embedded", "embedded-test", "c4", "wikitext2", "wikitext2-test"} <= set(known)
    for name, mix in known.items():
        assert mix.name == name
        assert mix.description
        assert all((source.file is None) != (source.dataset is None) for source in mix.sources)


def test_files_of_mixes_that_ship_exist():
    files = [source.file for mix in mixes().values() for source in mix.sources if source.file]
    assert files
    assert all(file.is_file() for file in files)


def test_the_embedded_text_needs_no_network(no_network):
    (corpus,) = read_text("embedded")
    assert len(corpus.documents) > 100
    assert not corpus.stream


def test_a_mix_of_ones_own(tmp_path):
    save(tmp_path / "a.txt", ["stream"])
    save(tmp_path / "b.jsonl", ["one", "two"])
    (tmp_path / "mine.toml").write_text(MIX)
    stream, documents = read_text(str(tmp_path / "mine.toml"))
    assert (stream.documents, stream.stream, stream.weight) == (("stream",), True, 3)
    assert (documents.documents, documents.stream, documents.weight) == (("one", "two"), False, 1)


MALFORMED = {
    "no toml": "not toml",
    "no sources": 'description = "x"',
    "empty": 'description = "x"\nsources = []',
    "no description": "[[sources]]\nfile = 'a.txt'",
    "nothing": 'description = "x"\n[[sources]]\nweight = 1',
    "both": 'description = "x"\n[[sources]]\nfile = "a.txt"\ndataset = "org/set"',
    "unknown key": 'description = "x"\n[[sources]]\nfile = "a.txt"\nwait = 1',
    "no weight": 'description = "x"\n[[sources]]\nfile = "a.txt"\nweight = 0',
    "text as weight": 'description = "x"\n[[sources]]\nfile = "a.txt"\nweight = "much"',
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_mix(tmp_path, content):
    (tmp_path / "bad.toml").write_text(content)
    with pytest.raises(UsageError, match=r"bad\.toml is not a calibration mix: "):
        Mix.load(tmp_path / "bad.toml")


@pytest.mark.parametrize("name", ["default", "c4", "wikitext2"])
def test_without_a_network_the_ways_out_are_named_at_once(no_network, name):
    started = time.monotonic()
    with pytest.raises(NetworkError) as caught:
        read_text(name)
    assert time.monotonic() - started < 2
    message = str(caught.value)
    assert message.startswith("no network for the calibration text ")
    assert all(way in message for way in ("--calibration embedded", ".jsonl", "HF_ENDPOINT", "127.0.0.1:9"))
    assert "\n" not in message


@pytest.mark.parametrize(
    ("error", "kind"),
    [(ConnectionError("gone\nmore"), NetworkError), (ValueError("no such split\nmore"), DataError)],
    ids=["connection", "split"],
)
def test_what_the_library_says_becomes_one_line(monkeypatch, error, kind):
    import datasets

    def failing(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", failing)
    monkeypatch.setattr(text, "_require_hub", lambda purpose: None)
    with pytest.raises(kind, match=f"org/set: {str(error).splitlines()[0]}; use --calibration embedded") as caught:
        Source(dataset="org/set").read()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stream", [False, True], ids=["documents", "stream"])
def test_rows_of_a_data_set_become_documents_or_a_stream(monkeypatch, stream):
    import datasets

    asked = {}

    def load(*names, **options):
        asked.update(options, names=names)
        return [{"body": "one"}, {"body": "two"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(text, "_require_hub", lambda purpose: None)
    source = Source(dataset="org/set", config="raw", column="body", stream=stream, join="\n\n", weight=0.5)
    corpus = source.read()
    assert corpus.documents == (("one\n\ntwo",) if stream else ("one", "two"))
    assert (corpus.stream, corpus.weight) == (stream, 0.5)
    assert (asked["names"], asked["split"], asked["streaming"]) == (("org/set", "raw"), "train", not stream)
