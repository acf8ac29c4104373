"""Text for calibration and evaluation: local files, and named mixes from `calibration/*.toml`."""

import os
import re
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import psutil

from quantkit.errors import DataError, NetworkError, UsageError, nearest
from quantkit.resources import data_dir
from quantkit.untrusted import is_file, parse_json, parse_toml, read_document

SELF = "self"  # the name of text that is not read but written by the model, see self_text.py
SELF_DESCRIPTION = "text that the model itself writes, token by token; for models that fit into memory; works offline"
MOST_WEIGHT = 1e100  # beyond it, sums of weights are no numbers any more
_DATASET = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
MOST_DOCUMENTS = 20_000  # read from one Hub source: far more than any calibration needs, far less than C4
WAYS_OUT = "use --calibration embedded or self, a local text, .jsonl or .parquet file, or set HF_ENDPOINT to a mirror"


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Text and how it is to be read.

    Attributes:
        documents: the texts, in file order.
        stream: the documents are one running text, tokenized as it is; otherwise each document gets the tokenizer's
            special tokens (BOS where it has one).
        weight: share of the calibration samples that come from here.
    """

    documents: tuple[str, ...]
    stream: bool = False
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One entry of a mix: a local file, or a data set on the Hub."""

    file: Path | None = None
    dataset: str | None = None
    config: str | None = None
    data_files: str | None = None
    split: str = "train"
    revision: str | None = None
    column: str = "text"
    stream: bool = False
    join: str = "\n"
    weight: float = 1.0

    def __post_init__(self) -> None:
        if (self.file is None) == (self.dataset is None):
            raise ValueError("a source has either `file` or `dataset`")
        if not 0 < self.weight < MOST_WEIGHT:
            raise ValueError(f"weight must be a positive number, not {self.weight}")
        if self.dataset is not None and not _DATASET.fullmatch(self.dataset):
            raise ValueError(f"dataset must be the name of one on the Hub, not {self.dataset!r}")
        if self.data_files is not None and not _is_relative(self.data_files):
            raise ValueError(f"data_files must be files of the data set, not {self.data_files!r}")
        if not all(isinstance(each, str) for each in (self.split, self.column, self.join)):
            raise ValueError("split, column and join must be strings")
        if not isinstance(self.stream, bool):
            raise ValueError(f"stream must be true or false, not {self.stream!r}")

    def read(self) -> Corpus:
        """Return the text of this source.

        Raises:
            DataError: the file or the data set cannot be read.
            NetworkError: the Hub cannot be reached.
        """
        if self.file is not None:
            corpus = read_file(self.file)
            return Corpus(documents=corpus.documents, stream=corpus.stream, weight=self.weight)
        documents = tuple(islice(self._download(), None if self.stream else MOST_DOCUMENTS))
        if self.stream:
            documents = (self.join.join(documents),)
        return Corpus(documents=documents, stream=self.stream, weight=self.weight)

    def _download(self) -> Iterator[str]:
        _require_hub(f"the calibration text {self.dataset}")
        from datasets import (
            load_dataset,
        )  # here, because it takes seconds to import and offline runs never need it

        try:
            rows = load_dataset(
                self.dataset,
                self.config,
                data_files=self.data_files,
                split=self.split,
                revision=self.revision,
                streaming=not self.stream,
            )
            for row in rows:
                yield row[self.column]
        except (ConnectionError, TimeoutError) as error:
            raise NetworkError(f"cannot download {self.dataset}: {_first_line(error)}; {WAYS_OUT}") from error
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise DataError(f"cannot read {self.dataset}: {_first_line(error)}; {WAYS_OUT}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Mix:
    """A named mix: what it is and where its text comes from."""

    name: str
    description: str
    sources: tuple[Source, ...]

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a mix file.

        Raises:
            UsageError: it is not TOML, or a key is missing, unknown or of the wrong kind.
        """
        try:
            facts = parse_toml(read_document(path))
            sources = tuple(_source(entry, path.parent) for entry in facts["sources"])
            if not sources:
                raise ValueError("no sources")
            return cls(name=path.stem, description=str(facts["description"]), sources=sources)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is not a calibration mix: {error}; see calibration/README.md") from error


def mixes() -> dict[str, Mix]:
    """Return the mixes that ship with quantkit, by name."""
    return {path.stem: Mix.load(path) for path in sorted(data_dir("calibration").glob("*.toml"))}


def read_text(name: str) -> list[Corpus]:
    """Return the text that `name` stands for: a mix of quantkit, a mix file (.toml), or a text file.

    Raises:
        UsageError: neither a known mix nor an existing file.
        DataError, NetworkError: the text cannot be read.
    """
    path = Path(name)
    if path.suffix == ".toml":
        return [source.read() for source in Mix.load(path).sources]
    known = mixes()
    if name in known:
        return [source.read() for source in known[name].sources]
    if is_file(path) or path.suffix in (".txt", ".jsonl", ".parquet"):
        return [read_file(path)]
    if name == SELF:
        raise UsageError("'self' is text that a model writes for --calibration; to judge a model on, give another")
    hint = " and there is no such file" if path.suffix or path.name != name else ""
    raise UsageError(f"unknown text {name!r}{nearest(name, [*known, SELF])}{hint}")


def read_file(path: Path) -> Corpus:
    """Return the text of a file: a .jsonl or .parquet has one document in each row's `text`, any other is one stream.

    Raises:
        DataError: missing, empty, not UTF-8, or a row without a text.
    """
    if not is_file(path):
        raise DataError(f"there is no text file {path}")
    if (size := path.stat().st_size) > psutil.virtual_memory().available:
        raise DataError(f"{path} has {size / 1e9:.0f} GB, more than fits into memory; give a part of it")
    try:
        if path.suffix == ".jsonl":
            corpus = Corpus(documents=tuple(_json_lines(path)))
        elif path.suffix == ".parquet":
            corpus = Corpus(documents=tuple(_parquet_rows(path)))
        else:
            corpus = Corpus(documents=(path.read_text(encoding="utf-8-sig"),), stream=True)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}; it must be UTF-8 text") from error
    if not any(document.strip() for document in corpus.documents):
        raise DataError(f"{path} holds no text")
    return corpus


def _json_lines(path: Path) -> Iterator[str]:
    # not splitlines: a text may hold U+2028, form feeds and what else Python takes for the end of a line
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
            text = row["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f'line {number} of {path} is not of the form {{"text": "…"}}') from error
        yield _checked(text, f"line {number} of {path}")


def _parquet_rows(path: Path) -> Iterator[str]:
    import pyarrow.parquet  # here, because only this kind of file needs it

    try:
        table = pyarrow.parquet.read_table(path, columns=["text"])
        rows: Iterable[Any] = table.column("text").to_pylist()
    except (KeyError, OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} is no parquet file with a column `text`: {_first_line(error)}") from error
    for number, text in enumerate(rows, start=1):
        yield _checked(text, f"row {number} of {path}")


def _checked(text: object, where: str) -> str:
    if not isinstance(text, str):
        raise DataError(f"`text` in {where} is {type(text).__name__}, not a string")
    return text


def _source(entry: dict[str, Any], directory: Path) -> Source:
    file = entry.pop("file", None)
    return Source(file=None if file is None else _beside(directory, file), **entry)


def _beside(directory: Path, file: str) -> Path:
    """Return a file that a mix names; a mix from somewhere must not be able to read the user's other files.

    Raises:
        ValueError: it leads out of the directory of the mix, by itself or through links.
    """
    path = directory / file
    if not (_is_relative(file) and Path(os.path.realpath(path)).is_relative_to(directory.resolve())):
        raise ValueError(f"{file!r} leads out of its directory; put the text, or a copy of it, beside the mix")
    return path


def _is_relative(name: str) -> bool:
    return not (Path(name).is_absolute() or ".." in Path(name).parts or "://" in name)


def _require_hub(purpose: str) -> None:
    """Raise NetworkError at once if the Hub cannot be reached; libraries retry for minutes before they say so."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return  # the caches are all there is, and they answer at once
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    proxies = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
    if any(os.environ.get(name) for name in proxies):
        return  # behind a proxy the Hub's own name need not resolve here
    try:
        port = endpoint.port or (443 if endpoint.scheme == "https" else 80)
        socket.create_connection((endpoint.hostname or "", port), timeout=5).close()
    except OSError as error:
        raise NetworkError(f"no network for {purpose} ({endpoint.netloc}: {error}); {WAYS_OUT}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
