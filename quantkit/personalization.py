"""`personalize`: a packed model learns from somebody's examples, and what it learned is a small file."""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.ambient import usual_settings
from quantkit.calibrate.data import load_tokenizer
from quantkit.errors import DataError, ModelError, OutputError, UsageError
from quantkit.evaluation.loading import context_length, quiet
from quantkit.fields import build_dataclass
from quantkit.model import names
from quantkit.model.workspace import Workspace
from quantkit.personal import choices
from quantkit.personal.data import Example, Form, examples, read_rows, split, word_tokens
from quantkit.personal.delta import SUFFIX, Delta, base_hash, frozen_hash
from quantkit.personal.journal import SlopeJournal, replayed, written
from quantkit.personal.loop import Loop, State, peak
from quantkit.personal.start import PRIVATE, Setting, start
from quantkit.personal.updates import Updates
from quantkit.personal.wish import Wish
from quantkit.runtime import packed_model

Told = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Personalized:
    """A finished run: where the delta lies, and how it came about."""

    output: Path
    report: Mapping[str, Any]


@usual_settings()
def personalize(  # noqa: PLR0913
    model: str | Path,
    data: str | Path,
    *,
    output: str | Path,
    journal: str | Path | None = None,
    device: str | None = None,
    overwrite: bool = False,
    restart: bool = False,
    progress: Told | None = None,
    **wish: Any,  # noqa: ANN401  checked against the fields of Wish
) -> Personalized:
    """Let a packed model learn from the examples in `data` and write what it learned to `output`.

    >>> quantkit.personalize("llama-7b-w4", "mine.jsonl", output="mine.safetensors", train="bias", steps=200)

    The packed weights stay as they are, to the bit. An interrupted run of the same arguments goes on.

    Args:
        model: a packed checkpoint: a directory or a Hub id.
        data: a .jsonl, .json, .csv, .tsv or .parquet file; see `personal.data` for its columns.
        output: the .safetensors file to write.
        journal: where to write the journal of a run of forward passes, from which `replay` has the delta again.
        device: `cpu`, `cuda`, `cuda:1`; None: a GPU if there is one.
        overwrite: replace `output`.
        restart: begin anew instead of going on.
        progress: told after every step: step, steps, loss, validation, memory_bytes.
        wish: the fields of `personal.wish.Wish`: train, gradient, objective, steps, lr, ….

    Raises:
        QuantkitError: see `quantkit.errors`; the model is untouched.
    """
    target, wanted = _target(output, overwrite), build_dataclass(Wish, wish)
    _refuse_misfits(wanted, journal)
    trainable = wanted.make("parameters")
    updates = wanted.updates()
    source = names.resolve(str(model)).path
    rows = read_rows(Path(data))
    with quiet():
        tokenizer = load_tokenizer(source)
    base = base_hash(source)
    loaded = packed_model.load(source, device=device)
    form = wanted.form(context_length(loaded))
    learned, kept = split(examples(rows, tokenizer, form, data), wanted.validation, wanted.seed)
    run = _Run(
        base=base,
        wish=wanted,
        trainable=trainable,
        objective=_objective(wanted, form, tokenizer, learned),
        asked=wanted.setting(len(learned)),
        updates=updates,
        form=form,
        train=learned,
        kept=kept,
    )
    with Workspace(target) as place:
        if restart:
            shutil.rmtree(place.run, ignore_errors=True)
        return run.go(
            loaded,
            target,
            state=place.run / "state.safetensors",
            journal=None if journal is None else Path(journal),
            progress=progress or (lambda _: None),
        )


@usual_settings()
def replay(model: str | Path, journal: str | Path, *, output: str | Path, overwrite: bool = False) -> Personalized:
    """Write the delta that a run of forward passes came to, from its journal alone: no data, no forward pass.

    Args:
        model: the packed checkpoint of the run.
        journal: what `personalize` wrote with `journal`.
        output: the .safetensors file to write.
        overwrite: replace it.

    Raises:
        DataError: the journal is damaged, or comes to other values here than it did.
        ModelError: it is of another model.
    """
    target, source = _target(output, overwrite), names.resolve(str(model)).path
    kept, base = SlopeJournal.read(Path(journal)), base_hash(source)
    if kept.base != base:
        raise ModelError(f"the journal is of another model than {source}; give the one that it was made with")
    told = kept.training
    trainable = choices.build("parameters", told["trainable"], told["options"])
    parameters = trainable.attach(packed_model.load(source, device="cpu"))
    tensors, same = replayed(kept, parameters)
    if not same:
        raise DataError(f"{journal} comes to other values here than it did; use the delta that it came with")
    ledger = "none: the result tells of the examples" if kept.private_data else "private, see the delta of the run"
    report = {"replayed": True, "steps": len(kept.rho), "gradient": kept.gradient}
    Delta(
        base=base,
        trainable=told["trainable"],
        options=asdict(trainable),
        tensors=tensors,
        ledger=ledger,
        report=report,
    ).save(target)
    return Personalized(output=target, report={**report, "bytes": target.stat().st_size})


@dataclass(frozen=True, kw_only=True)
class _Run:
    base: str
    wish: Wish
    trainable: Any
    objective: Any
    asked: Setting
    updates: Updates
    form: Form
    train: list[Example]
    kept: list[Example]

    def go(
        self,
        model: Any,  # noqa: ANN401
        target: Path,
        *,
        state: Path,
        journal: Path | None,
        progress: Told,
    ) -> Personalized:
        begun = start(self.asked)
        parameters = self.trainable.attach(model)
        for parameter in parameters.values():
            parameter.requires_grad_(begun.estimator.needs_gradients)
        before, first = frozen_hash(model, parameters), {n: p.detach().clone() for n, p in parameters.items()}
        loop = Loop(
            *(model, parameters, self.objective, begun),
            train=self.train,
            validation=self.kept,
            updates=self.updates,
            pace=self.wish.pace(),
            device=model.device,
        )
        tensors = loop.run(State(state, self._identity()), progress)
        if frozen_hash(model, parameters) != before:
            raise RuntimeError("a tensor that must not change did; nothing was written")  # a bug
        facts = self._facts(loop)
        Delta(
            base=self.base,
            trainable=self.wish.train,
            options=asdict(self.trainable),
            tensors=tensors,
            ledger=begun.sentence,
            report={**facts, "privacy": begun.account()},
        ).save(target)
        if journal is not None:
            self._journal(begun.estimator, first, tensors, loop).save(journal)
        shutil.rmtree(state.parent, ignore_errors=True)
        told = {**facts, "privacy": begun.account(), "ledger": begun.sentence, **_measured(loop, model.device)}
        return Personalized(output=target, report={**told, "bytes": target.stat().st_size})

    def _identity(self) -> dict[str, Any]:
        """Return all that decides what the run comes to."""
        chosen = {**self.wish.told(), "base": self.base}
        rest = {"asked": asdict(self.asked), "updates": asdict(self.updates), "form": asdict(self.form)}
        pace = {name: value for name, value in asdict(self.wish.pace()).items() if name != "save_seconds"}
        data = hashlib.sha256(repr((self.train, self.kept)).encode()).hexdigest()
        return {**chosen, **rest, **pace, "data": data}

    def _facts(self, loop: Loop) -> dict[str, Any]:
        """Return what may be known to everybody who gets the delta: of a private run, not how large batches were."""
        return {
            **({} if self.asked.private else {"forwards": loop.progress.forwards}),
            **self.wish.told(),
            "base": self.base,
            "parameters": sum(parameter.numel() for parameter in loop.parameters.values()),
            "updates": asdict(loop.updates),
            "batch_size": self.asked.batch_size,
            "seed": self.asked.seed,
            "steps": loop.progress.step,
            "best_step": loop.progress.best_step if loop.keeps_best else loop.progress.step,
            "stopped": loop.progress.stopped,
        }

    def _journal(self, estimator: Any, first: Mapping[str, Tensor], last: Mapping[str, Tensor], loop: Loop) -> Any:  # noqa: ANN401
        steps = loop.progress.best_step if loop.keeps_best else loop.progress.step
        training = {"trainable": self.wish.train, "options": self.wish.given("parameters")}
        return written(
            *(estimator, loop.updates, first, last),
            base=self.base,
            steps=steps,
            private_data=not self.asked.private or self.asked.seeded,
            training=training,
        )


def _measured(loop: Loop, device: torch.device) -> dict[str, Any]:
    """Return what a report says of a run besides its facts."""
    progress = loop.progress
    return {
        "forwards": loop.progress.forwards,
        "examples": len(loop.train),
        "validation_examples": len(loop.validation),
        "loss": progress.losses[-1] if progress.losses else None,
        "losses": progress.losses,
        "validations": progress.validations,
        "seconds": progress.seconds,
        "peak_memory_bytes": peak(device),
    }


def _refuse_misfits(wish: Wish, journal: str | Path | None) -> None:
    """Raise UsageError for choices that do not go together, OutputError where no journal can be."""
    trainable, estimator, objective = (choices.find(axis, name) for axis, name in wish.axes.items())
    if estimator.needs_gradients and not objective.differentiable:
        raise UsageError(f"{wish.objective} has no gradient; use --gradient mezo, which needs none")
    if wish.gradient in ("dp", "dice") and not trainable.per_example:
        raise UsageError(
            f"{wish.gradient} needs gradients of single examples, which {wish.train} does not have; train bias or norm"
        )
    if wish.gradient in PRIVATE and wish.patience is not None:
        raise UsageError(f"--patience ends a run by examples that {wish.gradient} should keep secret; leave it out")
    if journal is not None and estimator.needs_gradients:
        raise UsageError(f"{wish.gradient} has no journal; leave out --journal, or use --gradient mezo")
    if journal is not None and not Path(journal).absolute().parent.is_dir():
        raise OutputError(f"{journal} cannot be written: there is no directory {Path(journal).absolute().parent}")


def _objective(wish: Wish, form: Form, tokenizer: Any, items: list[Example]) -> Any:  # noqa: ANN401
    """Return what is minimised, which may have to know the words of labels and how to read tokens."""
    more: dict[str, Any] = {}
    name, labelled = wish.axes["objectives"], items[0].label is not None
    if name == "classification" and not labelled:
        raise DataError("classification needs the columns sentence and label; rename them, or --column label=NAME")
    if name in ("classification", "metric") and labelled:
        more["words"] = tuple(word_tokens(form, tokenizer).values())
    objective = wish.make("objectives", **more)
    score = getattr(objective, "score", None)
    if callable(score):  # somebody's, of two texts
        return replace(objective, score=lambda *pair: float(score(*map(tokenizer.decode, pair))))
    return objective


def _target(output: str | Path, overwrite: bool) -> Path:
    target = Path(output)
    if target.suffix != SUFFIX:
        raise UsageError(f"a delta is a {SUFFIX} file, not {target.name!r}")
    if target.is_dir() or (target.exists() and not overwrite):
        raise OutputError(f"{target} exists; pass --overwrite to replace it, or choose another -o")
    if not target.absolute().parent.is_dir():
        raise OutputError(f"{target} cannot be written: there is no directory {target.absolute().parent}")
    return target
