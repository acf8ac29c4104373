"""`evaluate` by tasks and against another model, `compare`, `lm-eval`: what they print, and what they refuse."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from local_tasks import COMPLETE, write_task
from typer.testing import CliRunner

import quantkit
from quantkit.cli import app

TEXT = ["--text", "embedded-test", "--seqlen", 64, "--windows", 4]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tasks(tmp_path):
    write_task(tmp_path / "tasks", "complete", COMPLETE)
    return ["--tasks", "pick,complete", "--include-path", write_task(tmp_path / "tasks")]


@pytest.fixture(scope="session")
def w2(tmp_path_factory):
    """The embedded model rounded to 2 bits, which changes answers."""
    output = tmp_path_factory.mktemp("judged") / "w2"
    quantkit.quantize("tiny", output=output, method="rtn", wbits=2, group_size=32)
    return output


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def run_json(*arguments):
    return json.loads(run(*arguments, "--json"))


def refused(code, *arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    (line,) = result.stderr.splitlines()
    return line.removeprefix("error: ")


def test_tasks_of_one_model(w2, tasks):
    facts = run_json("evaluate", w2, *tasks, "--limit", 10)
    rows = {(row["task"], row["metric"]): row for row in facts["tasks"]}
    assert list(rows) == [("pick", "acc"), ("pick", "acc_norm"), ("complete", "perplexity"), ("complete", "acc")]
    assert all(row["samples"] == 10 and "against" not in row for row in rows.values())
    assert (facts["runtime"], facts["limit"], facts["batch_size"]) == ("dense", 10, "auto")
    assert "flips" not in facts
    shown = run("evaluate", w2, *tasks, "--limit", 10)
    assert f"{rows['pick', 'acc_norm']['value']:.4f}" in shown
    assert f"± {rows['pick', 'acc_norm']['stderr']:.4f}" in shown


def test_tasks_against_the_original(w2, tasks):
    facts = run_json("evaluate", w2, *tasks, "--against", "tiny")
    alone = {name: run_json("evaluate", name, *tasks)["tasks"] for name in (w2, "tiny")}
    for row, mine, its in zip(facts["tasks"], alone[w2], alone["tiny"], strict=True):
        assert row["value"] == mine["value"]
        assert row["against"] == {"value": its["value"], "stderr": its["stderr"]}
        assert row["difference"] == mine["value"] - its["value"]
    flips = {(each["task"], each["metric"]): each for each in facts["flips"]}
    assert set(flips) == {("pick", "acc"), ("pick", "acc_norm"), ("complete", "acc")}
    assert flips["pick", "acc"]["to_wrong"] + flips["pick", "acc"]["to_right"] > 0
    for row in facts["tasks"]:
        if flip := flips.get((row["task"], row["metric"])):
            assert row["difference"] == pytest.approx((flip["to_right"] - flip["to_wrong"]) / 24)
    shown = run("evaluate", w2, *tasks, "--against", "tiny").splitlines()
    assert shown[0].split() == ["task", "metric", "n", "w2", "tiny", "change", "lost", "won"]
    assert shown[1].split()[-2:] == [str(flips["pick", "acc"][key]) for key in ("to_wrong", "to_right")]


@pytest.mark.parametrize("runtime", ["packed", "dense"])
def test_both_runtimes_answer_alike(tiny_rtn_w4, tasks, runtime):
    mine = run_json("evaluate", tiny_rtn_w4, *tasks, "--runtime", runtime)
    dense = run_json("evaluate", tiny_rtn_w4, *tasks)
    for row, other in zip(mine["tasks"], dense["tasks"], strict=True):
        assert row["value"] == pytest.approx(other["value"], rel=1e-2)
    assert mine["runtime"] == runtime


def test_perplexity_against_the_original(w2):
    facts = run_json("evaluate", w2, *TEXT, "--against", "tiny")
    alone = [run_json("evaluate", name, *TEXT) for name in (w2, "tiny")]
    assert [facts["perplexity"], facts["against"]["perplexity"]] == [each["perplexity"] for each in alone]
    assert facts["against"]["model"] == "tiny"
    shown = run("evaluate", w2, *TEXT, "--against", "tiny")
    assert f"{facts['perplexity']:.4f}" in shown
    assert f"{facts['against']['perplexity']:.4f}" in shown


def test_compare(w2, tasks):
    facts = run_json("compare", w2, "tiny", *TEXT, *tasks)
    assert facts["perplexity"] == pytest.approx(run_json("evaluate", w2, *TEXT)["perplexity"])
    assert facts["reference_perplexity"] == pytest.approx(run_json("evaluate", "tiny", *TEXT)["perplexity"])
    assert 0 < facts["kl_median"] < facts["kl"] < facts["kl_p99"] <= facts["kl_max"]
    assert 0 < facts["top1_agreement"] < 1
    assert sum(facts["kl_histogram"]["counts"]) == facts["tokens"] == 4 * 63
    assert facts["tasks"] == run_json("evaluate", w2, *tasks, "--against", "tiny")["tasks"]
    shown = run("compare", w2, "tiny", *TEXT, *tasks)
    assert f"{facts['top1_agreement']:.2%}" in shown
    assert "█" in shown
    assert "lost" in shown


def test_a_model_is_itself(tasks):
    facts = run_json("compare", "tiny", "tiny", *TEXT, *tasks)
    assert (facts["kl"], facts["kl_max"], facts["top1_agreement"]) == (0, 0, 1)
    assert facts["perplexity"] == facts["reference_perplexity"]
    assert all(row["difference"] == 0 for row in facts["tasks"])
    assert all(flip["share"] == 0 for flip in facts["flips"])
    assert "tasks" not in run_json("compare", "tiny", "tiny", *TEXT)


def test_python_does_the_same(w2, tasks):
    folder = tasks[-1]
    result = quantkit.compare(
        w2, "tiny", text="embedded-test", seqlen=64, windows=4, tasks=["pick"], include_path=folder, limit=6
    )
    facts = run_json("compare", w2, "tiny", *TEXT, "--tasks", "pick", "--include-path", folder, "--limit", 6)
    assert (result.divergence.kl, len(result.tasks.flips)) == (facts["kl"], len(facts["flips"]))
    scores = quantkit.evaluate_tasks(w2, ["pick"], include_path=folder, limit=6)
    assert [score.value for score in scores.scores] == [row["value"] for row in facts["tasks"]]


def test_the_result_is_written_too(tasks, tmp_path):
    file = tmp_path / "result.json"
    file.write_text("old")
    shown = run("evaluate", "tiny", *tasks, "--output", file)
    assert "pick" in shown
    assert json.loads(file.read_text()) == run_json("evaluate", "tiny", *tasks)
    run("compare", "tiny", "tiny", *TEXT, "--output", file)
    assert json.loads(file.read_text())["kl"] == 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--tasks", "pick", "--windows", 4], "--windows is for a text, not for --tasks; leave one out"),
        (["--tasks", "pick", "--text", "embedded-test"], "--text is for a text, not for --tasks; leave one out"),
        (["--limit", 4], "--limit is for --tasks; leave one out"),
        (["--tasks", "pick", "--limit", 0], "limit must be at least 1, not 0"),
        (["--tasks", "pick", "--batch-size", 0], "batch_size must be at least 1, not 0"),
        (["--tasks", "pick", "--batch-size", "many"], "--batch-size must be a positive number or auto, not 'many'"),
        (["--tasks", "pick", "--num-fewshot", -1], "num_fewshot must be at least 0, not -1"),
        (["--tasks", "pick,,piqa"], "--tasks 'pick,,piqa' has an empty name; give names with commas between them"),
        (["--runtime", "fast"], "unknown runtime 'fast' (known: dense, packed)"),
        (["--tasks", "pick", "--runtime", "pakced"], "unknown runtime 'pakced' (did you mean packed?)"),
        (["--tasks", "pick", "--include-path", "nowhere"], "--include-path nowhere is no directory"),
    ],
)
def test_wrong_options_of_evaluate(arguments, line):
    assert refused(2, "evaluate", "tiny", *arguments).startswith(line)


def test_tasks_are_refused_before_the_model(tasks, tmp_path):
    assert "'nowhere' is neither a directory" in refused(3, "evaluate", "nowhere", *tasks)
    (tmp_path / "tasks" / "pick.jsonl").unlink()
    assert "the task pick cannot be set up" in refused(4, "evaluate", "nowhere", *tasks)


def test_a_wrong_original_is_refused_first(tasks):
    assert "'nowhere' is neither a directory" in refused(3, "evaluate", "tiny", *tasks, "--against", "nowhere")


@pytest.mark.parametrize(("where", "line"), [("no/file.json", "does not exist"), ("", "is a directory")])
def test_an_output_that_cannot_be_written(tasks, tmp_path, where, line):
    assert line in refused(6, "evaluate", "tiny", *tasks, "--output", tmp_path / where)


@pytest.mark.parametrize("command", [["compare"], ["evaluate", "--against"]])
def test_other_tokens_are_refused(tmp_path, command):
    from families import save_tiny, save_tokenizer

    save_tiny("llama", tmp_path / "other")
    save_tokenizer(tmp_path / "other")
    command, *flag = command
    line = refused(3, command, "tiny", *flag, tmp_path / "other", *TEXT)
    assert "differ, 1024 and 128 tokens; compare models of one family" in line


def test_help_names_the_commands():
    for command in ("evaluate", "compare", "generate"):
        assert "--runtime" in run(command, "--help")
    assert "lm-eval" in run("--help")


def lm_eval(program, model, options, folder, tmp_path):
    command = [*program, "--model", model, "--model_args", options, "--tasks", "pick", "--include_path", folder]
    command += ["--output_path", tmp_path / "said", "--device", "cpu"]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "said").rglob("results*.json")
    found = json.loads(file.read_text())["results"]["pick"]
    file.unlink()
    return found


@pytest.mark.slow
def test_lm_eval_from_a_shell(w2, tasks, tmp_path):
    folder = tasks[-1]
    own = Path(sys.executable).with_name("lm_eval")
    theirs = lm_eval([own], "hf", f"pretrained={w2},dtype=float32", folder, tmp_path)
    ours = {
        runtime: lm_eval(
            [sys.executable, "-m", "quantkit", "lm-eval"],
            "quantkit",
            f"pretrained={w2},runtime={runtime}",
            folder,
            tmp_path,
        )
        for runtime in ("dense", "packed")
    }
    for row in run_json("evaluate", w2, "--tasks", "pick", "--include-path", folder)["tasks"]:
        for found in (theirs, ours["dense"], ours["packed"]):
            assert found[f"{row['metric']},none"] == pytest.approx(row["value"])
            assert found[f"{row['metric']}_stderr,none"] == pytest.approx(row["stderr"])


@pytest.mark.slow
def test_lm_eval_of_a_wrong_model_is_one_line(tasks, tmp_path):
    command = [sys.executable, "-m", "quantkit", "lm-eval", "--model", "quantkit", "--tasks", "pick"]
    command += ["--model_args", "pretrained=nowhere", "--include_path", tasks[-1]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: 'nowhere' is neither a directory nor an alias")
