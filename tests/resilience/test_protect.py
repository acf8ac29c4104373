"""`protect` and `quantize --resilience`: budgets are kept, refusals change nothing, `check` knows what was made."""

import hashlib
import json
import shutil

import pytest
from typer.testing import CliRunner

import quantkit
from quantkit.cli import app
from quantkit.errors import ModelError, OutputError, QuantkitError, UsageError
from quantkit.evaluation.check import check
from quantkit.resilience import scale_file, side_file
from quantkit.resilience.choice import Resilience
from quantkit.resilience.places import attached

TEXT = {"calibration": "embedded", "samples": 4, "seqlen": 32}
QUICK = {"decays": (1.0,), "epochs": 2}


@pytest.fixture
def output(tiny_rtn_w4, tmp_path):
    return shutil.copytree(tiny_rtn_w4, tmp_path / "output")


def digests(directory):
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("kind", "method"),
    [("ranger", "profiled"), ("layer", "progressive"), ("neuron", "joint"), ("hybrid", "progressive")],
)
def test_bounds_cost_no_more_than_their_budget(output, kind, method):
    before = digests(output)
    made = quantkit.protect(output, resilience=Resilience(kind=kind, method=method, **QUICK), **TEXT)
    assert made.facts["kind"] == kind
    assert made.facts["damage"] <= made.facts["budget"] == 0.5
    bounds = attached(quantkit.load(output))
    vectors = {name: bound.threshold.ndim for name, bound in bounds.items()}
    last = max(int(part) for name in vectors for part in name.split(".") if part.isdigit())
    expected = {"ranger": lambda _: 0, "layer": lambda _: 0, "neuron": lambda _: 1}.get(
        kind, lambda name: int(f".{last}" in name)
    )
    assert vectors == {name: expected(name) for name in vectors}
    after = digests(output)
    assert {name for name in after if before.get(name) != after[name]} == {
        "report.json",
        "resilience/bounds.safetensors",
    }
    assert json.loads((output / "report.json").read_text())["resilience"]["kind"] == kind


def test_a_looser_budget_gives_tighter_bounds(output):
    sums = []
    for budget in (0.01, 20.0):
        choice = Resilience(kind="layer", method="joint", budget=budget, decays=(10.0,), epochs=6)
        made = quantkit.protect(output, resilience=choice, overwrite=True, **TEXT)
        assert made.facts["damage"] <= budget
        sums.append(sum(float(bound.threshold) for bound in attached(quantkit.load(output)).values()))
    assert sums[1] < 0.9 * sums[0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"resilience": "hybird"}, UsageError, r"unknown kind of bounds 'hybird' \(did you mean hybrid\?\)"),
        ({"method": "interval"}, UsageError, "measures under faults"),
        ({"budget": "much"}, UsageError, "budget must be a number of per cent"),
        ({"samples": 1}, UsageError, "samples and seqlen must be at least 2"),
        ({"seqlen": 10_000}, UsageError, "longer than the model's context"),
        ({"scales": "parrity"}, UsageError, "unknown protection of scales 'parrity'"),
        ({"calibration": "nowhere.txt"}, QuantkitError, "nowhere.txt"),
    ],
)
def test_what_is_refused_changes_nothing(output, options, error, message):
    before = digests(output)
    with pytest.raises(error, match=message):
        quantkit.protect(output, **{**TEXT, **options})
    assert digests(output) == before


def test_other_directories_are_refused(output, tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        quantkit.protect(tmp_path / "nothing")
    quantkit.protect(output, resilience="ranger", **TEXT)
    with pytest.raises(OutputError, match="has bounds; replace them with --overwrite"):
        quantkit.protect(output, resilience="ranger", **TEXT)


def test_a_run_with_resilience_is_repeated_by_its_recipe(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    how = {"method": "rtn", "wbits": 4, "group_size": 32, **TEXT}
    quantkit.quantize("tiny", output=first, resilience=Resilience(kind="hybrid", **QUICK), **how)
    recipe = str(first / "recipe.toml")
    done = CliRunner().invoke(app, ["quantize", "tiny", "--recipe", recipe, "-o", str(second)])
    assert done.exit_code == 0, done.output
    assert side_file.path_of(first).read_bytes() == side_file.path_of(second).read_bytes()
    assert json.loads((first / "report.json").read_text())["resilience"]["damage"] <= 0.5
    found = check(first)
    assert not found.faults
    assert found.facts["bounds"] == "hybrid"


def test_check_misses_what_the_report_names(output):
    quantkit.protect(output, resilience="ranger", scales="parity", **TEXT)
    found = check(output)
    assert not found.faults
    assert (found.facts["bounds"], found.facts["guards"]) == ("ranger", "parity")
    for path in (side_file.path_of(output), scale_file.path_of(output)):
        kept = path.read_bytes()
        path.unlink()
        assert check(output).faults == (f"resilience/{path.name} is missing, though report.json says it is there",)
        path.write_bytes(kept[:-40])
        assert [fault for fault in check(output).faults if "damaged" in fault]
        path.write_bytes(kept)


def test_scales_protected_alone_are_in_the_report(output):
    quantkit.protect_scales(output, "clamp")
    assert json.loads((output / "report.json").read_text())["resilience"] == {
        "scales": {"kind": "clamp", "bytes": scale_file.path_of(output).stat().st_size}
    }
    assert not check(output).faults


def test_what_is_made_of_a_protected_model_says_that_it_is_not(output, tmp_path):
    quantkit.protect(output, resilience="ranger", scales="clamp", **TEXT)
    made = quantkit.export(output, format="gptq", to=tmp_path / "gptq")
    assert made.notices[-1] == f"the bounds and guards of scales of {output} are not part of it: it runs without them"
    assert not (tmp_path / "gptq" / "resilience").exists()


def test_the_command_says_where_bounds_apply(output):
    command = ["protect", str(output), "--resilience", "layer", "--method", "profiled", "--json"]
    command += ["--calibration", "embedded", "--samples", "4", "--seqlen", "32"]
    facts = json.loads(CliRunner().invoke(app, command).stdout)
    assert facts["method"] == "profiled"
    assert facts["notice"].startswith("the bounds are applied by quantkit.load")
    assert facts["bytes"] == 4 * facts["places"]
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 6
    assert "--overwrite" in json.loads(again.stdout)["error"]
