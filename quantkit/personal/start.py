"""What a run begins with: how batches are drawn, how gradients are had, and what is counted of privacy."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from quantkit.errors import UsageError
from quantkit.personal import chance, choices
from quantkit.personal.accounting import Ledger
from quantkit.personal.privacy import Budget, sentence
from quantkit.personal.protocols import Estimator
from quantkit.personal.sampling import Poisson, Sampler, Shuffled

SAMPLINGS: dict[str, type[Poisson] | type[Shuffled]] = {"poisson": Poisson, "shuffled": Shuffled}
PRIVATE = ("dp", "dp-mezo", "dice")  # gradients whose noise makes a promise
COUNTED = {"noise": "--noise", "expected": "--batch-size", "participations": "--steps", "key": "--seed"}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What was asked for.

    Attributes:
        gradient: how it is had.
        options: fields of it.
        examples: to train on.
        batch_size: of an update, on average.
        steps: updates.
        seed: of what need not be secret.
        sampling: poisson or shuffled; None: poisson where a promise needs it, otherwise shuffled.
        epsilon: the most that may be given away.
        delta: at which epsilon is meant.
        noise: sigma, instead of what follows from epsilon.
        seeded: draw even noise and private batches by the seed, for tests; nothing is promised then.
    """

    gradient: str
    options: Mapping[str, Any]
    examples: int
    batch_size: int
    steps: int
    seed: int
    sampling: str | None = None
    epsilon: float | None = None
    delta: float | None = None
    noise: float | None = None
    seeded: bool = False

    def __post_init__(self) -> None:
        if self.sampling is not None and self.sampling not in SAMPLINGS:
            raise UsageError(f"unknown sampling {self.sampling!r}; it is {' or '.join(SAMPLINGS)}")
        asked = [n for n in ("epsilon", "delta", "noise") if getattr(self, n) is not None]
        if asked and not self.private:
            raise UsageError(
                f"--{asked[0]} is a promise that {self.gradient} cannot keep; use --gradient {' or '.join(PRIVATE)}"
            )

    @property
    def private(self) -> bool:
        """Whether the gradients keep a promise."""
        return self.gradient in PRIVATE


@dataclass(frozen=True, kw_only=True)
class Start:
    """The parts.

    Attributes:
        estimator: of gradients.
        sampler: of batches.
        allows: says whether one more step is within the budget, and takes it down.
        private: whether the result must not tell of single examples.
        account: what the result says of privacy, None if nothing is promised.
        sentence: the same in a line.
    """

    estimator: Estimator
    sampler: Sampler
    private: bool = True
    allows: Callable[[], bool] = lambda: True
    account: Callable[[], dict[str, Any] | None] = lambda: None

    @property
    def sentence(self) -> str:
        """The account in a line."""
        account = self.account()
        return "none: the result tells of the examples" if account is None else sentence(account)


def start(setting: Setting) -> Start:
    """Return the parts of a run.

    Raises:
        UsageError: they do not fit together, or no noise keeps the promise.
    """
    secret = setting.private and not setting.seeded
    key = chance.secret_key() if secret else chance.fixed_key(setting.seed)
    usual = "poisson" if setting.private and setting.gradient != "dice" else "shuffled"
    size = setting.batch_size
    sampler = SAMPLINGS[setting.sampling or usual](examples=setting.examples, batch_size=size, key=key)
    if not setting.private:
        return Start(estimator=_make(setting, seed=setting.seed), sampler=sampler, private=False)
    given = {n: v for n in ("epsilon", "delta", "noise") if (v := getattr(setting, n)) is not None}
    budget = Budget(**given, seeded=setting.seeded)
    known = {"seed": setting.seed, "expected": float(size), "key": key}
    if setting.gradient == "dice":
        noise, participations = budget.begin_dice(sampler, setting.steps)
        estimator = _make(setting, **known, noise=noise, participations=participations)
        return Start(
            estimator=estimator, sampler=sampler, account=lambda: budget.account_dice(noise, _clipping(estimator))
        )
    noise, ledger = budget.begin(sampler, setting.steps)
    estimator = _make(setting, **known, noise=noise)
    return Start(
        estimator=estimator,
        sampler=sampler,
        allows=lambda: _record(ledger, setting.batch_size / setting.examples, noise),
        account=lambda: budget.account(ledger, _clipping(estimator)),
    )


def _make(setting: Setting, **known: Any) -> Any:  # noqa: ANN401  an Estimator
    """Return the estimator with what was given and what it has to know of the run.

    Raises:
        UsageError: an option that would be another value than the one that privacy is counted with.
    """
    for name in COUNTED.keys() & setting.options.keys() if setting.private else ():
        raise UsageError(f"{name} of {setting.gradient} is what privacy is counted with; use {COUNTED[name]} instead")
    own = {field.name for field in fields(choices.find("gradients", setting.gradient)) if field.init}
    known = {name: value for name, value in known.items() if name in own}
    return choices.build("gradients", setting.gradient, {**known, **setting.options})


def _record(ledger: Ledger, rate: float, noise: float) -> bool:
    if not ledger.allows(rate, noise):
        return False
    ledger.record(rate, noise)
    return True


def _clipping(estimator: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return what the account says of how examples were clipped."""
    hidden = ("key", "noise", "seed")
    return {f.name: getattr(estimator, f.name) for f in fields(estimator) if f.init and f.name not in hidden}
