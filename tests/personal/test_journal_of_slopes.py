"""A journal gives every tensor of a run again, in another process, to the bit."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_zeroth_order_estimators import ESTIMATORS, fresh, problem

from quantkit.errors import DataError, OutputError, UsageError
from quantkit.personal.gradients.mezo import Mezo
from quantkit.personal.journal import SlopeJournal, digest, replayed, written
from quantkit.personal.updates import Updates

OTHER_PROCESS = """
import sys
from pathlib import Path
from safetensors.torch import load_file
from quantkit.personal.journal import SlopeJournal, digest, replayed
for line in sys.stdin.read().split():
    directory = Path(line)
    journal = SlopeJournal.read(directory / "journal.safetensors")
    before = load_file(directory / "before.safetensors")
    after, same = replayed(journal, {name: before[name] for name, _, _ in journal.tensors})
    print(same, digest(after))
"""


def run(estimator, updates, steps=12):
    """Train, and return the tensors before and after, and the journal."""
    parameters, losses, _ = problem()
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = updates.begin(parameters)
    for step in range(steps):
        estimator.estimate([losses], parameters, step=step)
        updates.take(optimizer, step)
    after = {name: p.detach().clone() for name, p in parameters.items()}
    return before, after, written(estimator, updates, before, after, base="b" * 64)


KINDS = {
    "sgd": ("mezo", Updates(steps=12, rate=0.1, optimizer="sgd", decay=0.1)),
    "momentum": ("mezo", Updates(steps=12, rate=0.05, optimizer="momentum", warmup=3, schedule="cosine")),
    "adam": ("mezo", Updates(steps=12, rate=0.01, decay=0.01, schedule="linear")),
    **{name: (name, Updates(steps=12, rate=0.01)) for name in ESTIMATORS if name != "mezo"},
}


def test_replay_in_another_process_is_equal_to_the_bit(tmp_path):
    wanted = []
    for name, (estimator, updates) in KINDS.items():
        before, after, journal = run(fresh(estimator), updates)
        directory = tmp_path / name.replace(" ", "-").replace(",", "")
        directory.mkdir()
        save_file(before, directory / "before.safetensors")
        journal.save(directory / "journal.safetensors")
        assert digest(after) != digest(before)
        wanted.append((directory, f"True {digest(after)}"))
    told = "\n".join(str(directory) for directory, _ in wanted)
    done = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS], input=told, capture_output=True, text=True, timeout=100, check=True
    )
    assert done.stdout.split("\n")[:-1] == [line for _, line in wanted]


def test_a_journal_is_as_it_was_written(tmp_path):
    _, _, journal = run(Mezo(seed=2**62, directions=3), Updates(steps=12, rate=0.1))
    journal.save(tmp_path / "journal.safetensors")
    found = SlopeJournal.read(tmp_path / "journal.safetensors")
    assert torch.equal(found.rho, journal.rho)
    assert found.rho.shape == (12, 3)
    assert replace(found, rho=None) == replace(journal, rho=None)
    with safe_open(tmp_path / "journal.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"rho", "master_seed"}
        assert file.get_tensor("master_seed").tolist() == [2**62]
        assert json.loads(file.metadata()["journal"])["private_data"] is True
    assert list(tmp_path.iterdir()) == [tmp_path / "journal.safetensors"]


def test_a_journal_can_end_where_the_best_tensors_were():
    before, _, journal = run(Mezo(), Updates(steps=12, rate=0.1, schedule="cosine"), steps=7)
    _, _, longer = run(Mezo(), Updates(steps=12, rate=0.1, schedule="cosine"))
    estimator = Mezo()
    estimator.restore({"rho": longer.rho, "distance": torch.tensor(longer.distance, dtype=torch.float64)})
    best, _ = replayed(journal, before)
    cut = written(estimator, longer.updates, before, best, base="b", steps=7)
    assert torch.equal(cut.rho, journal.rho)
    assert replayed(cut, before)[1]


def test_no_secret_is_in_a_journal(tmp_path):
    _, _, journal = run(fresh("private"), Updates(steps=12, rate=0.1))
    assert "key" not in journal.options
    assert journal.options["noise"] == 1.0


def test_twenty_thousand_steps_take_less_than_a_tenth_of_a_megabyte(tmp_path):
    _, _, journal = run(Mezo(), Updates(steps=12, rate=0.1))
    replace(journal, rho=torch.randn(20_000, 1)).save(tmp_path / "journal.safetensors")
    assert (tmp_path / "journal.safetensors").stat().st_size < 100_000


def test_slopes_that_were_changed_lead_elsewhere():
    before, after, journal = run(Mezo(), Updates(steps=12, rate=0.1))
    changed = journal.rho.clone()
    changed[3] += 1e-3
    found, same = replayed(replace(journal, rho=changed), before)
    assert not same
    assert digest(found) != digest(after)


def test_other_tensors_are_refused():
    before, _, journal = run(Mezo(), Updates(steps=12, rate=0.1))
    for other in ({name: t + 1 for name, t in before.items()}, dict(reversed(before.items())), {}):
        with pytest.raises(DataError, match="began with other tensors"):
            replayed(journal, other)


def test_a_journal_of_another_version_is_refused():
    before, _, journal = run(Mezo(), Updates(steps=12, rate=0.1))
    for change in ({"algorithm": "dice"}, {"gradient": "guess"}):
        with pytest.raises(DataError, match="which this version of quantkit does not have; use the version that"):
            replayed(replace(journal, **change), before)


def damaged(path, kind, journal):
    journal.save(path)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "foreign":
        save_file({"rho": journal.rho}, path)
    elif kind == "not finite":
        replace(journal, rho=journal.rho * float("nan")).save(path)
    elif kind == "fields":
        save_file(
            {"rho": journal.rho, "master_seed": torch.zeros(1)}, path, {"format": "quantkit slopes 1", "journal": "{}"}
        )
    elif kind == "list":
        save_file(
            {"rho": journal.rho, "master_seed": torch.zeros(1)}, path, {"format": "quantkit slopes 1", "journal": "[]"}
        )
    else:
        path.unlink()


@pytest.mark.parametrize("kind", ["cut", "empty", "foreign", "not finite", "fields", "list", "missing"])
def test_a_damaged_journal_is_refused_in_one_line(tmp_path, kind):
    _, _, journal = run(Mezo(), Updates(steps=12, rate=0.1))
    damaged(tmp_path / "journal.safetensors", kind, journal)
    with pytest.raises(DataError, match=r"damaged|is no journal|there is no journal") as failure:
        SlopeJournal.read(tmp_path / "journal.safetensors")
    assert "\n" not in str(failure.value)


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    _, _, journal = run(Mezo(), Updates(steps=12, rate=0.1))
    with pytest.raises(OutputError, match="cannot write"):
        journal.save(tmp_path / "missing" / "journal.safetensors")


def test_rates():
    updates = Updates(steps=10, rate=1.0, warmup=2, schedule="linear")
    assert [updates.rate_at(step) for step in range(10)] == [0.5, 1.0, *(k / 8 for k in range(8, 0, -1))]
    cosine = Updates(steps=10, rate=2.0, schedule="cosine")
    assert (cosine.rate_at(0), cosine.rate_at(5)) == pytest.approx((2.0, 1.0))
    assert Updates(steps=10, rate=2.0).rate_at(9) == 2.0


def test_biases_and_norms_do_not_decay():
    named = {name: torch.nn.Parameter(torch.ones(1)) for name in ("a.bias", "a.lora", "input_layernorm.weight")}
    groups = Updates(steps=1, rate=0.1, decay=0.3).begin(named).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.3), (2, 0.0)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adm"}, "unknown optimizer 'adm' \\(did you mean adam\\?\\)"),
        ({"schedule": "linar"}, "unknown schedule 'linar' \\(did you mean linear\\?\\)"),
        ({"rate": 0.0}, "rate 0 or decay 0 cannot be"),
        ({"warmup": 20}, "20 of 10 steps cannot be warmup"),
    ],
)
def test_updates_that_cannot_be_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        Updates(**{"steps": 10, "rate": 0.1, **changes})
