"""`quantkit faults`: what a campaign finds, that it goes on and comes out the same, and what it refuses."""

import json
import math
import shutil

import pytest
from local_tasks import CHOOSE, write_task
from typer.testing import CliRunner

import quantkit
from quantkit.cli import app
from quantkit.errors import QuantkitError, UsageError
from quantkit.fault_plot import draw, read_results
from quantkit.fault_report import from_good_to_bad, harm, median_range, quantile, summarize
from quantkit.resilience import scale_file

SMALL = {"seqlen": 32, "windows": 1, "device": "cpu"}
FLAGS = ["--seqlen", "32", "--windows", "1", "--device", "cpu"]


def run(*arguments):
    return CliRunner().invoke(app, ["faults", *map(str, arguments)])


@pytest.fixture
def output(tiny_rtn_w4, tmp_path):
    return shutil.copytree(tiny_rtn_w4, tmp_path / "output")


def files(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_more_faults_do_more_harm_and_none_does_none(output):
    before = files(output)
    report = quantkit.faults(output, rates=(0.0, 1e-5, 1e-2), trials=6, targets=("scales",), **SMALL)
    none, few, many = report.rows
    assert none.median == report.about["baseline"]
    assert (none.flips, none.not_finite) == (0, 0)
    assert few.flips < many.flips
    assert many.p5 is None or many.p5 > 2 * none.median
    assert files(output) == before


def test_protected_scales_survive_what_destroys_unprotected_ones(output):
    how = {"rates": (1e-4,), "trials": 8, "targets": ("scales",), **SMALL}
    bare = quantkit.faults(output, **how)
    scale_file.write(output, "secded")
    guarded = quantkit.faults(output, **how)
    assert guarded.about["protection"]["scales"] == "secded"
    assert guarded.rows[0].corrected > 0
    assert guarded.rows[0].p95 == pytest.approx(guarded.about["baseline"], rel=1e-3)
    assert bare.rows[0].p95 is None or bare.rows[0].p95 > 1.5 * bare.about["baseline"]


def test_the_sweep_over_bits_finds_the_top_exponent_bit(output):
    report = quantkit.faults(output, sweep="bits", trials=4, targets=("scales",), **SMALL)
    means = {int(row.condition): math.inf if row.mean is None else row.mean for row in report.rows}
    assert sorted(means) == list(range(16))
    assert max(means, key=lambda bit: means[bit]) == 14
    assert all(row.flips == 1 for row in report.rows)


def test_the_sweep_over_tensors_hits_each_alone(output):
    report = quantkit.faults(output, sweep="tensors", trials=2, targets=("norms",), **SMALL)
    assert len(report.rows) > 4
    assert all(row.flips == 1 for row in report.rows)


def test_a_campaign_goes_on_where_it_was_cut_off(output, tmp_path):
    how = {"rates": (1e-5, 1e-4), "targets": ("codes", "scales"), **SMALL}
    whole = quantkit.faults(output, trials=4, output=tmp_path / "whole.json", **how)
    measured = []

    def tell(what, done, total):
        if what == "injecting":
            measured.append(done)
            if len(measured) == 3:
                raise KeyboardInterrupt

    file = tmp_path / "cut.json"
    with pytest.raises(KeyboardInterrupt):
        quantkit.faults(output, trials=4, output=file, progress=tell, **how)
    journal = tmp_path / "cut.jsonl"
    kept = journal.read_text().splitlines()
    assert len(kept) == 1 + 3
    journal.write_text("\n".join(kept) + '\n{"condition": "1e-0')  # the process died while it wrote
    assert not file.exists()
    measured.clear()
    cut = quantkit.faults(output, trials=4, output=file, progress=lambda *said: measured.append(said), **how)
    assert len([said for said in measured if said[0] == "injecting"]) == 8 - 3
    assert cut.facts() == whole.facts()
    assert json.loads(file.read_text()) == json.loads((tmp_path / "whole.json").read_text())


@pytest.mark.slow
def test_several_processes_find_the_same(output, tmp_path):
    how = {"rates": (1e-4,), "trials": 4, "targets": ("scales",), **SMALL}
    alone = quantkit.faults(output, **how)
    several = quantkit.faults(output, jobs=2, output=tmp_path / "faults.json", **how)
    assert several.facts() == alone.facts()


def test_bits_that_do_not_come_back_are_no_result(output, tmp_path, monkeypatch):
    monkeypatch.setattr("quantkit.runtime.stored.StoredModel.restore", lambda self: None)
    with pytest.raises(QuantkitError, match="bits did not come back"):
        quantkit.faults(output, rates=(1e-3,), trials=1, targets=("scales",), output=tmp_path / "f.json", **SMALL)
    assert not (tmp_path / "f.json").exists()


def test_a_measure_of_ones_own(output):
    report = quantkit.faults(output, rates=(0.0,), trials=2, measure=lambda model, tokenizer: 7.0, **SMALL)
    assert report.values == {"0": (7.0, 7.0)}


def test_the_score_of_a_task_can_be_the_metric(output, tmp_path):
    write_task(tmp_path, "choose", CHOOSE)
    task = {"metric": "task", "task": "choose", "include_path": str(tmp_path), "limit": 8}
    report = quantkit.faults(output, rates=(0.0, 1e-2), trials=2, **task)
    baseline = report.about["baseline"]
    assert baseline * 8 == pytest.approx(round(baseline * 8))  # a share of eight answers
    none, many = (report.values[condition] for condition in report.values)
    assert none == (baseline, baseline)
    assert all(0 <= value <= 1 for value in many)


def test_a_dry_run_measures_little_and_writes_nothing(output, tmp_path):
    result = run(output, "--dry-run", "--json", "-o", tmp_path / "f.json", "--trials", 1000, "--rate", "1e-4", *FLAGS)
    plan = json.loads(result.stdout)
    assert (plan["trials"], plan["finished"], set(plan["bits"])) == (1000, 0, {"codes", "scales"})
    assert plan["seconds"] > 0
    assert not (tmp_path / "f.json").exists()
    assert not (tmp_path / "f.jsonl").exists()


def test_the_command_shows_a_table_and_draws_a_figure(output, tmp_path):
    file, figure = tmp_path / "f.json", tmp_path / "f.svg"
    shown = run(output, "--rate", "0,3e-6", "--trials", 12, "-o", file, "--target", "scales", *FLAGS)
    assert shown.exit_code == 0, shown.output
    assert "protection: none" in shown.stdout
    assert "most vulnerable" in shown.stdout
    drawn = run("--plot", figure, file, file)
    assert drawn.exit_code == 0, drawn.output
    first = figure.read_bytes()
    draw(read_results([file, file]), figure)
    assert figure.read_bytes() == first
    assert b"<svg" in first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "1e-4,1.5"], "from 0 to 1, not 1.5"),
        (["--rate", "nan"], "from 0 to 1"),
        (["--rate", "often"], "--rate takes numbers"),
        (["--target", "scale"], "did you mean scales"),
        (["--target", "bounds"], "has no bounds (quantkit protect has not been run on it)"),
        (["--target", "dense"], "has no dense (nothing of that kind is stored)"),
        (["--fault", "melt"], "unknown fault 'melt'"),
        (["--sweep", "bit"], "did you mean bits"),
        (["--sweep", "bits", "--target", "kv"], "leave out kv"),
        (["--metric", "task"], "needs --task"),
        (["--task", "piqa"], "needs --task"),
        (["--trials", "0"], "trials must be at least 1"),
        (["--jobs", "0"], "jobs must be at least 1"),
        (["--plot", "figure.bmp"], "use .svg, .png, .pdf"),
        (["--burst", "0"], "at least 1 bit"),
    ],
)
def test_bad_input_is_refused_in_one_line(output, arguments, message):
    before = files(output)
    result = run(output, *FLAGS, *arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert message in line
    assert files(output) == before


def test_a_symmetric_model_has_no_zeros(tmp_path):
    quantkit.quantize("tiny", output=tmp_path / "w4", method="rtn", wbits=4, group_size=32, symmetric=True)
    result = run(tmp_path / "w4", "--target", "zeros", *FLAGS)
    assert result.exit_code == 2
    assert "has no zeros (its scheme is symmetric)" in result.stderr


def test_a_model_that_is_not_packed_is_refused():
    result = run(quantkit.resources.data_dir("model_zoo") / "tiny", *FLAGS)
    assert result.exit_code == 2
    assert "is not packed" in result.stderr


def test_the_journal_of_another_campaign_is_refused_and_kept(output, tmp_path):
    how = {"rates": (1e-4,), "trials": 1, "output": tmp_path / "f.json", **SMALL}
    quantkit.faults(output, targets=("scales",), **how)
    kept = (tmp_path / "f.jsonl").read_bytes()
    with pytest.raises(UsageError, match="journal of another campaign"):
        quantkit.faults(output, targets=("codes",), **how)
    assert (tmp_path / "f.jsonl").read_bytes() == kept
    (tmp_path / "f.jsonl").write_text("no journal\n")
    with pytest.raises(UsageError, match="no journal of a campaign"):
        quantkit.faults(output, targets=("codes",), **how)
    assert quantkit.faults(output, targets=("codes",), restart=True, **how).about["targets"] == ["codes"]


def test_results_that_do_not_belong_together_are_not_drawn(output, tmp_path):
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(UsageError, match="no result of quantkit faults"):
        read_results([tmp_path / "no.json"])
    made = []
    for sweep in ("rates", "bits", "tensors"):
        facts = {"rows": [], "protection": {}, "targets": [], "metric": "perplexity", "sweep": sweep, "baseline": 1}
        made.append(tmp_path / f"{sweep}.json")
        made[-1].write_text(json.dumps(facts))
    with pytest.raises(UsageError, match="different sweeps"):
        read_results(made[:2])
    with pytest.raises(UsageError, match="of which there is a table"):
        read_results(made[2:])


def test_quantiles_count_what_is_not_finite_as_the_worst():
    values = [3.0, math.nan, 1.0, math.inf, 2.0]
    assert from_good_to_bad(values, higher=False) == [1.0, 2.0, 3.0, math.inf, math.inf]
    assert from_good_to_bad(values, higher=True) == [3.0, 2.0, 1.0, math.inf, math.inf]
    assert quantile(from_good_to_bad(values, higher=False), 0.5) == 3.0
    assert quantile(from_good_to_bad(values, higher=False), 0.95) is None


def test_the_median_is_inside_its_range_as_often_as_promised():
    """Of uniform numbers, whose median is 1/2."""
    import torch

    draws = torch.rand(400, 100, generator=torch.Generator().manual_seed(0)).sort(dim=1).values.tolist()
    inside = sum(low <= 0.5 <= high for low, high in map(median_range, draws))
    assert 0.93 <= inside / 400 <= 1.0


def test_the_tensor_that_does_the_harm_is_named_first():
    about = {"metric": "perplexity", "baseline": 5.0}
    lines = [
        ({"codes": 3, "scales": 1}, 5e4),
        ({"codes": 2}, 5.0),
        ({"codes": 4, "norms": 1}, 5.5),
        ({"scales": 2}, math.nan),
    ]
    done = {
        ("1e-05", n): {"flips": flips, "value": value, "corrected": 0, "replaced": 0}
        for n, (flips, value) in enumerate(lines)
    }
    blame = summarize(about, ["1e-05"], 4, done).blame
    assert blame[0].tensor == "scales"
    assert blame[0].flips == 3
    assert blame[0].harm == pytest.approx((math.log(1e4) + math.log(1e6)) / 2 - math.log(1.1) / 2)
    assert all(each.harm < 0 for each in blame[1:])


def test_harm_is_bounded():
    assert harm(math.nan, 5.0, higher=False) == harm(1e300, 5.0, higher=False) == pytest.approx(math.log(1e6))
    assert harm(10.0, 5.0, higher=False) == pytest.approx(math.log(2))
    assert harm(0.2, 0.7, higher=True) == pytest.approx(0.5)
