"""All that a run without gradients did, in a few bytes a step, and how to do it again without the data.

Directions are functions of a seed, steps are functions of directions and slopes. So the slopes, four bytes each, and
what the run was told give every tensor of it again (MeZO, arXiv 2305.17333, section 2.1), Adam's moments and the
removed subspaces too. A journal is a safetensors file:

    rho            float32 (steps, directions), the slopes
    master_seed    uint64 (1,), of the directions
    metadata       `format`, and as JSON in `journal` the other fields of `SlopeJournal`

Slopes are functions of somebody's data, and tell of it like gradients, unless the run was private.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from quantkit.errors import DataError
from quantkit.model.writer import whole
from quantkit.personal import noise
from quantkit.personal.gradients.dp_mezo import DpMezo
from quantkit.personal.gradients.mezo import Mezo
from quantkit.personal.gradients.subspace_zo import SubspaceZo
from quantkit.personal.updates import Updates
from quantkit.untrusted import parse_json

FORMAT = "quantkit slopes 1"
ESTIMATORS: dict[str, type[Mezo]] = {"mezo": Mezo, "subspace-zo": SubspaceZo, "dp-mezo": DpMezo}
TENSORS = ("rho", "master_seed")


@dataclass(frozen=True, kw_only=True)
class SlopeJournal:
    """What a run was told and what it measured.

    Attributes:
        rho: (steps, directions) float32.
        seed: of the directions.
        gradient: name of the estimator.
        options: its fields, without the seed and without keys.
        distance: how far parameters were moved.
        updates: what was done with the gradients.
        tensors: name, shape and dtype of each tensor that may change, in order.
        base: hash of the model that they belong to.
        before: SHA-256 of the tensors before the first step.
        after: SHA-256 of the tensors after the last.
        private_data: whether the slopes tell of the data they were measured with.
        training: what else is needed to have the tensors as they were before the first step.
        algorithm: of the directions.
    """

    rho: Tensor
    seed: int
    gradient: str
    options: Mapping[str, Any]
    distance: float
    updates: Updates
    tensors: tuple[tuple[str, tuple[int, ...], str], ...]
    base: str
    before: str
    after: str
    private_data: bool = True
    training: Mapping[str, Any] = field(default_factory=dict)
    algorithm: str = noise.ALGORITHM

    def save(self, path: Path) -> None:
        """Write it to `path`, whole or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        told = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("rho", "seed")}
        told["updates"] = asdict(self.updates)
        tensors = {"rho": self.rho, "master_seed": torch.tensor([self.seed], dtype=torch.uint64)}
        with whole(path) as partial:
            save_file(tensors, partial, metadata={"format": FORMAT, "journal": json.dumps(told)})

    @classmethod
    def read(cls, path: Path) -> "SlopeJournal":
        """Return the journal in a file.

        Raises:
            DataError: there is none, or one that is damaged or of another version.
        """
        if not path.is_file():
            raise DataError(f"there is no journal {path}; name the file that quantkit personalize wrote")
        try:
            with safe_open(path, framework="pt") as file:
                told = file.metadata() or {}
                if told.get("format") != FORMAT:
                    raise DataError(f"{path} is no journal of slopes; name the file that quantkit personalize wrote")
                tensors = {name: file.get_tensor(name) for name in TENSORS}
            return cls._of(parse_json(told["journal"]), **tensors)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is damaged ({error}); get it again") from error

    @classmethod
    def _of(cls, told: dict[str, Any], *, rho: Tensor, master_seed: Tensor) -> "SlopeJournal":
        if rho.dim() != 2 or rho.dtype != torch.float32 or not bool(rho.isfinite().all()):
            raise ValueError("its slopes are no finite numbers (steps, directions)")
        told["updates"] = Updates(**told["updates"])
        told["tensors"] = tuple(
            (str(name), tuple(map(int, shape)), str(dtype)) for name, shape, dtype in told["tensors"]
        )
        return cls(rho=rho, seed=int(master_seed.item()), **told)

    def estimator(self) -> Mezo:
        """Return the estimator as it was before the first step.

        Raises:
            DataError: it is not known to this version.
        """
        if self.algorithm != noise.ALGORITHM or self.gradient not in ESTIMATORS:
            raise DataError(
                f"the journal's directions are of {self.algorithm} and {self.gradient}, which this version of quantkit "
                "does not have; use the version that wrote it"
            )
        made = ESTIMATORS[self.gradient](seed=self.seed, **self.options)
        made.distance = self.distance
        return made


def written(  # noqa: PLR0913  each is a fact of the run
    estimator: Mezo,
    updates: Updates,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    *,
    base: str,
    steps: int | None = None,
    private_data: bool = True,
    training: Mapping[str, Any] | None = None,
) -> SlopeJournal:
    """Return the journal of a run that ended: what it began with, what it came to, and how.

    Args:
        estimator: whose slopes were followed.
        updates: what was done with its gradients.
        before: the tensors at the beginning.
        after: the tensors that are the result.
        base: hash of the model that they belong to.
        steps: after how many steps they were the result; None: after all.
        private_data: False if the run was private, so that its slopes may be seen by everybody.
        training: what else is needed to have `before` again.
    """
    told = {f.name: getattr(estimator, f.name) for f in fields(estimator) if f.init and f.repr and f.name != "seed"}
    state = estimator.state()
    return SlopeJournal(
        rho=state["rho"][:steps].contiguous(),
        seed=estimator.seed,
        gradient=next(name for name, kind in ESTIMATORS.items() if kind is type(estimator)),
        options=told,
        distance=float(state["distance"]),
        updates=updates,
        tensors=manifest(before),
        base=base,
        before=digest(before),
        after=digest(after),
        private_data=private_data,
        training=training or {},
    )


def replayed(journal: SlopeJournal, before: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """Return the tensors that a run came to, from those it began with, and whether they are the same to the bit.

    They are on the machine on which it ran; on others PyTorch may round a step of the optimizer differently.

    Raises:
        DataError: these are not the tensors that it began with.
    """
    if manifest(before) != journal.tensors or digest(before) != journal.before:
        raise DataError("the journal began with other tensors than these; use the model that it was made with")
    estimator = journal.estimator()
    parameters = {name: nn.Parameter(tensor.detach().to("cpu", copy=True)) for name, tensor in before.items()}
    optimizer = journal.updates.begin(parameters)
    for step, rho in enumerate(journal.rho):
        estimator.follow(rho, parameters, step=step)
        journal.updates.take(optimizer, step)
    after = {name: parameter.detach() for name, parameter in parameters.items()}
    return after, digest(after) == journal.after


def manifest(tensors: Mapping[str, Tensor]) -> tuple[tuple[str, tuple[int, ...], str], ...]:
    """Return name, shape and dtype of each tensor."""
    return tuple((name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items())


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, shapes, dtypes and values, in order."""
    found = hashlib.sha256()
    for told, tensor in zip(manifest(tensors), tensors.values(), strict=True):
        found.update(f"{told}\n".encode())
        found.update(tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
