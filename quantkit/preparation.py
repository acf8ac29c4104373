"""What a run is before it computes anything: everything that speaks against it is said here."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantkit.calibrate.team import Team
from quantkit.conversion import refuse_unfit
from quantkit.errors import OutputError, UsageError
from quantkit.model import names
from quantkit.model.device import pick_device
from quantkit.model.integrity import sha256
from quantkit.model.names import Source
from quantkit.model.rotation import Rotation
from quantkit.model.skeleton import Skeleton
from quantkit.model.writer import refuse_existing, refuse_full_disk
from quantkit.planning import Plan, make_plan
from quantkit.protection import refuse_unprotectable
from quantkit.provenance import versions
from quantkit.recipe import Recipe
from quantkit.shares import refuse_too_large


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that nothing speaks against: recipe, source, skeleton, plan, the rotation if there is one, who runs it."""

    recipe: Recipe
    source: Source
    skeleton: Skeleton
    plan: Plan
    rotation: Rotation | None = None
    team: Team = field(default_factory=Team)


def prepare(recipe: Recipe, device: str | None = None, memory: int | None = None, team: Team | None = None) -> Prepared:
    """Look at the model without its weights and refuse what cannot work.

    `memory` is the most host memory in bytes that the run may take on a machine, None: a share of what is free. The
    plan is that of one process of the `team`.

    Raises:
        UsageError, ModelError, NetworkError: see `names.resolve`, `Skeleton`, `make_plan`, `conversion.refuse_unfit`.
    """
    team = team or Team()
    recipe.build_passes()
    team.refuse_uneven(recipe.calibration.samples, recipe.calibration.batch_size)
    source = names.resolve(recipe.model, revision=recipe.revision, weights=False)
    recipe = replace(recipe, revision=source.revision)
    team.agree("recipes", recipe.to_toml())
    team.agree("models", sha256(source.path / "config.json"))
    skeleton = Skeleton(source.path)
    share = memory // team.local_size if memory else None
    plan = make_plan(skeleton, _share(recipe, team), pick_device(team.device(device)), share)
    _refuse_formats(recipe, source, plan)
    refuse_too_large(plan, recipe)
    if recipe.resilience:
        refuse_unprotectable(skeleton, recipe.resilience)
    rotation = Rotation.of(skeleton, recipe.seed) if recipe.rotate else None
    return Prepared(recipe=recipe, source=source, skeleton=skeleton, plan=plan, rotation=rotation, team=team)


def _share(recipe: Recipe, team: Team) -> Recipe:
    """Return what one process of the team has to do."""
    text = recipe.calibration
    own = replace(text, samples=text.samples // team.size, batch_size=text.batch_size // team.size)
    return replace(recipe, calibration=own)


def _refuse_formats(recipe: Recipe, source: Source, plan: Plan) -> None:
    if not plan.rounds:
        return
    schemes = {str(each): each for each in plan.budget.schemes} if plan.budget else plan.schemes
    refuse_unfit(recipe.formats, schemes, plan.shapes, plan.classes, source.path)


def refuse_what_cannot_work(prepared: Prepared, output: Path, *, overwrite: bool) -> None:
    """Refuse what the machine cannot do.

    Raises:
        UsageError: it would need more memory than is free.
        OutputError: `output` exists, would replace its own source, or the disk is too small.
    """
    if prepared.team.leads:
        refuse_existing(output, overwrite=overwrite)
        _refuse_source(output, prepared.source.path)
        refuse_full_disk(output, prepared.plan.disk_bytes)
    if prepared.plan.refusal:
        raise UsageError(prepared.plan.refusal)


def _refuse_source(output: Path, source: Path) -> None:
    target, model = output.resolve(), source.resolve()
    if target == model or target in model.parents:
        raise OutputError(f"{output} holds the model that is being read; choose another -o")
    if model in target.parents:
        raise OutputError(f"{output} lies inside the model that is being read; choose another -o")


def identity(prepared: Prepared) -> dict[str, object]:
    """Return what must be the same for an interrupted run to go on."""
    recipe = tomllib.loads(prepared.recipe.to_toml())
    passes = {step.pop("method"): step for step in recipe.pop("passes")}
    facts = {**_flat(recipe), "method": " + ".join(passes), **_flat(passes)}
    return facts | {"config.json": sha256(prepared.source.path / "config.json")} | versions()


def _flat(table: Mapping[str, Any]) -> dict[str, object]:
    """Return the values of nested tables by the names that a user knows them by, without those of the tables."""
    flat: dict[str, object] = {}
    for name, value in table.items():
        flat |= _flat(value) if isinstance(value, Mapping) else {name: value}
    return flat
