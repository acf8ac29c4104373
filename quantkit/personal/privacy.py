"""What a private run promises, before its first step and after its last.

The noise follows from the budget, the ledger stops what would exceed it, and the account says in the result what was
given away: sampling, q, sigma, steps, delta, epsilon by both accountants, clipping. Only what the ledger counts is
private: losses, a choice of the best step by private examples, and the secret key of the sampler are not, and are left
out of the result.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.errors import UsageError
from quantkit.personal.accounting import (
    Ledger,
    check_delta,
    check_target,
    finite,
    gaussian_epsilon,
    gaussian_noise_for,
    noise_for,
)
from quantkit.personal.sampling import Poisson, Sampler, Shuffled

SEEDED = "the noise has a fixed seed, so it can be computed and taken away"
NOISELESS = "no noise was added"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What may be given away.

    Attributes:
        epsilon: never exceeded; None: counted only.
        noise: sigma, instead of the one that follows from epsilon.
        delta: at which epsilon is meant, less than one in the number of examples.
        seeded: whether the noise comes from a fixed seed; then nothing is promised.
    """

    epsilon: float | None = None
    noise: float | None = None
    delta: float = 1e-5
    seeded: bool = False

    def __post_init__(self) -> None:
        if self.epsilon is None and self.noise is None:
            raise UsageError("a private run needs a budget or a noise; give --epsilon 3, or --noise 1")
        if self.epsilon is not None:
            check_target(self.epsilon)
        check_delta(self.delta)

    def begin(self, sampler: Sampler, steps: int) -> tuple[float, Ledger]:
        """Return the noise of every step, and the ledger that is to record them.

        Raises:
            UsageError: batches that are not Poisson samples, a delta too large for the examples, an epsilon that no
                noise reaches, or dp-accounting is not there.
        """
        if not isinstance(sampler, Poisson):
            raise UsageError(
                f"epsilon is proved for Poisson sampling, not for {sampler.kind} batches; use --sampling poisson"
            )
        check_delta(self.delta, sampler.examples)
        noise = self.noise
        if noise is None:
            assert self.epsilon is not None
            noise = noise_for(self.epsilon, self.delta, rate=sampler.rate, steps=steps)
        ledger = Ledger(delta=self.delta, budget=self.epsilon)
        ledger.expect(sampler.rate, noise, steps)
        if not ledger.allows(sampler.rate, noise):
            raise UsageError(
                f"one step with noise {noise:g} gives away more than epsilon {self.epsilon:g}; use more noise"
            )
        return noise, ledger

    def begin_dice(self, sampler: Sampler, steps: int) -> tuple[float, int]:
        """Return the noise of DiceSGD in units of its sensitivity, and in how many steps an example is at most.

        Raises:
            UsageError: batches in which an example may be any number of times, or a delta too large for the examples.
        """
        if not isinstance(sampler, Shuffled):
            raise UsageError("dice must know how often an example takes part; use --sampling shuffled")
        check_delta(self.delta, sampler.examples)
        noise = self.noise
        if noise is None:
            assert self.epsilon is not None
            noise = gaussian_noise_for(self.epsilon, self.delta)
        return noise, -(-steps // sampler.steps_per_epoch)

    def account(self, ledger: Ledger, clipping: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the result says of privacy, fit for JSON; `clipping`: how examples were clipped."""
        noiseless = any(release.noise == 0 for release in ledger.releases)
        reason = SEEDED if self.seeded else NOISELESS if noiseless else ""
        return {"private": not reason, "reason": reason, **ledger.summary(), "clipping": dict(clipping)}

    def account_dice(self, noise: float, clipping: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the result of DiceSGD says of privacy, fit for JSON."""
        reason = SEEDED if self.seeded else "" if noise else NOISELESS
        return {
            "private": not reason,
            "reason": reason,
            "experimental": "the bound was derived for quantkit and has not been reviewed",
            "sampling": "none claimed",
            "neighbours": "what one example adds to the gradients left out",
            "delta": self.delta,
            "epsilon_gaussian": finite(gaussian_epsilon(noise, self.delta)),
            "noise": noise,
            "clipping": dict(clipping),
        }


def sentence(account: Mapping[str, Any]) -> str:
    """Return an account in one line."""
    if not account["private"]:
        return f"not private: {account['reason']}"
    if "experimental" in account:
        loss = f"{account['epsilon_gaussian']:.3g} at delta {account['delta']:g}"
        return f"epsilon {loss}, experimental: {account['experimental']}"
    kinds = account["releases"]
    noise = " and ".join(f"{kind['noise']:.4g}" for kind in kinds[:3]) + (" …" if len(kinds) > 3 else "")
    rate = kinds[0]["rate"] if kinds else 0
    loss = f"{account['epsilon_rdp']:.3g} by RDP"
    if account["epsilon_pld"] is not None:
        loss = f"{account['epsilon_pld']:.3g} (PLD; {loss})"
    return (
        f"epsilon {loss} at delta {account['delta']:g}: {account['steps']} steps, each example in one with probability "
        f"{rate:.3g}, noise {noise or 0} times the clipping bound"
    )
