"""A recipe: everything that decides what a run makes, as a value that is written beside the model and read back."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import Any, Self, TypeVar

import tomli_w

from quantkit import methods, presets
from quantkit.calibrate.passes import Pass, refuse_wrong_passes
from quantkit.core.scheme import MAX_BITS, MIN_BITS, QuantScheme
from quantkit.errors import UsageError
from quantkit.fields import build_dataclass, refuse_misfits, refuse_unknown
from quantkit.resilience.choice import Resilience
from quantkit.untrusted import parse_toml, read_document

R = TypeVar("R", bound="Recipe")

DEFAULT_PRUNER = "sparsegpt"
DEFAULT_GROUP_SIZE = 128  # the one group size that every runtime of the field has kernels for
SAMPLES_TO_CHECK = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Which text a run calibrates on.

    Attributes:
        text: name of a mix, or a file.
        samples: number of sequences.
        seqlen: tokens in a sequence; None: 2048 (512 for methods that do not learn), or the model's
            context where that is shorter.
        batch_size: sequences in a batch; a learning method makes one update per batch.
        allow_short: go on with fewer sequences where the text has no more.
    """

    text: str = "default"
    samples: int = 128
    seqlen: int | None = None
    batch_size: int = 1
    allow_short: bool = False

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be positive, not {getattr(self, name)}")
        if self.seqlen is not None and self.seqlen < 2:
            raise UsageError(f"seqlen must be at least 2, not {self.seqlen}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What is made of which model, how.

    Attributes:
        model: directory, Hub id or alias.
        revision: revision on the Hub, None for the alias's own or the newest.
        scheme: what every quantized weight becomes.
        target_bpw: most bits per quantized weight, scales included; the bits of each linear are then chosen by measured
            loss instead of taken from `scheme`, which must be symmetric. None: `scheme` says it all.
        ignore: globs of module names that stay dense; every glob must match something.
        passes: method name → hyper-parameters that differ from the method's defaults for the scheme, in order.
        dense: weights are pruned and stay in the model's own dtype; no pass rounds, and `scheme` means nothing.
        rotate: rotate the residual stream by a random Hadamard matrix, folded into the weights.
        calibration: the text.
        formats: what is written, besides compressed-tensors in any case.
        resilience: bounds on the activations of what was made; None: none.
        seed: seed of everything random.
    """

    model: str
    revision: str | None = None
    scheme: QuantScheme = field(default_factory=lambda: QuantScheme(group_size=DEFAULT_GROUP_SIZE))
    target_bpw: float | None = None
    ignore: tuple[str, ...] = ()
    passes: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"omniquant": {}})
    dense: bool = False
    rotate: bool = False
    calibration: Calibration = field(default_factory=Calibration)
    formats: tuple[str, ...] = ()
    resilience: Resilience | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if odd := [glob for glob in self.ignore if not isinstance(glob, str)]:
            raise UsageError(f"ignore must be a list of globs, and {odd[0]!r} is none")
        for name in (self.model, self.calibration.text):
            if name != name.encode(errors="replace").decode():
                raise UsageError(f"{name!r} is not UTF-8, so no recipe can name it; rename it, or make a link to it")
        for name in self.formats:
            methods.find("exporters", name)
        if self.dense and (self.formats or self.rotate or self.target_bpw is not None):
            raise UsageError("pruned weights that are not rounded are written as they are; leave out formats and bits")
        if self.dense and self.resilience:
            raise UsageError("bounds are applied to packed models, and these weights stay dense; leave out resilience")
        if self.target_bpw is None:
            return
        if not isfinite(self.target_bpw):
            raise UsageError(f"target_bpw must be a number of bits such as 3.25, not {self.target_bpw}")
        if not self.scheme.symmetric:
            raise UsageError(
                "--target-bpw writes several widths, which transformers loads only without zero points; "
                "leave out --asymmetric, or use --wbits"
            )

    @property
    def nominal_scheme(self) -> QuantScheme:
        """The scheme that methods take their defaults from: with a target, the most whole bits that it holds."""
        if self.dense:  # fits every width; nobody rounds with it
            return QuantScheme(bits=MAX_BITS)
        if self.target_bpw is None:
            return self.scheme
        return replace(self.scheme, bits=min(max(int(self.target_bpw), MIN_BITS), MAX_BITS))

    @classmethod
    def for_method(cls, model: str, *method: str) -> Self:
        """Return the default recipe of one method, or of a pruner and a method, without a preset.

        A method that learns nothing from data gets a few sequences of the embedded text, enough to measure block errors
        and to record logits for `quantkit check`.

        Raises:
            UsageError: no such method.
        """
        learns = any(_method(name).learns for name in method)
        calibration = Calibration() if learns else Calibration(text="embedded", samples=SAMPLES_TO_CHECK)
        return cls(model=model, passes={name: {} for name in method}, calibration=calibration)

    def build_passes(self) -> dict[str, Pass]:
        """Return the passes by method name, ready to run.

        Raises:
            UsageError: an unknown method or hyper-parameter, an order that is not the phases' order, not exactly one
                pass that rounds (none if weights stay dense), or more than one that prunes.
        """
        built = {name: _build(name, options, self.nominal_scheme) for name, options in self.passes.items()}
        refuse_wrong_passes(built, dense=self.dense)
        return built

    def to_toml(self) -> str:
        """Return the recipe as TOML, every hyper-parameter spelled out."""
        steps = [{"method": name, **asdict(step)} for name, step in self.build_passes().items()]  # type: ignore[call-overload]
        table = {
            "model": self.model,
            "revision": self.revision,
            "seed": self.seed,
            "target_bpw": self.target_bpw,
            "ignore": list(self.ignore),
            "dense": self.dense or None,
            "rotate": self.rotate,
            "formats": list(self.formats),
            "scheme": asdict(self.scheme) | ({} if self.target_bpw is None else {"bits": None}),
            "calibration": asdict(self.calibration),
            "resilience": asdict(self.resilience) if self.resilience else None,
            "passes": steps,
        }
        return tomli_w.dumps(_without_none(table))

    @classmethod
    def from_toml(cls, path: Path, model: str | None = None) -> Self:
        """Read a recipe file; `model` replaces the model that it names. Without passes it means the default preset.

        Raises:
            UsageError: not TOML, or a key or value that a recipe does not have.
        """
        try:
            table = parse_toml(read_document(path))
            steps = _read_passes(table.pop("passes", []))
            if "target_bpw" in table:
                table["scheme"] = _scheme_of_target(table.get("scheme", {"group_size": DEFAULT_GROUP_SIZE}))
            if "scheme" in table:  # a table without group_size means one scale per row; no table means the default
                table["scheme"] = build_dataclass(QuantScheme, table["scheme"])
            text = table.pop("calibration", {})
            table["calibration"] = build_dataclass(Calibration, text)
            if "resilience" in table:
                table["resilience"] = _read_resilience(table["resilience"])
            table |= {name: tuple(table.pop(name, ())) for name in ("ignore", "formats")}
            if model is not None:
                table["model"] = model
            if "model" not in table:
                raise UsageError(f"the recipe {path} names no model; give one on the command line")
            recipe: Self = build_dataclass(cls, {**table, "passes": steps} if steps else table)
        except OSError as error:
            raise UsageError(f"cannot read the recipe {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is no recipe: {error}") from error
        if not steps:
            recipe = _with_preset(recipe, presets.DEFAULT, keep_batch="batch_size" in text)
        recipe.build_passes()
        return recipe


def from_defaults(
    model: str,
    changes: Mapping[str, Any],
    *,
    method: str | None = None,
    preset: str | None = None,
    prune: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Recipe:
    """Return the recipe of one method or of a preset, the default one if there is neither; the rest as `with_changes`.

    Raises:
        UsageError: as `with_changes`.
    """
    if prune is not None:
        methods.find("pruners", prune)
    if changes.get("dense"):
        base = replace(Recipe.for_method(model, prune or DEFAULT_PRUNER), dense=True)
        return with_changes(base, changes, prune=prune, options=options)
    if method is None:
        preset = presets.DEFAULT if preset is None else preset
        return with_changes(Recipe(model=model), changes, preset=preset, prune=prune, options=options)
    base = Recipe.for_method(model, *([] if prune is None else [prune]), method)
    return with_changes(base, changes, method=method, preset=preset, prune=prune, options=options)


def with_changes(
    recipe: Recipe,
    changes: Mapping[str, Any],
    *,
    method: str | None = None,
    preset: str | None = None,
    prune: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Recipe:
    """Return the recipe with fields replaced.

    `target_bpw` makes the scheme symmetric unless `symmetric` is among the changes, and `bits` takes a target away.

    Args:
        recipe: the recipe to start from.
        changes: fields of Recipe, QuantScheme or Calibration by their own names.
        method: replace the passes, but for one that prunes, by this method; None keeps them.
        preset: replace the passes, but for one that prunes, and the batch unless it is among the changes, by those of
            this preset.
        prune: replace the pass that prunes, if there is one, by this method.
        options: hyper-parameters; `lr` is set in the first pass that has one of that name, `distill.lr` in that pass.

    Raises:
        UsageError: an unknown name, a value that is out of range, or a method and a preset.
    """
    if method is not None and preset is not None:
        raise UsageError(f"--method {method} and --preset {preset} both say how to quantize; give one")
    own, scheme, calibration = ([f.name for f in fields(kind)] for kind in (Recipe, QuantScheme, Calibration))
    refuse_unknown(changes, [*own, *scheme, *calibration], "a recipe")
    for kind, names in ((Recipe, own), (QuantScheme, scheme), (Calibration, calibration)):
        refuse_misfits(kind, {name: value for name, value in changes.items() if name in names}, "the recipe")
    changes = _settle_bits(changes)
    changed = replace(
        recipe,
        scheme=replace(recipe.scheme, **{key: value for key, value in changes.items() if key in scheme}),
        calibration=replace(recipe.calibration, **{key: value for key, value in changes.items() if key in calibration}),
        **{key: value for key, value in changes.items() if key in own},
    )
    if method is not None:
        changed = replace(changed, passes={**_pruning(changed.passes), method: {}})
    elif preset is not None:
        changed = _with_preset(changed, preset, keep_batch="batch_size" in changes)
    if prune is not None:
        methods.find("pruners", prune)
        others = {name: own for name, own in changed.passes.items() if name not in methods.names("pruners")}
        changed = replace(changed, passes={prune: changed.passes.get(prune, {}), **others})
    changed = replace(changed, passes=_with_options(changed.passes, options or {}))
    changed.build_passes()
    return changed


def _pruning(passes: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the passes that prune, which other passes do not replace."""
    return {name: own for name, own in passes.items() if name in methods.names("pruners")}


def _with_preset(recipe: R, name: str, *, keep_batch: bool) -> R:
    if name in methods.names("quantizers"):
        raise UsageError(f"{name!r} is no preset but a method; use --method {name}")
    preset = presets.find(name, recipe.nominal_scheme)
    batch = recipe.calibration.batch_size if keep_batch else min(preset.batch_size, recipe.calibration.samples)
    passes = {**_pruning(recipe.passes), **preset.passes}
    return replace(recipe, passes=passes, calibration=replace(recipe.calibration, batch_size=batch))


def _with_options(
    passes: Mapping[str, Mapping[str, Any]], options: Mapping[str, Any]
) -> Mapping[str, Mapping[str, Any]]:
    """Return the passes with each option in the pass that it names, or in the first that has one of its name."""
    changed: dict[str, dict[str, Any]] = {name: dict(own) for name, own in passes.items()}
    known = {name: [f.name for f in fields(_method(name))] for name in passes}
    for option, value in options.items():
        wanted, _, own = option.rpartition(".")
        if wanted:
            refuse_unknown([wanted], [*passes], "the list of passes")
            refuse_unknown([own], known[wanted], f"the method {wanted}")
        owner = wanted or next((name for name, names in known.items() if own in names), None)
        if owner is None:
            where = f"the method {' + '.join(passes)}"
            _refuse_what_others_have(own, where)
            refuse_unknown([own], [*chain.from_iterable(known.values())], where)
        changed[owner or ""][own] = value
    return changed


def _refuse_what_others_have(option: str, where: str) -> None:
    """Raise UsageError for a hyper-parameter that methods have which the recipe does not use."""
    of = [name for name in methods.passes() if option in [f.name for f in fields(_method(name))]]
    if of:
        raise UsageError(f"{where} has no {option!r}, which is one of {' and '.join(of)}; leave it out, or use those")


def parse_setting(text: str) -> tuple[str, Any]:
    """Return name and value of `NAME=VALUE`: a TOML value, or a bare word, which means itself.

    Raises:
        UsageError: it is neither.
    """
    name, _, value = (part.strip() for part in text.partition("="))
    table = {"value": value} if value.isidentifier() and value not in ("true", "false") else {}
    try:
        table = table or parse_toml(f"value = {value}")
    except ValueError:
        table = {}
    if not name or not table:
        raise UsageError(f"--set takes NAME=VALUE such as lr=0.001 or schedule=linear, not {text!r}")
    return name, table["value"]


def _settle_bits(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the changes with what a target or a number of bits implies."""
    if changes.get("target_bpw") is not None:
        if "bits" in changes:
            raise UsageError(
                f"--wbits {changes['bits']} and --target-bpw {changes['target_bpw']:g} both say how many bits; give one"
            )
        return {"symmetric": True, **changes}
    return {"target_bpw": None, **changes} if "bits" in changes else dict(changes)


def _scheme_of_target(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table `scheme` of a recipe that has a target."""
    if "bits" in table:
        raise ValueError("it has both target_bpw and scheme.bits; leave one out")
    return {"symmetric": True, **table}


def _read_passes(entries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the entries by method name; a method that is named twice is refused, for one would hide the other."""
    steps: dict[str, dict[str, Any]] = {}
    for entry in entries:
        name = entry.pop("method")
        if not isinstance(name, str):
            raise ValueError(f"it names the pass {name!r}, which is no string")
        if name in steps:
            raise ValueError(f"it names the pass {name} twice")
        steps[name] = entry
    return steps


def _read_resilience(table: Mapping[str, Any]) -> Any:  # noqa: ANN401  a Resilience
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in table.items()}
    return build_dataclass(Resilience, values)


def _method(name: str) -> Any:  # noqa: ANN401  the class of a pass
    """Return a method by its name; who took the name of a preset for one is told so."""
    if name in presets.NAMES:
        raise UsageError(f"{name!r} is no method but a preset; use --preset {name}")
    return methods.find(methods.family_of(name), name)


def _build(name: str, options: Mapping[str, Any], scheme: QuantScheme) -> Pass:
    method = _method(name)
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    refuse_misfits(method, options, f"the method {name}")
    step: Pass = replace(method.for_scheme(scheme), **options)
    return step


def _without_none(value: Any) -> Any:  # noqa: ANN401  TOML has no null: what is left out is the default
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value
