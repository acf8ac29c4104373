"""`personalize`: a packed model learns from somebody's examples, and what it learned is a small file."""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.ambient import usual_settings
from quantkit.calibrate.data import load_tokenizer
from quantkit.errors import DataError, OutputError, UsageError
from quantkit.evaluation.loading import context_length, quiet
from quantkit.model import names
from quantkit.model.workspace import Workspace
from quantkit.personalize import choices
from quantkit.personalize.data import Example, Form, examples, read_rows, split, word_tokens
from quantkit.personalize.delta import SUFFIX, Delta, base_hash, frozen_hash
from quantkit.personalize.journal import written
from quantkit.personalize.loop import Loop, Pace, State, peak
from quantkit.personalize.start import PRIVATE, Setting, start
from quantkit.personalize.updates import Updates
from quantkit.runtime import packed_model

LONGEST = 512  # tokens of an example, unless asked for more
SHORT = {"lm": "language-model"}  # names that are easier to type
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
    train: str = "bias",
    gradient: str = "backprop",
    objective: str = "language-model",
    steps: int = 500,
    lr: float | None = None,
    batch_size: int = 8,
    micro_batch: int | None = None,
    optimizer: str = "adam",
    schedule: str = "constant",
    warmup: int = 0,
    decay: float = 0.0,
    validation: float = 0.1,
    validate_every: int = 50,
    patience: int | None = None,
    seqlen: int | None = None,
    score: str = "answer",
    template: str = "{sentence}",
    words: Mapping[str, str] | None = None,
    columns: Mapping[str, str] | None = None,
    cut: bool = False,
    sampling: str | None = None,
    epsilon: float | None = None,
    delta: float | None = None,
    noise: float | None = None,
    seeded: bool = False,
    journal: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str | None = None,
    overwrite: bool = False,
    restart: bool = False,
    save_seconds: float = 20.0,
    progress: Told | None = None,
) -> Personalized:
    """Let a packed model learn from the examples in `data` and write what it learned to `output`.

    >>> quantkit.personalize("llama-7b-w4", "mine.jsonl", output="mine.safetensors", steps=200)

    The packed weights stay as they are, to the bit. An interrupted run of the same arguments goes on.

    Args:
        model: a packed checkpoint: a directory or a Hub id.
        data: a .jsonl, .json, .csv, .tsv or .parquet file; see `personalize.data` for its columns.
        output: the .safetensors file to write.
        train: what may change.
        gradient: how the gradient is had.
        objective: what is minimised.
        steps: updates.
        lr: learning rate; None: that of what is trained.
        batch_size: examples of an update.
        micro_batch: examples that are in the model at once; None: all of an update. The result is the same.
        optimizer: sgd, momentum or adam.
        schedule: constant, linear or cosine.
        warmup: steps over which the learning rate rises.
        decay: weight decay.
        validation: share of the examples that are kept apart; what is best on them is written. 0: none.
        validate_every: steps between validations.
        patience: validations without a better one that end the run; None: none do.
        seqlen: most tokens of an example; None: the context, at most 512.
        score: answer or all tokens.
        template: what stands around a sentence that is to be classified.
        words: the word of each label.
        columns: names of columns in the file, by the names that are expected.
        cut: cut examples that are too long instead of refusing them.
        sampling: poisson or shuffled batches; None: what `gradient` needs.
        epsilon: the privacy budget of dp, dp-mezo and dice, for which the noise is found.
        delta: the other half of it.
        noise: sigma, instead of the one that follows from epsilon.
        seeded: draw even what should be secret by the seed; nothing is private then.
        journal: where to write the journal of a run of forward passes, from which `replay` has the delta again.
        options: further fields of what was chosen, such as `include` of bias.
        seed: of everything random.
        device: `cpu`, `cuda`, `cuda:1`; None: a GPU if there is one.
        overwrite: replace `output`.
        restart: begin anew instead of going on.
        save_seconds: between what is kept for going on.
        progress: told after every step: step, steps, loss, validation, memory_bytes.

    Raises:
        QuantkitError: see `quantkit.errors`; the model is untouched.
    """
    target = _target(output, overwrite)
    kinds = _Kinds(train=train, gradient=gradient, objective=SHORT.get(objective, objective), options=options or {})
    trainable = kinds.make("parameters")
    rate = trainable.rate if lr is None else lr
    updates = Updates(steps=steps, rate=rate, optimizer=optimizer, schedule=schedule, warmup=warmup, decay=decay)
    if gradient in PRIVATE and patience is not None:
        raise UsageError(f"--patience ends a run by examples that {gradient} should keep secret; leave it out")
    source = names.resolve(str(model)).path
    rows = read_rows(Path(data))
    with quiet():
        tokenizer = load_tokenizer(source)
    base = base_hash(source)
    loaded = packed_model.load(source, device=device)
    form = Form(
        length=_length(seqlen, context_length(loaded)),
        score=score,
        template=template,
        words=words or {},
        columns=columns or {},
        cut=cut,
    )
    learned, kept = split(examples(rows, tokenizer, form, data), validation, seed)
    asked = Setting(
        gradient=gradient,
        options=kinds.given("gradients"),
        examples=len(learned),
        seed=seed,
        batch_size=batch_size,
        steps=steps,
        sampling=sampling,
        epsilon=epsilon,
        delta=delta,
        noise=noise,
        seeded=seeded,
    )
    pace = Pace(
        micro_batch=micro_batch or batch_size,
        every=validate_every,
        patience=patience,
        keep="last" if asked.private else "best",  # which step is best is found out from private examples
        save_seconds=save_seconds,
    )
    run = _Run(
        base=base,
        kinds=kinds,
        trainable=trainable,
        asked=asked,
        updates=updates,
        pace=pace,
        objective=_objective(kinds, form, tokenizer, learned),
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


@dataclass(frozen=True, kw_only=True)
class _Kinds:
    """What was chosen on each axis, and the fields of all of them."""

    train: str
    gradient: str
    objective: str
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        known = {f.name for axis, name in self.axes.items() for f in fields(choices.find(axis, name)) if f.init}
        for name in self.options:
            if name not in known:
                chosen = ", ".join(self.axes.values())
                raise UsageError(f"none of {chosen} has an option {name!r}; they have {', '.join(sorted(known))}")

    @property
    def axes(self) -> dict[str, str]:
        """The chosen name of each axis."""
        return {"parameters": self.train, "gradients": self.gradient, "objectives": self.objective}

    def given(self, axis: str) -> dict[str, Any]:
        """Return the options that are fields of the choice of an axis."""
        own = {f.name for f in fields(choices.find(axis, self.axes[axis])) if f.init}
        return {name: value for name, value in self.options.items() if name in own}

    def make(self, axis: str, **more: Any) -> Any:  # noqa: ANN401
        """Return the choice of an axis."""
        return choices.build(axis, self.axes[axis], {**more, **self.given(axis)})

    def told(self) -> dict[str, Any]:
        """Return what a report says of them."""
        options = {name: getattr(value, "__name__", value) for name, value in self.options.items()}
        return {"train": self.train, "gradient": self.gradient, "objective": self.objective, "options": options}


@dataclass(frozen=True, kw_only=True)
class _Run:
    base: str
    kinds: _Kinds
    trainable: Any
    objective: Any
    asked: Setting
    updates: Updates
    pace: Pace
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
        self._refuse_misfits(begun.estimator, journal)
        parameters = self.trainable.attach(model)
        for parameter in parameters.values():
            parameter.requires_grad_(begun.estimator.needs_gradients)
        before, first = frozen_hash(model, parameters), {n: p.detach().clone() for n, p in parameters.items()}
        loop = Loop(
            *(model, parameters, self.objective, begun),
            train=self.train,
            validation=self.kept,
            updates=self.updates,
            pace=self.pace,
            device=model.device,
        )
        tensors = loop.run(State(state, self._identity()), progress)
        if frozen_hash(model, parameters) != before:
            raise RuntimeError("a tensor that must not change did; nothing was written")  # a bug
        facts = self._facts(loop)
        Delta(
            base=self.base,
            trainable=self.kinds.train,
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
        chosen = {**self.kinds.told(), "base": self.base}
        rest = {"asked": asdict(self.asked), "updates": asdict(self.updates), "form": asdict(self.form)}
        pace = {"every": self.pace.every, "patience": self.pace.patience, "micro_batch": self.pace.micro_batch}
        data = hashlib.sha256(repr((self.train, self.kept)).encode()).hexdigest()
        return {**chosen, **rest, **pace, "data": data}

    def _facts(self, loop: Loop) -> dict[str, Any]:
        """Return what may be known to everybody who gets the delta: of a private run, not how large batches were."""
        return {
            **({} if self.asked.private else {"forwards": loop.progress.forwards}),
            **self.kinds.told(),
            "base": self.base,
            "parameters": sum(parameter.numel() for parameter in loop.parameters.values()),
            "updates": asdict(self.updates),
            "batch_size": self.asked.batch_size,
            "seed": self.asked.seed,
            "steps": loop.progress.step,
            "best_step": loop.progress.best_step if loop.keeps_best else loop.progress.step,
            "stopped": loop.progress.stopped,
        }

    def _journal(self, estimator: Any, first: Mapping[str, Tensor], last: Mapping[str, Tensor], loop: Loop) -> Any:  # noqa: ANN401
        steps = loop.progress.best_step if loop.keeps_best else loop.progress.step
        training = {"trainable": self.kinds.train, "options": self.kinds.given("parameters")}
        return written(
            *(estimator, self.updates, first, last),
            base=self.base,
            steps=steps,
            private_data=not self.asked.private or self.asked.seeded,
            training=training,
        )

    def _refuse_misfits(self, estimator: Any, journal: Path | None) -> None:  # noqa: ANN401
        if estimator.needs_gradients and not self.objective.differentiable:
            raise UsageError(f"{self.kinds.objective} has no gradient; use --gradient mezo, which needs none")
        if self.kinds.gradient in ("dp", "dice") and not self.trainable.per_example:
            raise UsageError(
                f"{self.kinds.gradient} needs gradients of single examples, which {self.kinds.train} does not have; "
                "train bias or norm"
            )
        if journal is not None and estimator.needs_gradients:
            raise UsageError(f"{self.kinds.gradient} has no journal; leave out --journal, or use --gradient mezo")


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


def _objective(kinds: _Kinds, form: Form, tokenizer: Any, items: list[Example]) -> Any:  # noqa: ANN401
    """Return what is minimised, which may have to know the words of labels and how to read tokens."""
    more: dict[str, Any] = {}
    labelled = items[0].label is not None
    if kinds.objective == "classification" and not labelled:
        raise DataError("classification needs the columns sentence and label; rename them, or --column label=NAME")
    if kinds.objective in ("classification", "metric") and labelled:
        more["words"] = tuple(word_tokens(form, tokenizer).values())
    objective = kinds.make("objectives", **more)
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


def _length(asked: int | None, context: int | None) -> int:
    if asked is not None and context and asked > context:
        raise UsageError(f"--seqlen {asked} is longer than the model's context; pass --seqlen {context}")
    return asked or min(LONGEST, context or LONGEST)
