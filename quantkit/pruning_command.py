"""The command `prune`: weights become zero, and stay in the dtype that the model has."""

from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.errors import UsageError
from quantkit.failures import errors, launched
from quantkit.flags import (
    Allocation,
    AllowShort,
    Device,
    DryRun,
    Json,
    Memory,
    Overwrite,
    RecipeFile,
    Restart,
    Revision,
    Seed,
    Seqlen,
    SourceModel,
    Sparsity,
    Target,
)
from quantkit.running import run


def prune(
    model: SourceModel = None,
    output: Target = None,
    method: Annotated[
        str | None, typer.Option(help="How weights are chosen: quantkit list pruners. (default: sparsegpt)")
    ] = None,
    sparsity: Sparsity = None,
    allocation: Allocation = None,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Glob of linears that are pruned, e.g. '*.mlp.*'; repeatable. (default: all)"),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Glob of linears that are not pruned, e.g. '*.down_proj'; repeatable.")
    ] = None,
    recover: Annotated[
        int | None,
        typer.Option(help="Updates by which the kept weights of each block are trained afterwards. (default: 0)"),
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Text to learn from, as of quantize. (default: default; embedded for magnitude)")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration sequences. (default: 128; 4 for magnitude)")] = None,
    seqlen: Seqlen = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences in a batch. (default: 1)")] = None,
    allow_short: AllowShort = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other hyper-parameter of the method; repeatable."),
    ] = None,
    seed: Seed = None,
    device: Device = None,
    revision: Revision = None,
    recipe: RecipeFile = None,
    overwrite: Overwrite = False,
    restart: Restart = False,
    memory: Memory = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Prune MODEL block by block and write it, zeros included, in its own dtype: plain transformers loads it.

    quantkit prune llama-7b --method wanda --sparsity 2:4 -o llama-7b-sparse

    With quantization in one run: quantkit quantize MODEL --prune sparsegpt --sparsity 0.5
    """
    with errors(as_json), launched() as team:
        text = {
            "text": calibration,
            "samples": samples,
            "seqlen": seqlen,
            "batch_size": batch_size,
            "allow_short": allow_short,
            "seed": seed,
            "revision": revision,
        }
        options = {"sparsity": sparsity, "allocation": allocation, "include": include, "exclude": exclude}
        chosen = _recipe(
            model, recipe, given(text), method, settings(given({**options, "recover": recover}), set_ or [])
        )
        run(
            chosen,
            output,
            team=team,
            device=device,
            memory=memory,
            overwrite=overwrite,
            restart=restart,
            dry_run=dry_run,
            as_json=as_json,
        )


def _recipe(
    model: str | None, file: Path | None, changes: dict[str, Any], method: str | None, options: dict[str, Any]
) -> Any:  # noqa: ANN401  a Recipe, whose module waits for torch
    """Return the recipe of the flags: the defaults, or a file's, with the flags that were given changed."""
    from quantkit.recipe import Recipe, from_defaults, with_changes

    if file is not None:
        found = Recipe.from_toml(file, model)
        if not found.dense:
            raise UsageError(f"{file} is a recipe that quantizes; use quantkit quantize --recipe {file}")
        return with_changes(found, changes, prune=method, options=options)
    if model is not None:
        return from_defaults(model, {**changes, "dense": True}, prune=method, options=options)
    raise UsageError("name a model: quantkit prune MODEL -o DIRECTORY (quantkit list models shows aliases)")


def settings(flags: dict[str, Any], more: list[str]) -> dict[str, Any]:
    """Return the hyper-parameters that have a flag of their own, and those of `--set`.

    Raises:
        UsageError: one is given twice, or `--set` cannot be read.
    """
    from quantkit.recipe import parse_setting

    options = dict(flags)
    for name, value in map(parse_setting, more):
        if name in options:
            raise UsageError(f"the hyper-parameter {name} is given twice; leave one out")
        options[name] = value
    return options


def given(values: dict[str, Any]) -> dict[str, Any]:
    """Return the flags that were given."""
    return {name: value for name, value in values.items() if value is not None}
