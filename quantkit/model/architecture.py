"""Facts of model families, read from `model_zoo/architectures/*.toml`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

from quantkit.errors import UsageError
from quantkit.resources import data_dir
from quantkit.untrusted import parse_toml, read_document

ROTARY = frozenset({"half", "interleaved", "none"})


class HasTextConfig(Protocol):
    """A transformers configuration."""

    def get_text_config(self) -> Any:  # noqa: ANN401  its attributes differ between families
        """Return the part that describes the language model."""


@dataclass(frozen=True, slots=True)
class LinearGroup:
    """Linears of a block that see the same input.

    Attributes:
        name: what the group is called in reports.
        linears: names of the linears inside the block.
        after: the norm or linear that produces their input and can absorb a scale of it, None if nothing can.
    """

    name: str
    linears: tuple[str, ...]
    after: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """The linears of a block whose rows are queries, keys and values and nothing else.

    Attributes:
        query: name inside the block.
        key: name inside the block.
        value: name inside the block.
        rotary: which channels of a head rotary positions mix: "half" those at i and i + d/2, "interleaved" those at 2i
            and 2i + 1, "none" none.
    """

    query: str
    key: str
    value: str
    rotary: str

    def __post_init__(self) -> None:
        if self.rotary not in ROTARY:
            raise ValueError(f"rotary is {self.rotary!r}, known: {sorted(ROTARY)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """What quantkit needs to know of a model family beyond its transformers code.

    Attributes:
        name: the file's name.
        model_types: the `model_type`s of config.json that it describes.
        blocks: module name of the list of decoder layers.
        when: values that config.json must have besides, for a family with several layouts.
        norm_offset: what the norms of `groups` add to their weight before they multiply by it.
        writes: linears whose outputs are what a block adds to the residual stream; none where a norm follows them.
        groups: which linears share an input, and what can absorb a scale of it.
        attention: what makes queries, keys and values, None where no linears do that alone.
        renames: start of a checkpoint tensor name → start of the module tensor name, where they differ.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    when: Mapping[str, Any] = field(default_factory=dict)
    norm_offset: float = 0.0
    writes: tuple[str, ...] = ()
    groups: tuple[LinearGroup, ...] = ()
    attention: Attention | None = None
    renames: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise ValueError, TypeError or AttributeError for a value of another type than its field's."""
        texts = [self.blocks, *self.renames.values(), *(group.name for group in self.groups)]
        texts += [group.after for group in self.groups if group.after is not None]
        texts += [self.attention.query, self.attention.key, self.attention.value] if self.attention else []
        if odd := [text for text in texts if not isinstance(text, str)]:
            raise ValueError(f"{odd[0]!r} is no name")
        if not isfinite(self.norm_offset):
            raise ValueError("norm_offset must be a number")
        self.when.items()

    @classmethod
    def read(cls, path: Path) -> "Architecture":
        """Read one file.

        Raises:
            UsageError: the file is not TOML, or a key is missing, unknown or of the wrong kind.
        """
        try:
            facts = parse_toml(read_document(path))
            groups = tuple(_group(entry) for entry in facts.pop("groups", []))
            if (attention := facts.pop("attention", None)) is not None:
                facts["attention"] = Attention(**attention)
            model_types = _names(facts.pop("model_types"))
            writes = _names(facts.pop("writes", []))
            return cls(name=path.stem, model_types=model_types, groups=groups, writes=writes, **facts)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is not an architecture file: {error}; see model_zoo/README.md") from error

    def group_of(self, linear: str) -> str:
        """Return the name of the group of the linear `linear` of a block, its own name if no group has it."""
        return next((group.name for group in self.groups if linear in group.linears), linear)

    def describes(self, config: Mapping[str, Any]) -> bool:
        """Return whether a model of that configuration has this layout."""
        return config["model_type"] in self.model_types and all(config.get(k) == v for k, v in self.when.items())

    def stored_names(self, name: str) -> tuple[str, ...]:
        """Return what the renames make of the module tensor `name`."""
        return tuple(
            stored + name.removeprefix(module) for stored, module in self.renames.items() if name.startswith(module)
        )


def _group(entry: Mapping[str, Any]) -> LinearGroup:
    known = {"name", "linears", "after"}
    if unknown := set(entry) - known:
        raise ValueError(f"unknown key {min(unknown)!r} in a group, known: {sorted(known)}")
    linears = _names(entry["linears"])
    if not linears:
        raise ValueError(f"the group {entry['name']!r} has no linears")
    return LinearGroup(entry["name"], linears, entry.get("after"))


def _names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{value!r} is no list of names")
    return tuple(value)


@cache
def architectures() -> tuple[Architecture, ...]:
    """Return every architecture of the model zoo, by file name."""
    return tuple(Architecture.read(path) for path in sorted((data_dir("model_zoo") / "architectures").glob("*.toml")))


def find(config: Mapping[str, Any]) -> Architecture | None:
    """Return the architecture that describes a model of the configuration `config`, None if no file does."""
    return next((architecture for architecture in architectures() if architecture.describes(config)), None)
