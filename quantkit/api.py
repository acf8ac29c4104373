"""The command line's verbs from Python: keyword arguments instead of flags, values and exceptions instead of text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit import methods
from quantkit.core.scheme import QuantScheme
from quantkit.pipeline import Progress, execute, prepare
from quantkit.plan import Plan
from quantkit.recipe import Calibration, Recipe

DEFAULT_GROUP_SIZE = 128
SAMPLES_TO_LEARN, SAMPLES_TO_CHECK = 128, 4


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A finished run: where the model lies, and the content of its report.json."""

    output: Path
    report: Mapping[str, Any]


def make_recipe(  # noqa: PLR0913  the recipe's fields by their short names
    model: str | Path,
    *,
    wbits: int = 4,
    group_size: int | None = DEFAULT_GROUP_SIZE,
    symmetric: bool = False,
    method: str = "omniquant",
    options: Mapping[str, Any] | None = None,
    ignore: Sequence[str] = (),
    calibration: str | Path | None = None,
    samples: int | None = None,
    seqlen: int | None = None,
    batch_size: int = 1,
    allow_short: bool = False,
    seed: int = 0,
    revision: str | None = None,
) -> Recipe:
    """Return the recipe of a run with one method.

    A method that learns nothing from data calibrates on a few sequences of the embedded text, just enough to measure
    block errors and to record logits for `quantkit check`.

    Raises:
        UsageError: a value that is out of range, an unknown method or hyper-parameter.
    """
    learns = methods.find("quantize", method).learns
    recipe = Recipe(
        model=str(model),
        revision=revision,
        scheme=QuantScheme(bits=wbits, group_size=group_size, symmetric=symmetric),
        ignore=tuple(ignore),
        passes={method: dict(options or {})},
        calibration=Calibration(
            text=str(calibration or ("default" if learns else "embedded")),
            samples=samples or (SAMPLES_TO_LEARN if learns else SAMPLES_TO_CHECK),
            seqlen=seqlen,
            batch_size=batch_size,
            allow_short=allow_short,
        ),
        seed=seed,
    )
    recipe.build_passes()
    return recipe


def quantize(
    model: str | Path | Recipe,
    *,
    output: str | Path,
    overwrite: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
    **fields: Any,  # noqa: ANN401  checked by make_recipe's own signature
) -> Quantized:
    """Quantize a model and write it, packed, to `output`.

    >>> quantkit.quantize("llama-7b", wbits=4, output="llama-7b-w4")

    Args:
        model: a directory, a Hub id, an alias of the model zoo, or a whole recipe.
        output: the directory to write; it appears whole or not at all.
        overwrite: replace an existing output, which is kept until the new one is whole.
        device: `cpu`, `cuda`, `cuda:1`; None: a GPU if there is one.
        progress: told what happens; None: nobody.
        fields: the keyword arguments of `make_recipe`, unless `model` is a recipe.

    Raises:
        QuantkitError: see `quantkit.errors`; nothing was written then.
    """
    recipe = model if isinstance(model, Recipe) else make_recipe(model, **fields)
    prepared = prepare(recipe, device)
    report = execute(prepared, Path(output), overwrite=overwrite, progress=progress)
    return Quantized(output=Path(output), report=report)


def plan(model: str | Path | Recipe, *, device: str | None = None, **fields: Any) -> Plan:  # noqa: ANN401
    """Return what `quantize` with the same arguments would do: sites, sizes, memory, disk, time; computes nothing.

    Raises:
        QuantkitError: see `quantkit.errors`.
    """
    recipe = model if isinstance(model, Recipe) else make_recipe(model, **fields)
    return prepare(recipe, device).plan
