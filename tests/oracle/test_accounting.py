"""Epsilon against dp-accounting, the intervals of prv-accountant and closed forms; noise for a budget; the ledger."""

import json
import math

import dp_accounting
import pytest

from quantkit.errors import UsageError
from quantkit.personal import accounting
from quantkit.personal.accounting import (
    Ledger,
    Release,
    check_delta,
    epsilon,
    gaussian_epsilon,
    gaussian_noise_for,
    noise_for,
)

TABLE = [  # q, sigma, steps; RDP; PLD; the interval of prv-accountant 0.2
    (0.01, 1.0, 1000, 2.1014, 1.8282, (1.7782, 1.8784)),
    (0.004, 0.8, 2000, 2.2025, 1.6632, (1.6130, 1.7134)),
]


@pytest.mark.parametrize(("rate", "noise", "steps", "rdp", "pld", "interval"), TABLE)
def test_epsilon_is_that_of_the_table(rate, noise, steps, rdp, pld, interval):
    releases = [Release(rate=rate, noise=noise, steps=steps)]
    assert epsilon(releases, 1e-5, "rdp") == pytest.approx(rdp, abs=1e-3)
    assert epsilon(releases, 1e-5, "pld") == pytest.approx(pld, abs=1e-3)
    assert interval[0] <= epsilon(releases, 1e-5, "pld") <= interval[1]


@pytest.mark.parametrize(("accountant", "theirs"), [("rdp", "RdpAccountant"), ("pld", "PLDAccountant")])
def test_epsilon_is_that_of_dp_accounting(accountant, theirs):
    event = dp_accounting.PoissonSampledDpEvent(0.02, dp_accounting.GaussianDpEvent(0.9))
    counted = getattr(getattr(dp_accounting, accountant), theirs)()
    counted.compose(dp_accounting.SelfComposedDpEvent(event, 150))
    ours = epsilon([Release(rate=0.02, noise=0.9, steps=150)], 1e-6, accountant)
    assert ours == pytest.approx(counted.get_epsilon(1e-6), abs=1e-9)


def test_different_noises_add_up():
    both = [Release(rate=0.01, noise=0.8, steps=500), Release(rate=0.01, noise=1.2, steps=500)]
    assert epsilon(both, 1e-5) == pytest.approx(2.5435, abs=1e-3)


def test_one_step_with_everybody_is_the_gaussian_mechanism():
    """Balle and Wang 2018: delta = Phi(1/2s - eps s) - e^eps Phi(-1/2s - eps s)."""
    found = epsilon([Release(rate=1.0, noise=1.0)], 1e-5)
    assert found == pytest.approx(4.37718, abs=1e-4)
    assert gaussian_epsilon(1.0, 1e-5) == pytest.approx(4.37718, abs=1e-5)
    phi = lambda x: 0.5 * math.erfc(-x / math.sqrt(2))  # noqa: E731
    exact = gaussian_epsilon(1.0, 1e-5)
    assert phi(0.5 - exact) - math.exp(exact) * phi(-0.5 - exact) == pytest.approx(1e-5, rel=1e-6)
    assert gaussian_noise_for(4.37718, 1e-5) == pytest.approx(1.0, abs=1e-5)


def test_nothing_released_costs_nothing_and_no_noise_costs_everything():
    assert epsilon([], 1e-5) == 0
    assert epsilon([Release(rate=0.1, noise=1, steps=0)], 1e-5) == 0
    assert epsilon([Release(rate=0.1, noise=0)], 1e-5) == math.inf
    assert gaussian_epsilon(0, 1e-5) == math.inf


@pytest.mark.parametrize(("target", "theirs"), [(3.0, 1.0229), (8.0, 0.6802)])
def test_the_noise_of_a_published_setting(target, theirs):
    """E2E: 42 061 examples, batches of 1000, 10 epochs, delta 8e-6; opacus' PRV accountant gives these."""
    found = noise_for(target, 8e-6, rate=1000 / 42061, steps=421)
    assert found == pytest.approx(theirs, rel=0.006)
    assert epsilon([Release(rate=1000 / 42061, noise=found, steps=421)], 8e-6) <= target
    assert epsilon([Release(rate=1000 / 42061, noise=0.995 * found, steps=421)], 8e-6) > target


@pytest.mark.parametrize("target", [0.3, 1.0])
def test_noise_for_a_budget_keeps_it(target):
    found = noise_for(target, 1e-5, rate=0.05, steps=100)
    spent = epsilon([Release(rate=0.05, noise=found, steps=100)], 1e-5)
    assert 0.99 * target < spent <= target


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda: noise_for(1e-4, 1e-12, rate=1.0, steps=1000),
            r"epsilon 0\.0001 at delta 1e-12 is out of reach: 1000 steps",
        ),
        (lambda: noise_for(0, 1e-5, rate=0.1, steps=1), "epsilon is 0; use a finite number above 0, such as 3"),
        (lambda: noise_for(math.nan, 1e-5, rate=0.1, steps=1), "epsilon is nan"),
        (lambda: noise_for(1, 1.0, rate=0.1, steps=1), "delta is 1; use a number between 0 and 1, such as 1e-5"),
        (
            lambda: check_delta(0.01, 100),
            "delta 0.01 lets one of 100 examples be published as it is; use less than 0.01",
        ),
        (lambda: Ledger(delta=0), "delta is 0"),
        (lambda: Ledger(delta=1e-5, budget=-1), "epsilon is -1"),
    ],
)
def test_what_cannot_be_had_is_refused(run, message):
    with pytest.raises(UsageError, match=message):
        run()


def test_orders_that_are_left_out_are_not_told(caplog):
    with caplog.at_level("WARNING"):
        assert epsilon([Release(rate=0.05, noise=0.4, steps=3)], 1e-5, "rdp") > 1
    assert not caplog.records


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(accounting, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs the package dp-accounting; pip install 'quantkit\[dp\]'"):
        epsilon([Release(rate=0.1, noise=1)], 1e-5)


def spend(ledger, rate, noise, most=10_000):
    for _ in range(most):
        if not ledger.allows(rate, noise):
            break
        ledger.record(rate, noise)
    return ledger


def test_a_ledger_stops_at_its_last_step_within_the_budget():
    ledger = spend(Ledger(delta=1e-5, budget=1.0), 0.05, 2.0)
    steps = ledger.steps
    assert 0 < steps < 1000
    assert epsilon([Release(rate=0.05, noise=2.0, steps=steps)], 1e-5) <= 1.0
    assert epsilon([Release(rate=0.05, noise=2.0, steps=round(1.01 * steps) + 1)], 1e-5) > 1.0
    with pytest.raises(UsageError, match=f"the privacy budget of epsilon 1 is spent after {steps} steps"):
        ledger.record(0.05, 2.0)
    assert ledger.steps == steps


def test_a_ledger_that_expects_its_steps_looks_once(monkeypatch):
    noise = 1.2
    ledger = Ledger(delta=1e-5, budget=4.0)
    ledger.expect(0.05, noise, 80)
    looked = []
    monkeypatch.setattr(accounting, "epsilon", lambda *a, **k: looked.append(a) or math.inf)
    spend(ledger, 0.05, noise)
    assert ledger.steps == 80
    assert looked  # at step 81, which is not within the budget


def test_noise_that_is_chosen_on_the_way_is_added_up_by_rdp_and_never_exceeds_the_budget():
    ledger = Ledger(delta=1e-5, budget=1.0, adaptive=True)
    noises = [1.5, 0.8, 3.0, 0.7, 0.6, 5.0, 0.5]
    for noise in noises:
        if ledger.allows(0.02, noise):
            ledger.record(0.02, noise)
    taken = [release.noise for release in ledger.releases]
    assert taken
    assert taken != noises
    left_out = next(noise for noise in noises if noise not in taken)
    before = [Release(rate=0.02, noise=noise) for noise in noises[: noises.index(left_out)]]
    assert epsilon([*before, Release(rate=0.02, noise=left_out)], 1e-5, "rdp") > 1.0
    assert ledger.epsilon("rdp") <= 1.0
    assert ledger.summary()["epsilon_pld"] is None


def test_the_summary_is_json_and_says_what_was_done():
    ledger = spend(Ledger(delta=1e-5), 0.01, 1.0, most=3)
    ledger.record(0.01, 2.0)
    summary = json.loads(json.dumps(ledger.summary()))
    assert summary["sampling"] == "poisson"
    assert summary["steps"] == 4
    assert summary["releases"] == [{"rate": 0.01, "noise": 1.0, "steps": 3}, {"rate": 0.01, "noise": 2.0, "steps": 1}]
    assert 0 < summary["epsilon_pld"] < summary["epsilon_rdp"]
    bare = Ledger(delta=1e-5)
    bare.record(0.01, 0.0)
    assert bare.summary()["epsilon_pld"] is None
