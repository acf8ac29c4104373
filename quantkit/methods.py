"""The methods that a recipe and an export may name; see `registry`."""

from importlib import import_module
from typing import Any

from quantkit import registry

FAMILIES = ("pruners", "quantizers", "exporters")


def names(family: str) -> tuple[str, ...]:
    """Return the names of a family's methods, as the command line spells them."""
    return registry.names(family)


def find(family: str, name: str) -> Any:  # noqa: ANN401  each family has its own protocol
    """Return the `METHOD` of `quantkit/<family>/<name>.py`.

    Raises:
        UsageError: no such method; the message names the nearest.
    """
    return registry.find(family, name, "format" if family == "exporters" else "method")


def family_of(name: str) -> str:
    """Return the family of a pass: `pruners` if it is one of them, otherwise `quantizers`, of which it should be."""
    return "pruners" if name in names("pruners") else "quantizers"


def passes() -> tuple[str, ...]:
    """Return the names of all that can be a pass of a recipe."""
    return (*names("quantizers"), *names("pruners"))


def summary(family: str, name: str) -> str:
    """Return the first line of the method's module docstring."""
    find(family, name)
    module = import_module(registry.module(family, name))
    return (module.__doc__ or "").strip().splitlines()[0]
