"""All that decides what a personalization comes to, as somebody asked for it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from quantkit.errors import UsageError
from quantkit.personal import choices
from quantkit.personal.data import Form
from quantkit.personal.loop import Pace
from quantkit.personal.start import PRIVATE, Setting
from quantkit.personal.updates import Updates

LONGEST = 512  # tokens of an example, unless asked for more
SHORT = {"lm": "language-model"}  # names that are easier to type


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What somebody wants.

    Attributes:
        train: what may change: bias, norm, scales, soft-prompt or lora.
        gradient: how the gradient is had: backprop, dp, dice, mezo, subspace-zo or dp-mezo.
        objective: what is minimised: language-model (lm), classification or metric.
        options: further fields of these, such as `include` of bias or `score` of metric.
        steps: updates.
        lr: learning rate; None: found from the loss for `sgd` by forward passes, else that of what is trained.
        batch_size: examples of an update.
        micro_batch: examples that are in the model at once; None: all of an update. The result is the same.
        optimizer: sgd, momentum or adam; None: sgd for mezo and subspace-zo, adam for others.
        schedule: of the learning rate: constant, linear or cosine.
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
        sampling: poisson or shuffled batches; None: what the gradient needs.
        epsilon: the privacy budget of dp, dp-mezo and dice, for which the noise is found.
        delta: the other half of it.
        noise: sigma, instead of the one that follows from epsilon.
        seeded: draw even what should be secret by the seed; nothing is private then.
        seed: of everything else that is random.
        save_seconds: between states that are kept for going on after an interruption.
    """

    train: str = "bias"
    gradient: str = "backprop"
    objective: str = "language-model"
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 500
    lr: float | None = None
    batch_size: int = 8
    micro_batch: int | None = None
    optimizer: str | None = None
    schedule: str = "constant"
    warmup: int = 0
    decay: float = 0.0
    validation: float = 0.1
    validate_every: int = 50
    patience: int | None = None
    seqlen: int | None = None
    score: str = "answer"
    template: str = "{sentence}"
    words: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    cut: bool = False
    sampling: str | None = None
    epsilon: float | None = None
    delta: float | None = None
    noise: float | None = None
    seeded: bool = False
    seed: int = 0
    save_seconds: float = 20.0

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("validate_every", 1), ("micro_batch", 1), ("patience", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} must be at least {least}, not {value}")
        known = {name for axis in self.axes for name in self._fields(axis)}
        for name in self.options:
            if name not in known:
                chosen = ", ".join(self.axes.values())
                raise UsageError(f"none of {chosen} has an option {name!r}; they have {', '.join(sorted(known))}")

    @property
    def axes(self) -> dict[str, str]:
        """The chosen name of each axis."""
        objective = SHORT.get(self.objective, self.objective)
        return {"parameters": self.train, "gradients": self.gradient, "objectives": objective}

    def given(self, axis: str) -> dict[str, Any]:
        """Return the options that are fields of the choice of an axis."""
        own = self._fields(axis)
        return {name: value for name, value in self.options.items() if name in own}

    def make(self, axis: str, **more: Any) -> Any:  # noqa: ANN401
        """Return the choice of an axis, with what else is known."""
        return choices.build(axis, self.axes[axis], {**more, **self.given(axis)})

    def told(self) -> dict[str, Any]:
        """Return what a report says of the choices."""
        options = {name: getattr(value, "__name__", value) for name, value in self.options.items()}
        return {
            "train": self.train,
            "gradient": self.gradient,
            "objective": self.axes["objectives"],
            "options": options,
        }

    def updates(self) -> Updates:
        """Return what is done with gradients.

        Adam makes steps of one size whatever the gradient is, which with estimates that are nearly all noise leads
        astray. Plain descent has to know how curved the loss is, and a metric has no curvature.
        """
        kinds = {axis: choices.find(axis, name) for axis, name in self.axes.items()}
        smooth = kinds["objectives"].differentiable
        plain = self.gradient not in PRIVATE and not kinds["gradients"].needs_gradients and smooth
        optimizer = self.optimizer or ("sgd" if plain else "adam")
        usual = None if plain and optimizer == "sgd" else kinds["parameters"].rate
        return Updates(
            steps=self.steps,
            rate=usual if self.lr is None else self.lr,
            optimizer=optimizer,
            schedule=self.schedule,
            warmup=self.warmup,
            decay=self.decay,
        )

    def form(self, context: int | None) -> Form:
        """Return how rows become examples of a model that sees `context` tokens.

        Raises:
            UsageError: longer ones are wanted.
        """
        if self.seqlen is not None and context and self.seqlen > context:
            raise UsageError(f"--seqlen {self.seqlen} is longer than the model's context; pass --seqlen {context}")
        return Form(
            length=min(LONGEST, context or LONGEST) if self.seqlen is None else self.seqlen,
            score=self.score,
            template=self.template,
            words=self.words,
            columns=self.columns,
            cut=self.cut,
        )

    def setting(self, examples: int) -> Setting:
        """Return what a run on so many examples begins with."""
        own = [f.name for f in fields(Setting) if f.name not in ("options", "examples")]
        known = {name: getattr(self, name) for name in own}
        return Setting(**known, options=self.given("gradients"), examples=examples)

    def pace(self) -> Pace:
        """Return how the run is divided; which step is best would be found out from private examples."""
        return Pace(
            micro_batch=self.micro_batch or self.batch_size,
            every=self.validate_every,
            patience=self.patience,
            keep="last" if self.gradient in PRIVATE else "best",
            save_seconds=self.save_seconds,
        )

    def _fields(self, axis: str) -> set[str]:
        return {each.name for each in fields(choices.find(axis, self.axes[axis])) if each.init}
