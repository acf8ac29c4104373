"""Values that people write, against the fields of a dataclass: unknown names and other types are refused."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from quantkit.errors import UsageError, nearest


def build_dataclass(kind: type, values: Mapping[str, Any]) -> Any:  # noqa: ANN401  an instance of `kind`
    """Return the dataclass `kind` with these values.

    Raises:
        UsageError: as `refuse_misfits`.
    """
    refuse_misfits(kind, values, f"the table of {kind.__name__.lower()}")
    return kind(**values)


def refuse_misfits(kind: type, values: Mapping[str, Any], where: str) -> None:
    """Raise UsageError for a value that the dataclass `kind` has no field for, or whose type is not the field's."""
    refuse_unknown(values, [f.name for f in fields(kind)], where)
    hints = get_type_hints(kind)
    for name, value in values.items():
        if not _fits(value, hints[name]):
            raise UsageError(f"{name} in {where} must be {_describe(hints[name])}, not {value!r}")


def _fits(value: object, hint: Any) -> bool:  # noqa: ANN401  a type, or a form of the typing module
    if isinstance(hint, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint in (int, float) and isinstance(value, bool):
        return False  # Python counts True as an int; a recipe does not
    return isinstance(value, (int, float) if hint is float else get_origin(hint) or hint)


def _describe(hint: Any) -> str:  # noqa: ANN401
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    parts = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    words = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "a string",
        NoneType: "left out",
    }
    return " or ".join(words.get(part, str(part)) for part in parts)


def refuse_unknown(given: Iterable[str], known: Sequence[str], where: str) -> None:
    """Raise UsageError for the first name that is not known, and name the nearest that is."""
    for name in given:
        if name not in known:
            hint = nearest(name, known) if known else ""
            raise UsageError(f"{where} has no {name!r}{hint}")
