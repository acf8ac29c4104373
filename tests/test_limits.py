"""Whether a run fits, and which flags make it fit: what is proposed must really do."""

import dataclasses
import math
import re

import pytest
import torch

import quantkit
from quantkit import costs, host
from quantkit.errors import UsageError
from quantkit.limits import SPARE, Limits
from quantkit.model.skeleton import Skeleton
from quantkit.recipe import from_defaults
from quantkit.resources import data_dir
from quantkit.units import parse_size
from quantkit.workload import workload

CPU = torch.device("cpu")
GB = 10**9
RUN = {"calibration": "embedded", "wbits": 4, "group_size": 32, "device": "cpu"}


@pytest.fixture(scope="module")
def work():
    recipe = from_defaults("tiny", {"group_size": 32, "text": "embedded", "seqlen": 256})
    tiny = workload(Skeleton(data_dir("model_zoo") / "tiny"), recipe, CPU)
    return dataclasses.replace(tiny, width=1024, samples=1024, batch_size=8, block_parameters=10**7)


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine of which this process has 1 GB and 10 GB are free."""
    monkeypatch.setattr(host, "resident_memory", lambda: GB)
    monkeypatch.setattr(host, "free_memory", lambda: 10 * GB)


def limits(memory=None):
    return Limits.of(CPU, memory)


def rest(work):
    return costs.host_memory(work, 0)


def test_streams_get_what_the_rest_of_the_run_leaves(work):
    for memory in (4 * GB, 8 * GB):
        assert limits(memory).held(work) == int((1 - SPARE) * memory) - rest(work)
        assert limits(memory).memory_of(work) <= (1 - SPARE) * memory


def test_nobody_asked_for_all_memory_that_there_is(work):
    assert limits().held(work) == 9 * GB - rest(work)
    assert limits().memory == 11 * GB


def test_there_is_no_more_than_the_machine_has(work):
    assert limits(10**15) == limits(11 * GB)


def test_one_batch_may_always_stay(work):
    assert limits(GB).held(work) == costs.batch_bytes(work) == 8 * 256 * 1024 * 4


def test_what_does_not_stay_is_spilled(work):
    memory = math.ceil((rest(work) + GB) / (1 - SPARE))
    assert 0 <= limits(memory).spilled(work) - (costs.stream_bytes(work) - GB) < costs.batch_bytes(work)
    assert limits(memory).memory_of(work) == rest(work) + GB
    assert limits(10 * GB).spilled(work) == 0


def test_samples_do_not_decide_whether_a_run_fits(work):
    more = dataclasses.replace(work, samples=10**6)
    least = rest(work) + costs.batch_bytes(work)
    assert limits(least).fits(more)
    assert not limits(least - 1).fits(work)
    assert limits(least).refusal(more, []) is None


@pytest.mark.parametrize("memory", [None, 1.35 * GB, 1.5 * GB, 2 * GB])
@pytest.mark.parametrize("tokens", [8 * 2048, 64 * 2048])
def test_every_flag_that_is_named_makes_the_run_fit(work, monkeypatch, memory, tokens):
    batch = tokens // 2048
    large = dataclasses.replace(work, seqlen=2048, batch_size=batch, block_features=2 * 10**4 if memory else 10**6)
    fast = dataclasses.replace(large, updates=0, trained=0, whole=None)
    limit = limits(int(memory) if memory else None)
    text = limit.refusal(large, [("fast", fast)])
    assert text is not None
    if memory is None:
        assert "10.00 GB are free" in text
    ways = re.findall(r"(--[a-z-]+ \S+)", text.split("; ")[1])
    assert ways
    together = " or " not in text.split("; ")[1]
    changed = {"--memory": limit, "other": large}
    for way in ways:
        flag, value = way.split()
        if not together:
            changed = {"--memory": limit, "other": large}
        match flag:
            case "--memory":
                changed["--memory"] = limits(parse_size(value))
            case "--preset":
                changed["other"] = fast
            case _:
                name = flag.removeprefix("--").replace("-", "_")
                changed["other"] = dataclasses.replace(changed["other"], **{name: int(value)})
        assert together or changed["--memory"].fits(changed["other"]), way
    assert changed["--memory"].fits(changed["other"])


def test_a_run_that_nothing_makes_fit_says_so(work):
    huge = dataclasses.replace(work, block_parameters=10**11)
    assert limits().refusal(huge, []).endswith("; no flag makes it fit on this machine")


def test_a_plan_says_what_is_refused_and_a_run_refuses_it(tmp_path):
    plan = quantkit.plan("tiny", **RUN, memory="1100MB", batch_size=64)
    assert plan.refusal
    assert plan.memory_limit == 1_100_000_000
    with pytest.raises(UsageError) as caught:
        quantkit.quantize("tiny", **RUN, memory=1_100_000_000, batch_size=64, output=tmp_path / "out")
    assert str(caught.value) == plan.refusal
    assert not list(tmp_path.iterdir())


def test_the_memory_that_is_allowed_changes_no_result(tmp_path, monkeypatch):
    fields = RUN | {"method": "rtn", "samples": 100, "seqlen": 64}
    plain = quantkit.quantize("tiny", **fields, output=tmp_path / "plain")
    monkeypatch.setattr(costs, "host_memory", lambda work, held: GB + min(held, costs.stream_bytes(work)))
    spilled = quantkit.quantize("tiny", **fields, output=tmp_path / "spilled", memory=GB + 400_000)
    assert spilled.report["sha256"] == plain.report["sha256"]
    measured, predicted = spilled.report["measured"], spilled.report["predicted"]
    assert measured["spilled_bytes"] == pytest.approx(predicted["spilled_bytes"], rel=0.15)
    assert measured["spilled_bytes"] > 0
    assert plain.report["measured"]["spilled_bytes"] == plain.report["predicted"]["spilled_bytes"] == 0
