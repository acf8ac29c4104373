"""Formats on the command line: with a run, after it, and what cannot be."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from quantkit.cli import app
from quantkit.methods import names

FEW = ["--method", "rtn", "--group-size", "32", "--samples", 1, "--seqlen", 16, "--device", "cpu"]


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "out"
    return path, run("quantize", "tiny", *FEW, "--wbits", 4, "--format", "gptq, awq", "-o", path)


@pytest.fixture
def output(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "out", ignore=shutil.ignore_patterns("gptq", "awq"))


def test_one_run_writes_several_formats_and_says_so(made):
    path, printed = made
    assert (path / "gptq" / "config.json").exists()
    assert (path / "awq" / "config.json").exists()
    assert "also as gptq, also as awq" in printed
    assert "transformers loads AWQ only where" in printed


def test_the_formats_of_a_run_are_in_its_json(tmp_path):
    printed = run("quantize", "tiny", *FEW, "--wbits", 8, "--format", "gptq", "--json", "-o", tmp_path / "out")
    assert json.loads(printed)["formats"] == ["gptq"]


def test_a_dry_run_tells_what_runtimes_will_not_do(tmp_path):
    printed = run("quantize", "tiny", *FEW, "--wbits", 3, "--format", "gptq", "--dry-run", "-o", tmp_path / "out")
    assert "asymmetric 3-bit" in printed
    assert not list(tmp_path.iterdir())


def test_export_says_what_it_wrote_where(output, tmp_path):
    found = json.loads(run("export", output, "--format", "gptq,awq", "--json"))["exports"]
    assert [entry["format"] for entry in found] == ["gptq", "awq"]
    assert [entry["output"] for entry in found] == [str(output / "gptq"), str(output / "awq")]
    assert all(entry["bytes"] > 500_000 and entry["notices"] for entry in found)
    printed = run("export", output, "--format", "gptq", "-o", tmp_path / "there", "--set", "version=1")
    assert printed.startswith(f"gptq: {tmp_path / 'there'}, ")
    assert "note: vLLM and SGLang load symmetric 4- and 8-bit GPTQ only" in printed


def test_an_export_is_replaced_when_asked(output):
    run("export", output, "--format", "awq")
    assert "choose another -o, or replace it with --overwrite" in run("export", output, "--format", "awq", code=6)
    run("export", output, "--format", "awq", "--overwrite")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "gptk"], "unknown format 'gptk' (did you mean gptq?)"),
        (["--format", "gptq,awq", "-o", "x"], "is the place of one format, not of 2"),
        (["--format", "gptq", "--set", "version=7"], "is 1 or 2, not 7"),
        ([], "--format"),
    ],
)
def test_what_cannot_be_exported_is_one_line(output, arguments, words):
    message = run("export", output, *arguments, code=2)
    assert words in message
    assert message.strip().count("\n") == 0


def test_an_unknown_format_of_a_run_lists_those_that_are(tmp_path):
    message = run("quantize", "tiny", *FEW, "--format", "zzz", "-o", tmp_path / "out", code=2)
    assert f"unknown format 'zzz' (known: {', '.join(names('exporters'))})" in message


def test_all_formats_are_listed():
    rows = json.loads(run("list", "formats", "--json"))["formats"]
    assert {"awq", "compressed-tensors", "gptq"} <= {row["format"] for row in rows}
