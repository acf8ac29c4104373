"""What there is to choose from on each axis: the files of its directory, whose names are those of the choices."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from quantkit import registry
from quantkit.errors import UsageError, nearest

AXES = ("parameters", "gradients", "objectives")


def names(axis: str) -> tuple[str, ...]:
    """Return the choices of an axis, as the command line spells them."""
    return registry.names(f"personal/{axis}")


def find(axis: str, name: str) -> Any:  # noqa: ANN401  each axis has its own protocol
    """Return the `METHOD` of a choice.

    Raises:
        UsageError: there is none of this name.
    """
    return registry.find(f"personal/{axis}", name, axis.removesuffix("s"))


def build(axis: str, name: str, options: Mapping[str, Any] | None = None) -> Any:  # noqa: ANN401
    """Return a choice with these values of its fields; a list, or a text with commas, is a tuple where one is due.

    Raises:
        UsageError: there is none of this name, or it has no such field or not such a value.
    """
    kind, given = find(axis, name), dict(options or {})
    known = {field.name: str(field.type) for field in fields(kind) if field.init}
    for key, value in given.items():
        if key not in known:
            raise UsageError(f"{name} has no option {key!r}{nearest(key, known) if known else ''}")
        if known[key].startswith("tuple") or "tuple[" in known[key]:
            given[key] = tuple(value.split(",")) if isinstance(value, str) else tuple(value)
    try:
        return kind(**given)
    except TypeError as error:
        raise UsageError(f"{name} cannot be made of {given}: {error}") from error
