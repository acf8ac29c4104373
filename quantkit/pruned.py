"""The verb `prune` from Python."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.ambient import usual_settings
from quantkit.keywords import make_recipe
from quantkit.pipeline import Progress, execute, prepare
from quantkit.recipe import DEFAULT_PRUNER, Recipe
from quantkit.units import parse_size


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """A finished run: where the model lies, and the content of its report.json."""

    output: Path
    report: Mapping[str, Any]


@usual_settings()
def prune(  # noqa: PLR0913
    model: str | Path | Recipe,
    *,
    output: str | Path,
    method: str = DEFAULT_PRUNER,
    sparsity: str | float = 0.5,
    options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    restart: bool = False,
    device: str | None = None,
    memory: int | str | None = None,
    progress: Progress | None = None,
    **fields: Any,  # noqa: ANN401  checked by the recipe
) -> Pruned:
    """Prune a model and write it, zeros included, in its own dtype to `output`.

    >>> quantkit.prune("llama-7b", method="wanda", sparsity="2:4", output="llama-7b-sparse")

    To prune and quantize in one run: `quantkit.quantize(..., prune="wanda", options={"sparsity": "2:4"})`.

    Args:
        model: a directory, a Hub id, an alias of the model zoo, or a whole recipe, which then says everything else.
        output: the directory to write; it appears whole or not at all.
        method: how weights are chosen: `magnitude`, `wanda`, `sparsegpt`, `mfac` or `random-graph`.
        sparsity: a share such as 0.5, or N:M such as "2:4", by which 2 of every 4 inputs stay.
        options: other hyper-parameters, such as {"allocation": "loss", "exclude": ["*.down_proj"], "recover": 64}.
        overwrite: replace an existing output, which is kept until the new one is whole.
        restart: begin anew instead of going on behind what an interrupted run finished.
        device: as in `quantize`.
        memory: as in `quantize`.
        progress: told what happens; None: nobody.
        fields: `calibration`, `samples`, `seqlen`, `batch_size`, `allow_short`, `seed`, `revision` as in `make_recipe`.

    Raises:
        QuantkitError: see `quantkit.errors`; nothing was written then.
    """
    if not isinstance(model, Recipe):
        own = {"sparsity": sparsity, **(options or {})}
        model = make_recipe(model, prune=method, options=own, dense=True, **fields)
    prepared = prepare(model, device, parse_size(memory))
    report = execute(prepared, Path(output), overwrite=overwrite, restart=restart, progress=progress)
    return Pruned(output=Path(output), report=report)
