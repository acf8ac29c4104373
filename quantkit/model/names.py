"""From the name a user types to a directory on this machine: a directory, an alias, or a model of the Hub."""

import re
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import ModelError, UsageError, nearest
from quantkit.model import hub
from quantkit.resources import data_dir
from quantkit.untrusted import MOST_BYTES, parse_toml, read_document

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class Alias:
    """What a name means: a model of the Hub (`revision` None is `main`), or a directory of `model_zoo/`."""

    id: str | None = None
    revision: str | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        """Raise ValueError unless exactly one of `id` and `path` is given, and each field has its form."""
        if (self.id is None) == (self.path is None):
            raise ValueError("give exactly one of id and path")
        if self.id is not None and not _HUB_ID.fullmatch(self.id):
            raise ValueError(f"id must have the form org/name, not {self.id!r}")
        if self.path is not None and not re.fullmatch(r"[\w-]+", self.path):
            raise ValueError(f"path must be the name of a directory of model_zoo, not {self.path!r}")
        if self.revision is not None and (self.id is None or not _COMMIT.fullmatch(self.revision)):
            raise ValueError(f"revision must be the 40 hexadecimal digits of an id's commit, not {self.revision!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where a model lies: `path` holds config.json; a local directory has neither `id` nor `revision`."""

    path: Path
    id: str | None
    revision: str | None


def aliases(file: Path | None = None) -> dict[str, Alias]:
    """Return the aliases of `file`, by default those of `model_zoo/aliases.toml`.

    Raises:
        UsageError: the file is missing or malformed; the message names the entry.
    """
    try:
        file = file or data_dir("model_zoo") / "aliases.toml"
        table = parse_toml(read_document(file))
    except (OSError, ValueError) as error:
        raise UsageError(f"the table of aliases {file or ''} cannot be read: {error}") from error
    found = {}
    for name, entry in table.items():
        if name != name.lower():
            raise UsageError(f"{file}: the alias {name!r} must be lower case")
        if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
            raise UsageError(f"{file}: the alias {name!r} must be a table of strings, not {entry!r}")
        try:
            found[name] = Alias(**entry)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{file}: the alias {name!r} is malformed: {error}") from error
    return found


def resolve(model: str, *, revision: str | None = None, weights: bool = True) -> Source:
    """Return the directory that `model` names: a directory, an alias, or a Hub id of the form org/name.

    Without `weights` a model of the Hub is fetched without them, to be looked at; a later call with `weights`
    and `revision=source.revision` completes the same snapshot. A commit in the cache needs no network.

    Raises:
        UsageError: `revision` is given for a directory, or the table of aliases is malformed.
        ModelError: no such directory, alias, model or revision; no access; no config.json or no safetensors.
        NetworkError: the Hub cannot be reached and the cache does not hold the model.
        OutputError: the cache cannot be written.
    """
    if _looks_like_a_path(model):
        return _local(Path(model).expanduser(), revision)
    known = aliases()
    alias = known.get(model.lower())
    suggestions = known if alias is None else {}
    if alias is None and _HUB_ID.fullmatch(model):
        alias = Alias(id=model)
    if alias is None:
        raise ModelError(
            f"{model!r} is neither a directory nor an alias{nearest(model.lower(), known)}; "
            "a model of the Hugging Face Hub is named org/name"
        )
    if alias.path is not None:
        return _local(data_dir("model_zoo") / alias.path, revision)
    assert alias.id is not None  # the other half of Alias's invariant
    revision = revision or alias.revision or "main"
    path = hub.fetch(alias.id, revision, weights=weights, known=suggestions)
    return Source(path=path, id=alias.id, revision=path.name)


def _looks_like_a_path(model: str) -> bool:
    if "://" in model:
        return False
    shaped = model.startswith((".", "/", "~")) or model.endswith("/") or "\\" in model or model.count("/") > 1
    return shaped or (model != "" and Path(model).exists())


def _local(path: Path, revision: str | None) -> Source:
    if revision is not None:
        raise UsageError(f"{path} is a directory, which has no revisions; leave out --revision {revision}")
    if path.is_file():
        raise ModelError(f"{path} is a file; give the directory that holds config.json and the safetensors")
    if not path.is_dir():
        raise ModelError(f"the directory {path} does not exist")
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} holds no config.json, so it is no transformers model; give the directory that does")
    for entry in sorted(path.iterdir()):
        _refuse_endless(entry)
    return Source(path=path, id=None, revision=None)


def _refuse_endless(path: Path) -> None:
    """Refuse what would block or fill the memory of the libraries that read the small files of a model."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ModelError(f"{path} is neither a file nor a directory; remove it from the model")
    if path.suffix == ".json" and path.is_file() and path.stat().st_size > MOST_BYTES:
        raise ModelError(f"{path} has {path.stat().st_size:,} bytes, too many for a document; remove it from the model")
