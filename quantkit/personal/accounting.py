"""What a private training has given away: epsilon at a delta, the noise that a budget asks for, and a ledger.

Every step draws each example with probability q, adds up their clipped gradients, at most R each, and adds noise of
standard deviation sigma R. What n such steps give away is counted by two accountants of `dp-accounting`: by Rényi
divergences (RDP, which also holds where q and sigma are chosen on the way), and by the distribution of the privacy loss
(PLD, tighter, for steps that were fixed before). Two data sets are neighbours if one has an example more.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal

from quantkit.errors import UsageError

Accountant = Literal["rdp", "pld"]
NEIGHBOURS = "one example more or less"
LEAST_NOISE, MOST_NOISE = 0.1, 1000.0  # multipliers that are looked at
FINE, COARSE = 1e-4, 1e-3  # spacing of privacy losses in the end and while noise is searched; both give upper bounds


@dataclass(frozen=True, kw_only=True)
class Release:
    """Some steps that are alike: each a Poisson-sampled sum with Gaussian noise.

    Attributes:
        rate: q, the probability that an example takes part.
        noise: sigma, the standard deviation of the noise divided by the clipping bound.
        steps: how many.
    """

    rate: float
    noise: float
    steps: int = 1


def epsilon(
    releases: Sequence[Release], delta: float, accountant: Accountant = "pld", *, spacing: float = FINE
) -> float:
    """Return an upper bound of epsilon of all releases together; infinite where one has no noise.

    Raises:
        UsageError: the package dp-accounting is not there, or delta is not between 0 and 1.
    """
    library = _library()
    check_delta(delta)
    taken = [release for release in releases if release.steps and release.rate]
    if not taken:
        return 0.0
    if any(release.noise == 0 for release in taken):
        return math.inf
    counted = library.rdp.RdpAccountant() if accountant == "rdp" else _pld(library, spacing)
    with _quiet():
        for release in taken:
            gaussian = library.GaussianDpEvent(release.noise)
            counted.compose(library.PoissonSampledDpEvent(release.rate, gaussian), release.steps)
        return float(counted.get_epsilon(delta))


def noise_for(target: float, delta: float, *, rate: float, steps: int) -> float:
    """Return the least noise, to one part in a thousand, with which `steps` steps stay within epsilon = `target`.

    Raises:
        UsageError: no noise up to a thousand times the bound is enough, or dp-accounting is not there.
    """
    check_target(target)

    def spent(noise: float, accountant: Accountant) -> float:
        release = Release(rate=rate, noise=noise, steps=steps)
        return epsilon([release], delta, accountant, spacing=_spacing(target))

    least = spent(MOST_NOISE, "rdp")
    if least > target:
        raise UsageError(
            f"epsilon {target:g} at delta {delta:g} is out of reach: {steps} steps that draw {rate:.1%} of the "
            f"examples give away {least:.2g} even with noise {MOST_NOISE:g} times the clipping bound; ask for a larger "
            "epsilon, or give more examples, smaller batches or fewer steps"
        )
    if spent(LEAST_NOISE, "rdp") <= target:
        return LEAST_NOISE
    above = _bisected(LEAST_NOISE, MOST_NOISE, lambda noise: spent(noise, "rdp") <= target, step=1.02)
    near = 0.9 * above  # where the answer nearly always is not below
    low, high = (above / 2, near) if spent(near, "pld") <= target else (near, above)
    return _bisected(low, high, lambda noise: spent(noise, "pld") <= target)


def gaussian_epsilon(noise: float, delta: float) -> float:
    """Return epsilon of one Gaussian mechanism whose noise is `noise` times its sensitivity, exactly."""
    check_delta(delta)
    return float(_library().get_epsilon_gaussian(noise, delta)) if noise else math.inf


def gaussian_noise_for(target: float, delta: float) -> float:
    """Return the noise, in sensitivities, with which one Gaussian mechanism has epsilon = `target`, exactly."""
    check_target(target)
    check_delta(delta)
    return float(_library().get_sigma_gaussian(target, delta))


def check_target(target: float) -> None:
    """Refuse an epsilon that is not a finite number above 0."""
    if not 0 < target < math.inf:
        raise UsageError(f"epsilon is {target:g}; use a finite number above 0, such as 3")


def check_delta(delta: float, examples: int | None = None) -> None:
    """Refuse a delta that is no probability, or with which giving away one of `examples` whole would be allowed."""
    if not 0 < delta < 1:
        raise UsageError(f"delta is {delta:g}; use a number between 0 and 1, such as 1e-5")
    if examples and delta * examples >= 1:
        raise UsageError(
            f"delta {delta:g} lets one of {examples} examples be published as it is; use less than {1 / examples:.1g}"
        )


@dataclass(kw_only=True)
class Ledger:
    """What a run has released so far, and whether it may go on.

    Attributes:
        delta: at which epsilon is counted.
        budget: epsilon that is never exceeded; None: no limit, epsilon is only counted.
        adaptive: rates and noises are chosen from what was released before; only RDP adds those up.
        releases: what was recorded, in order, equal ones together.
    """

    delta: float
    budget: float | None = None
    adaptive: bool = False
    releases: list[Release] = field(default_factory=list)
    _safe: int = 0  # so many steps as the last one, from the beginning, are known to be within the budget

    def __post_init__(self) -> None:
        check_delta(self.delta)
        if self.budget is not None:
            check_target(self.budget)

    @property
    def steps(self) -> int:
        """How many steps were recorded."""
        return sum(release.steps for release in self.releases)

    def allows(self, rate: float, noise: float) -> bool:
        """Say whether one more such step stays within the budget; nothing is recorded."""
        if self.budget is None:
            return True
        if self.adaptive or len(self._with(rate, noise)) > 1:
            return epsilon(self._with(rate, noise), self.delta, "rdp") <= self.budget
        if self.steps + 1 > self._safe:
            self._safe = self._safe_steps(rate, noise)
        return self.steps + 1 <= self._safe

    def expect(self, rate: float, noise: float, steps: int) -> None:
        """Look once whether so many such steps are within the budget, so that each of them is not looked at."""
        if not self.releases and self._within(Release(rate=rate, noise=noise, steps=steps)):
            self._safe = steps

    def record(self, rate: float, noise: float) -> None:
        """Take down one step.

        Raises:
            UsageError: it would exceed the budget; nothing was recorded.
        """
        if not self.allows(rate, noise):
            raise UsageError(
                f"the privacy budget of epsilon {self.budget:g} is spent after {self.steps} steps; stop here"
            )
        self.releases = self._with(rate, noise)

    def epsilon(self, accountant: Accountant = "pld") -> float:
        """Return what was given away so far, counted by one accountant."""
        return epsilon(self.releases, self.delta, accountant)

    def summary(self) -> dict[str, Any]:
        """Return what is to be known of a run's privacy, fit for JSON."""
        return {
            "sampling": "poisson",
            "neighbours": NEIGHBOURS,
            "delta": self.delta,
            "epsilon_rdp": finite(self.epsilon("rdp")),
            "epsilon_pld": None if self.adaptive else finite(self.epsilon("pld")),
            "budget": self.budget,
            "steps": self.steps,
            "releases": [asdict(release) for release in self.releases],
        }

    def _with(self, rate: float, noise: float) -> list[Release]:
        last = self.releases[-1] if self.releases else None
        if last and (last.rate, last.noise) == (rate, noise):
            return [*self.releases[:-1], Release(rate=rate, noise=noise, steps=last.steps + 1)]
        return [*self.releases, Release(rate=rate, noise=noise)]

    def _within(self, release: Release) -> bool:
        budget = self.budget or math.inf
        quickly = epsilon([release], self.delta, "rdp")  # above PLD, and never several times as much
        if quickly <= budget or quickly > 4 * budget:
            return quickly <= budget
        return epsilon([release], self.delta, spacing=_spacing(budget)) <= budget

    def _safe_steps(self, rate: float, noise: float) -> int:
        """Return a number of steps that is within the budget: twice as many as before, or the most there can be."""
        low, high = self._safe, max(64, 2 * self._safe)
        if self._within(Release(rate=rate, noise=noise, steps=high)):
            return high
        while high - low > 1:
            middle = (low + high) // 2
            fits = self._within(Release(rate=rate, noise=noise, steps=middle))
            low, high = (middle, high) if fits else (low, middle)
        return low


def finite(value: float) -> float | None:
    """Return a number that JSON has: None instead of infinity."""
    return value if math.isfinite(value) else None


def _bisected(low: float, high: float, enough: Callable[[float], bool], step: float = 1.001) -> float:
    """Return a noise that is enough, at most `step` times one that is not; `high` is enough."""
    while high > low * step:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library from telling of every order that it leaves out; the least of the others is a bound as well."""
    log = logging.getLogger("absl")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _spacing(target: float) -> float:
    return min(COARSE, max(FINE, target / 1000))


def _pld(library: ModuleType, spacing: float) -> Any:  # noqa: ANN401
    return library.pld.PLDAccountant(value_discretization_interval=spacing)


def _library() -> ModuleType:
    if find_spec("dp_accounting") is None:
        raise UsageError("counting privacy needs the package dp-accounting; pip install 'quantkit[dp]'")
    import dp_accounting

    return dp_accounting  # type: ignore[no-any-return]
