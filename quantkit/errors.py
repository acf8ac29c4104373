"""Every error a user can meet, one tree; the command line prints the message as one line and exits with the code.

    QuantkitError           1   something went wrong that has no better name
    ├── UsageError          2   an option, a recipe or a name that cannot be used as given
    ├── ModelError          3   the model: unknown, unsupported, truncated, not finite
    ├── DataError           4   the calibration or evaluation text: missing, too short, malformed
    ├── NetworkError        5   the Hub cannot be reached, or refuses
    ├── OutputError         6   the output directory: exists, full disk, not writable
    ├── CheckFailure        7   `quantkit check` found at least one fault
    └── TeamError           8   another process of a run on several ended

A message is one sentence that says what is wrong and, after a semicolon or in a second sentence, what to do next. It
quotes what others wrote, so it is made fit for one line of a terminal, whatever that was.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import ClassVar

LONGEST = 1000  # characters of a message


class QuantkitError(Exception):
    """Base of all errors that are the user's to solve; anything else is a bug in quantkit."""

    exit_code: ClassVar[int] = 1

    def __str__(self) -> str:
        """Return the message: printable, in one line, its middle left out where it is very long."""
        return one_line(super().__str__())


class UsageError(QuantkitError):
    """An option, a recipe or a name that cannot be used as given."""

    exit_code = 2


class ModelError(QuantkitError):
    """The model is unknown, unsupported or damaged."""

    exit_code = 3


class DataError(QuantkitError):
    """The calibration or evaluation text is missing, too short or malformed."""

    exit_code = 4


class NetworkError(QuantkitError):
    """The Hub cannot be reached, or refuses."""

    exit_code = 5


class OutputError(QuantkitError):
    """The output directory exists, is full or cannot be written."""

    exit_code = 6


class CheckFailure(QuantkitError):
    """`quantkit check` found at least one fault."""

    exit_code = 7


class TeamError(QuantkitError):
    """Another process of a run on several ended or cannot be reached."""

    exit_code = 8


class QuantkitWarning(UserWarning):
    """Something works, but not as well as it could; the command line shows it as one line."""


def one_line(text: str) -> str:
    """Return what can be shown of a text in one line: printable, the middle left out where it is very long."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def nearest(name: str, known: Iterable[str], *, otherwise: str | None = None) -> str:
    """Return ' (did you mean a, b?)' with the names nearest to `name`; if none is near, `otherwise` or all names."""
    names = sorted(set(known))
    close = get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f" (did you mean {', '.join(close)}?)"
    return f" (known: {', '.join(names)})" if otherwise is None else otherwise
