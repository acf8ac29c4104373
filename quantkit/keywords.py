"""A recipe from keyword arguments."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.recipe import Recipe, from_defaults
from quantkit.resilience.choice import Resilience


def make_recipe(
    model: str | Path,
    *,
    method: str | None = None,
    preset: str | None = None,
    prune: str | None = None,
    options: Mapping[str, Any] | None = None,
    **fields: Any,  # noqa: ANN401
) -> Recipe:
    """Return the recipe of a run: that of a preset, or of one method.

    Args:
        model: a directory, a Hub id or an alias.
        method: name of one method, with its own defaults.
        preset: `fast`, `balanced`, `best` or `paper`; None without a method: `balanced`.
        prune: name of a method that prunes first; None: nothing is pruned.
        options: hyper-parameters; `lr` is set in the first pass that has one of that name, `distill.lr` in that pass.
        fields: `wbits` or `target_bpw` (bits chosen by measured loss), `group_size` (None: one scale per row),
            `symmetric`; `abits`, `symmetric_activations`, `kv_bits`; `rotate`; `ignore` (globs); `calibration` (a name,
            a file, or `self`: text that the model writes), `samples`, `seqlen`, `batch_size`, `allow_short`; `seed`,
            `revision`; `formats` (what to write besides compressed-tensors); `resilience` (bounds on activations: a
            kind such as `hybrid`, or a `Resilience`).

    Raises:
        UsageError: a value that is out of range, an unknown method, preset, field or hyper-parameter, or a method and a
            preset.
    """
    renamed = {
        "wbits": "bits",
        "abits": "activation_bits",
        "symmetric_activations": "activation_symmetric",
        "calibration": "text",
    }
    changes = {
        renamed.get(name, name): str(value) if isinstance(value, Path) else value for name, value in fields.items()
    }
    if isinstance(changes.get("resilience"), str):
        changes["resilience"] = Resilience.parse(changes["resilience"])
    for name in {"ignore", "formats"} & changes.keys():
        changes[name] = tuple(changes[name])
    return from_defaults(str(model), changes, method=method, preset=preset, prune=prune, options=options)
