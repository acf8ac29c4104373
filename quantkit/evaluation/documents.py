"""The documents of an output, read with suspicion: what is missing or malformed becomes a fault."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Self, TypeVar

from torch import Tensor

from quantkit.core.scheme import QuantScheme
from quantkit.errors import UsageError
from quantkit.evaluation.manifest import CHECK, DENSE, RECIPE, REPORT, recorded_logits
from quantkit.exporters.compressed_tensors import schemes_of
from quantkit.model.checkpoint import INDEX
from quantkit.model.integrity import sha256
from quantkit.untrusted import parse_json, parse_toml, read_document

T = TypeVar("T")
MOST_LINES = 3  # faults of one kind that are told one by one

_REWRITTEN = ("config.json", INDEX, RECIPE, REPORT, CHECK)
_MALFORMED = (ValueError, KeyError, IndexError, TypeError, AttributeError, UsageError)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What report.json promises about the weights, and the facts that `check` repeats.

    `schemes` gives the scheme of each linear where they were allocated one by one, and is empty otherwise; `zeros` how
    many weights of each linear were pruned; `originals` the digests of the source's files, empty in reports of older
    versions. With `dense` nothing is quantized.
    """

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    sha256: Mapping[str, str]
    output_bytes: int
    predicted_bytes: int
    parameters: int
    quantized_parameters: int
    sites: tuple[str, ...]
    scheme: str
    schemes: Mapping[str, str]
    method: str
    device: str
    source: str
    zeros: Mapping[str, int] = field(default_factory=dict)
    originals: Mapping[str, str] = field(default_factory=dict)
    protection: Collection[str] = ()

    @property
    def dense(self) -> bool:
        """Whether the run did not quantize."""
        return self.scheme == DENSE

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read report.json."""
        table = parse_json(text)
        groups = table["allocation"]["groups"] if "allocation" in table else []
        schemes = {str(n): str(QuantScheme.parse(group["scheme"])) for group in groups for n in group["linears"]}
        return cls(
            tensors={str(k): (str(kind), tuple(map(int, size))) for k, (kind, size) in table["tensors"].items()},
            sha256={str(name): str(digest) for name, digest in table["sha256"].items()},
            originals={str(name): str(digest) for name, digest in table.get("source_sha256", {}).items()},
            output_bytes=int(table["measured"]["output_bytes"]),
            predicted_bytes=int(table["predicted"]["output_bytes"]),
            parameters=int(table["parameters"]),
            quantized_parameters=int(table["quantized_parameters"]),
            sites=tuple(map(str, table["sites"])),
            scheme=str(table["scheme"] if schemes or table["scheme"] == DENSE else QuantScheme.parse(table["scheme"])),
            schemes=schemes,
            method=str(table["method"]),
            device=str(table["device"]),
            source=str(table["source"]["model"]),
            protection=table.get("resilience", {}).keys(),
            zeros={str(n): int(each["zeros"]) for n, each in table.get("sparsity", {}).get("linears", {}).items()},
        )


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What check.json recorded: (sequences, tokens) tokens, (sequences, tokens, top) ids and logits."""

    tokens: Tensor
    ids: Tensor
    logits: Tensor
    spread: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read check.json."""
        document = parse_json(text)
        tokens, ids, logits = recorded_logits(document)
        spread = float(document["spread"])
        if not (logits.isfinite().all() and 0 < spread < float("inf")):
            raise ValueError("the recorded logits are not finite")
        return cls(tokens=tokens, ids=ids, logits=logits, spread=spread)


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """What config.json says of quantization: the scheme of each target, and the linears that stay dense."""

    schemes: Mapping[str, QuantScheme]
    ignore: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read config.json."""
        config = parse_json(text)["quantization_config"]
        schemes = schemes_of(config)
        if not schemes:
            raise ValueError("it names no scheme")
        return cls(schemes=schemes, ignore=tuple(map(str, config["ignore"])))

    @property
    def scheme(self) -> QuantScheme | None:
        """The scheme of all linears, None if there are several."""
        distinct = set(self.schemes.values())
        return distinct.pop() if len(distinct) == 1 else None

    def scheme_of(self, linear: str) -> QuantScheme | None:
        """Return the scheme of one linear, None if it has none."""
        return self.scheme or self.schemes.get(linear)


@dataclass(frozen=True, kw_only=True)
class Documents:
    """The documents of an output; None where one is missing or malformed."""

    report: Report | None
    sample: Sample | None
    quantization: Quantization | None
    recipe_scheme: str | None
    index: Mapping[str, str] | None


def read_documents(output: Path) -> tuple[Documents, list[str]]:
    """Return the documents of `output`, and a fault for each that is missing, malformed or contradictory."""
    faults: list[str] = []
    report = _read(output / REPORT, Report.parse, faults)
    documents = Documents(
        report=report,
        sample=_read(output / CHECK, Sample.parse, faults),
        quantization=_read(
            output / "config.json", _no_quantization if report and report.dense else Quantization.parse, faults
        ),
        recipe_scheme=_read(output / RECIPE, _recipe_scheme, faults),
        index=_read(output / INDEX, _weight_map, faults),
    )
    return documents, faults + at_most(_contradictions(documents))


def side_file_faults(output: Path, report: Report) -> Iterator[str]:
    """Yield which files that were copied are not the source's any more, but for texts (.md), which people edit."""
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output).as_posix()
        copied = name in report.originals and name not in _REWRITTEN and path.suffix not in (".safetensors", ".md")
        if copied and path.is_file() and sha256(path) != report.originals[name]:
            yield f"{name} was altered: its SHA-256 is not the one that the report says of the source's"


def _contradictions(documents: Documents) -> Iterator[str]:
    """Yield where the documents disagree about the schemes."""
    if documents.quantization is None:
        return
    configured = str(documents.quantization.scheme or "mixed")
    report = documents.report
    for linear, scheme in report.schemes.items() if report else ():
        stored = documents.quantization.scheme_of(linear)
        if str(stored) != scheme:
            yield f"config.json says that {linear} is {stored or 'of no scheme'} but {REPORT} says {scheme}"
    reported = report.scheme if report and not report.schemes else None
    for name, said in ((RECIPE, documents.recipe_scheme), (REPORT, reported)):
        if said and said != configured:
            yield f"config.json says that the weights are {configured} but {name} says {said}"


def at_most(lines: Iterable[str]) -> list[str]:
    """Return the first lines of one kind of fault, and how many more there are."""
    rest = iter(lines)
    first = list(islice(rest, MOST_LINES))
    more = sum(1 for _ in rest)
    return [*first, f"and {more} more faults like this: {first[-1]}"] if more else first


def _read(path: Path, parse: Callable[[str], T], faults: list[str]) -> T | None:
    try:
        return parse(read_document(path))
    except FileNotFoundError:
        faults.append(f"{path.name} is missing")
    except OSError as error:
        faults.append(f"{path.name} cannot be read: {error}")
    except _MALFORMED as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        faults.append(f"{path.name} is damaged: {reason}")
    return None


def _recipe_scheme(text: str) -> str | None:
    """Return the scheme of a recipe, None if it leaves the choice to a measurement."""
    table: dict[str, Any] = parse_toml(text)
    if not isinstance(table["model"], str):
        raise ValueError("`model` is not a string")
    return None if "target_bpw" in table or table.get("dense") else str(QuantScheme(**table.get("scheme", {})))


def _no_quantization(text: str) -> None:
    """Refuse a config.json that says how weights are packed, of a run that packed none."""
    if "quantization_config" in parse_json(text):
        raise ValueError(f"it has a quantization_config, but {REPORT} says that the weights are {DENSE}")


def _weight_map(text: str) -> dict[str, str]:
    return {str(name): str(file) for name, file in parse_json(text)["weight_map"].items()}
