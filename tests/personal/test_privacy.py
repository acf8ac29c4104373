"""What a private run promises, and what its result says."""

import json

import pytest

from quantkit.errors import UsageError
from quantkit.personal.accounting import Release, epsilon
from quantkit.personal.chance import fixed_key
from quantkit.personal.privacy import Budget, sentence
from quantkit.personal.sampling import Poisson, Shuffled

POISSON = Poisson(examples=1000, batch_size=50, key=fixed_key(0))
SHUFFLED = Shuffled(examples=1000, batch_size=50, key=fixed_key(0))


def ran(budget, steps):
    noise, ledger = budget.begin(POISSON, steps)
    for _ in range(steps):
        ledger.record(POISSON.rate, noise)
    return noise, ledger


def test_the_noise_follows_from_the_budget_and_the_account_says_so():
    budget = Budget(epsilon=3, delta=1e-5)
    noise, ledger = ran(budget, 40)
    account = json.loads(json.dumps(budget.account(ledger, {"function": "auto-s", "bound": 1.0})))
    assert account["private"]
    assert 2.9 < account["epsilon_pld"] <= 3
    assert account["epsilon_rdp"] == pytest.approx(epsilon([Release(rate=0.05, noise=noise, steps=40)], 1e-5, "rdp"))
    assert (account["sampling"], account["steps"], account["delta"]) == ("poisson", 40, 1e-5)
    assert account["releases"] == [{"rate": 0.05, "noise": noise, "steps": 40}]
    assert account["clipping"] == {"function": "auto-s", "bound": 1.0}
    said = sentence(account)
    assert said.startswith("epsilon 3 (PLD; 3.")
    assert f"40 steps, each example in one with probability 0.05, noise {noise:.4g} times" in said
    while ledger.allows(POISSON.rate, noise):
        ledger.record(POISSON.rate, noise)
    assert ledger.steps < 45
    with pytest.raises(UsageError, match=f"the privacy budget of epsilon 3 is spent after {ledger.steps} steps"):
        ledger.record(POISSON.rate, noise)


def test_a_seed_or_no_noise_is_no_privacy():
    seeded = Budget(noise=1.0, seeded=True)
    account = seeded.account(ran(seeded, 1)[1], {})
    assert not account["private"]
    assert sentence(account) == "not private: the noise has a fixed seed, so it can be computed and taken away"
    bare = Budget(noise=0.0)
    assert sentence(bare.account(ran(bare, 1)[1], {})) == "not private: no noise was added"
    assert sentence(bare.account_dice(0.0, {})) == "not private: no noise was added"


def test_dice_has_an_account_of_its_own_without_amplification():
    budget = Budget(epsilon=3)
    noise, participations = budget.begin_dice(SHUFFLED, 41)
    assert participations == 3
    account = json.loads(json.dumps(budget.account_dice(noise, {"inner": 1.0})))
    assert account["epsilon_gaussian"] == pytest.approx(3)
    assert account["sampling"] == "none claimed"
    assert "experimental: the bound was derived for quantkit and has not been reviewed" in sentence(account)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: Budget(), "a private run needs a budget or a noise; give --epsilon 3, or --noise 1"),
        (lambda: Budget(epsilon=-3), "epsilon is -3"),
        (
            lambda: Budget(epsilon=3).begin(SHUFFLED, 9),
            "proved for Poisson sampling, not for shuffled batches; use --sampling poisson",
        ),
        (lambda: Budget(epsilon=3).begin_dice(POISSON, 9), "use --sampling shuffled"),
        (lambda: Budget(epsilon=3, delta=0.01).begin(POISSON, 9), "lets one of 1000 examples be published as it is"),
        (lambda: Budget(epsilon=3, delta=0.01).begin_dice(SHUFFLED, 9), "lets one of 1000 examples be published"),
        (
            lambda: Budget(epsilon=0.1, noise=0.5).begin(POISSON, 9),
            "one step with noise 0.5 gives away more than epsilon 0.1",
        ),
        (lambda: Budget(epsilon=1e-4, delta=1e-9).begin(POISSON, 9), "epsilon 0.0001 at delta 1e-09 is out of reach"),
    ],
)
def test_what_cannot_be_promised_is_refused(run, message):
    with pytest.raises(UsageError, match=message):
        run()
