"""`personalize`: a packed model learns from somebody's examples, and what it learned is a small file."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from quantkit.ambient import usual_settings
from quantkit.calibrate.data import load_tokenizer
from quantkit.errors import OutputError, UsageError
from quantkit.evaluation.loading import context_length, quiet
from quantkit.model import names
from quantkit.personalize import choices
from quantkit.personalize.chance import fixed_key
from quantkit.personalize.data import Example, Form, examples, read_rows, split
from quantkit.personalize.delta import SUFFIX, Delta, base_hash, frozen_hash
from quantkit.personalize.loop import Loop, Pace, State, peak
from quantkit.personalize.sampling import Shuffled
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
    epsilon: float | None = None,
    delta: float | None = None,
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
        epsilon: the privacy budget of dp, which finds the noise for it.
        delta: the other half of it.
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
    if gradient != "dp" and (epsilon, delta) != (None, None):
        raise UsageError("--epsilon and --delta are for --gradient dp; leave them out")
    rate = trainable.rate if lr is None else lr
    updates = Updates(steps=steps, rate=rate, optimizer=optimizer, schedule=schedule, warmup=warmup, decay=decay)
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
    run = _Run(
        identity={**kinds.told(), **asdict(updates), **asdict(form), "base": base, "seed": seed, "batch": batch_size},
        base=base,
        kinds=kinds,
        updates=updates,
        pace=Pace(
            micro_batch=micro_batch or batch_size, every=validate_every, patience=patience, save_seconds=save_seconds
        ),
        train=learned,
        validation=kept,
        batch_size=batch_size,
        seed=seed,
    )
    return run.go(loaded, trainable, target, restart=restart, progress=progress or (lambda _: None))


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
        return {"train": self.train, "gradient": self.gradient, "objective": self.objective, "options": self.options}


@dataclass(frozen=True, kw_only=True)
class _Run:
    identity: Mapping[str, Any]
    base: str
    kinds: _Kinds
    updates: Updates
    pace: Pace
    train: list[Example]
    validation: list[Example]
    batch_size: int
    seed: int

    def go(self, model: Any, trainable: Any, target: Path, *, restart: bool, progress: Told) -> Personalized:  # noqa: ANN401
        began = time.monotonic()
        parameters = trainable.attach(model)
        estimator = self.kinds.make("gradients")
        objective = self.kinds.make("objectives")
        self._refuse_misfits(trainable, estimator, objective)
        before = frozen_hash(model, parameters)
        sampler = Shuffled(examples=len(self.train), batch_size=self.batch_size, key=fixed_key(self.seed))
        loop = Loop(
            model,
            parameters,
            objective,
            estimator,
            sampler,
            train=self.train,
            validation=self.validation,
            updates=self.updates,
            pace=self.pace,
            device=model.device,
        )
        for parameter in parameters.values():
            parameter.requires_grad_(estimator.needs_gradients)
        state = target.with_name(f".{target.name}.state")
        if restart:
            state.unlink(missing_ok=True)
        tensors = loop.run(State(state, self.identity), progress)
        _refuse_changed(before, model, parameters)
        report = self._report(loop, model, time.monotonic() - began)
        kept = {name: value for name, value in report.items() if name not in ("seconds", "peak_memory_bytes")}
        delta = Delta(
            base=self.base,
            trainable=self.kinds.train,
            options=asdict(trainable),
            tensors=tensors,
            report=kept,
        )
        delta.save(target)
        state.unlink(missing_ok=True)
        return Personalized(output=target, report={**report, "bytes": target.stat().st_size})

    def _report(self, loop: Loop, model: Any, seconds: float) -> dict[str, Any]:  # noqa: ANN401
        progress = loop.progress
        return {
            **self.kinds.told(),
            "base": self.base,
            "parameters": sum(parameter.numel() for parameter in loop.parameters.values()),
            "examples": len(self.train),
            "validation_examples": len(self.validation),
            "updates": asdict(self.updates),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "steps": progress.step,
            "forwards": progress.forwards,
            "loss": progress.losses[-1] if progress.losses else None,
            "losses": progress.losses,
            "validations": progress.validations,
            "best_step": progress.best_step,
            "stopped": progress.stopped,
            "seconds": max(seconds, progress.seconds),
            "peak_memory_bytes": peak(model.device),
        }

    def _refuse_misfits(self, trainable: Any, estimator: Any, objective: Any) -> None:  # noqa: ANN401
        if estimator.needs_gradients and not objective.differentiable:
            raise UsageError(f"{self.kinds.objective} has no gradient; use --gradient mezo, which needs none")
        if getattr(estimator, "per_example", False) and not trainable.per_example:
            raise UsageError(
                f"{self.kinds.gradient} needs gradients of single examples, which {self.kinds.train} does not have; "
                "train bias"
            )


def _refuse_changed(before: str, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    if frozen_hash(model, parameters) != before:
        raise RuntimeError("a tensor that must not change did; nothing was written")  # a bug


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
