"""What the commands print: for a person, for a program, and nothing else."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

import quantkit
from quantkit.cli import app

SMALL = ["--group-size", "32", "--calibration", "embedded", "--samples", "2", "--seqlen", "32"]

QUICK = ["--updates", "2", "--set", "distill.updates=2"]


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert result.stderr == ""  # no terminal: no progress, and no library says anything
    return result.stdout


def run_json(*arguments):
    return json.loads(run(*arguments, "--json"))


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """A model quantized by the command line, and what it printed."""
    path = tmp_path_factory.mktemp("cli") / "w3"
    return path, run_json("quantize", "tiny", *SMALL, "--wbits", 3, *QUICK, "-o", path)


def test_quantize_reports(output):
    path, facts = output
    assert facts["method"] == "omniquant + distill"
    assert facts["whole"]["divergence_after"] > 0
    assert facts["output"] == str(path)
    assert facts["scheme"] == "w3a16g32"
    assert len(facts["blocks"]) == 5
    assert facts["measured"]["output_bytes"] == facts["predicted"]["output_bytes"]
    assert {entry.name for entry in path.iterdir()} >= {
        "config.json",
        "recipe.toml",
        "report.json",
        "tokenizer.json",
    }


def test_the_saved_recipe_repeats_the_run_byte_for_byte(output, tmp_path):
    path, _ = output
    run("quantize", "--recipe", path / "recipe.toml", "-o", tmp_path / "again")
    first, second = (json.loads((p / "report.json").read_text())["sha256"] for p in (path, tmp_path / "again"))
    assert first == second


def test_flags_change_a_recipe(output, tmp_path):
    path, _ = output
    facts = run_json("quantize", "--recipe", path / "recipe.toml", "--wbits", 5, "--method", "rtn", "--dry-run")
    assert (facts["scheme"], facts["method"], facts["calibration"]["samples"]) == ("w5a16g32", "rtn", 2)


def test_overwrite_replaces_the_output(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    run("quantize", "tiny", *SMALL, "--method", "rtn", "-o", tmp_path / "out", "--overwrite")
    assert (tmp_path / "out" / "config.json").exists()
    assert not (tmp_path / "out" / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_dry_run_writes_nothing_and_names_the_sites(tmp_path):
    facts = run_json("quantize", "tiny", *SMALL, "--ignore", "*.down_proj", "-o", tmp_path / "out", "--dry-run")
    assert len(facts["sites"]) == 30
    assert facts["sites"]["model.layers.0.mlp.up_proj"] == [384, 128]
    assert "model.layers.0.mlp.down_proj" in facts["dense"]
    assert facts["seconds"] > 0
    assert [cost["name"] for cost in facts["presets"] if cost["chosen"]] == ["balanced"]
    assert {cost["name"] for cost in facts["presets"]} == {"fast", "balanced", "best"}
    assert list(tmp_path.iterdir()) == []
    assert "model.layers.*.mlp.up_proj" in run("quantize", "tiny", *SMALL, "--dry-run")


def test_check_passes_and_a_fault_fails_it(output):
    path, _ = output
    assert run_json("check", path)["ok"] is True
    report = path / "report.json"
    text = report.read_text()
    try:
        report.write_text(text.replace('"quantized_parameters": ', '"quantized_parameters": 1'))
        result = CliRunner().invoke(app, ["check", str(path)])
        assert result.exit_code == 7
        assert "fault:" in result.stdout
    finally:
        report.write_text(text)


def test_check_against_the_original(output):
    path, _ = output
    result = run_json("check", path, "--against", "tiny", "--windows", 4, "--seqlen", 128)
    assert result["ok"] is True
    assert 0 < result["facts"]["kl"] < 0.5


def test_evaluate(output):
    path, _ = output
    flags = ["--text", "embedded-test", "--seqlen", 128, "--windows", 4]
    dense, packed = (run_json("evaluate", model, *flags) for model in ("tiny", path))
    assert dense["tokens"] == packed["tokens"] == 4 * 127
    assert dense["perplexity"] < packed["perplexity"] < 2 * dense["perplexity"]
    assert f"{packed['perplexity']:.4f}" in run("evaluate", path, *flags)


def test_generate(output):
    path, _ = output
    flags = ["--prompt", "Mira of Nethby", "--tokens", 12]
    text = run_json("generate", path, *flags)["text"]
    assert len(text) > 5
    assert run("generate", path, *flags) == f"Mira of Nethby{text}\n"


@pytest.mark.parametrize(
    ("what", "row"),
    [
        ("methods", "omniquant"),
        ("methods", "distill"),
        ("presets", "balanced"),
        ("models", "llama-7b"),
        ("calibrations", "default"),
        ("formats", "compressed-tensors"),
    ],
)
def test_list(what, row):
    rows = run_json("list", what)[what]
    assert row in [next(iter(entry.values())) for entry in rows]
    assert row in run("list", what)


def test_help_is_fast_and_complete():
    program = "import sys, quantkit.cli; assert 'torch' not in sys.modules, 'help waits for torch'"
    subprocess.run([sys.executable, "-c", program], check=True)
    for command in ("quantize", "check", "evaluate", "generate", "list"):
        assert command in run("--help")
        assert "--json" in run(command, "--help")


def test_a_process_prints_json_and_nothing_else(tmp_path):
    command = [
        sys.executable,
        "-m",
        "quantkit",
        "quantize",
        "tiny",
        *SMALL,
        "--method",
        "rtn",
        "-o",
        tmp_path / "o",
        "--json",
    ]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": "default"}
    )
    assert json.loads(done.stdout)["method"] == "rtn"
    assert done.stderr == ""


def test_python_does_the_same_as_the_command_line(output, tmp_path):
    path, _ = output
    result = quantkit.quantize(
        "tiny",
        wbits=3,
        group_size=32,
        calibration="embedded",
        samples=2,
        seqlen=32,
        options={"updates": 2, "distill.updates": 2},
        output=tmp_path / "o",
    )
    assert result.report["sha256"] == json.loads((path / "report.json").read_text())["sha256"]


@pytest.mark.parametrize(
    ("sent", "times", "lines"), [(signal.SIGINT, 2, 2), (signal.SIGTERM, 1, 1)], ids=["Ctrl-C twice", "terminate"]
)
def test_an_interrupted_run_leaves_nothing_behind(tmp_path, sent, times, lines):
    command = ["quantize", "tiny", *SMALL, "--updates", "100000", "-o", tmp_path / "out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "quantkit", *command],
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background jobs ignore Ctrl-C, and their children would too
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:  # the hidden directory: calibration has begun
        time.sleep(0.05)
    time.sleep(0.5)
    for _ in range(times):
        process.send_signal(sent)
        time.sleep(0.5)
    said = process.communicate(timeout=60)[1].splitlines()
    assert (len(said), said[-1]) == (lines, "error: interrupted; nothing was written")
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


def test_a_target_is_shown_before_and_after(tmp_path):
    target = ["quantize", "tiny", *SMALL, "--method", "rtn", "--target-bpw", "3.5"]
    facts = run_json(*target, "--dry-run")
    assert (facts["target_bpw"], facts["bits_per_weight"]) == (3.5, 3.5)
    shown = run(*target, "--dry-run")
    assert "at most 3.50 bits per weight" in shown
    assert "mixed 2-8 bit" in shown
    picture = run(*target, "-o", tmp_path / "out").splitlines()
    (header,) = (number for number, line in enumerate(picture) if "blocks 0 to 4" in line)
    for line, group in zip(picture[header + 1 :], ("attention", "output", "mlp", "down"), strict=False):
        name, digits, _ = line.split()
        assert name == group
        assert len(digits) == 5
        assert set(digits) <= set("234568")
    assert run_json("check", tmp_path / "out")["ok"]
    assert "perplexity" in run("evaluate", tmp_path / "out", "--text", "embedded-test", "--seqlen", 64, "--windows", 1)
