"""Finding methods by name: the file name is the registry, nothing is filled in on import."""

from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from quantkit.errors import UsageError, nearest

FAMILIES = ("pruners", "quantizers", "exporters")


@cache
def names(family: str) -> tuple[str, ...]:
    """Return the names of a family's methods, as the command line spells them: the files of `quantkit/<family>/`."""
    directory = Path(__file__).parent / family
    files = (path.stem for path in directory.glob("*.py") if not path.stem.startswith("_"))
    return tuple(sorted(stem.replace("_", "-") for stem in files))


def find(family: str, name: str) -> Any:  # noqa: ANN401  each family has its own protocol
    """Return the `METHOD` of `quantkit/<family>/<name>.py`.

    Raises:
        UsageError: no such method; the message names the nearest.
    """
    if name not in names(family):
        kind = "format" if family == "exporters" else "method"
        raise UsageError(f"unknown {kind} {name!r}{nearest(name, names(family))}")
    return import_module(f"quantkit.{family}.{name.replace('-', '_')}").METHOD


def family_of(name: str) -> str:
    """Return the family of a pass: `pruners` if it is one of them, otherwise `quantizers`, of which it should be."""
    return "pruners" if name in names("pruners") else "quantizers"


def passes() -> tuple[str, ...]:
    """Return the names of all that can be a pass of a recipe."""
    return (*names("quantizers"), *names("pruners"))


def summary(family: str, name: str) -> str:
    """Return the first line of the method's module docstring."""
    find(family, name)
    module = import_module(f"quantkit.{family}.{name.replace('-', '_')}")
    return (module.__doc__ or "").strip().splitlines()[0]
