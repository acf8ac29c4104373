"""Choices by name: the file name is the registry, nothing is filled in on import."""

from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from quantkit.errors import UsageError, nearest


@cache
def names(package: str) -> tuple[str, ...]:
    """Return the choices of `quantkit/<package>/`, as the command line spells them: its files but those with a `_`."""
    files = (path.stem for path in (Path(__file__).parent / package).glob("*.py") if not path.stem.startswith("_"))
    return tuple(sorted(stem.replace("_", "-") for stem in files))


def find(package: str, name: str, kind: str = "method") -> Any:  # noqa: ANN401  each package has its own protocol
    """Return the `METHOD` of `quantkit/<package>/<name>.py`; `kind` is what a message calls it.

    Raises:
        UsageError: there is none of this name; the message has the nearest.
    """
    if name not in names(package):
        raise UsageError(f"unknown {kind} {name!r}{nearest(name, names(package))}")
    return import_module(module(package, name)).METHOD


def module(package: str, name: str) -> str:
    """Return the name of the module of a choice."""
    return f"quantkit.{package.replace('/', '.')}.{name.replace('-', '_')}"
