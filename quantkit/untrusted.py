"""Documents that somebody else wrote: whatever is in the place of a file, reading it ends, and in one of two errors.

A pipe would block, a device would never end, a file of a terabyte would take all memory, brackets in brackets would
exhaust the stack.
"""

import errno
import json
import stat
import tomllib
from pathlib import Path
from typing import Any

MOST_BYTES = 2**28  # several times the largest tokenizer.json and the largest index that are known


def read_document(path: Path) -> str:
    """Return the text of a small file.

    Raises:
        OSError: there is none, or it is no regular file, or it cannot be read.
        ValueError: it is far too large, or not UTF-8.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "no regular file", str(path))
    if found.st_size > MOST_BYTES:
        raise ValueError(f"{found.st_size:,} bytes are too many for a document")
    return path.read_text(encoding="utf-8")


def is_file(path: Path) -> bool:
    """Return whether there is such a file, also for a name that no file can have."""
    try:
        return path.is_file()
    except OSError:
        return False


def parse_json(text: str) -> Any:  # noqa: ANN401  whatever JSON holds
    """Return what a JSON document says.

    Raises:
        ValueError: it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_toml(text: str) -> dict[str, Any]:
    """Return what a TOML document says.

    Raises:
        ValueError: it is not TOML, or nested too deeply.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
