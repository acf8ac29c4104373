"""Bad input gets one clear line, the right exit code, and nothing written or lost."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from quantkit.cli import app
from quantkit.resources import data_dir

RTN = ["--method", "rtn", "--group-size", "32"]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(tmp_path):
    """A copy of the embedded model that a test may damage."""
    directory = tmp_path / "model"
    shutil.copytree(data_dir("model_zoo") / "tiny", directory)
    return directory


@pytest.fixture
def refused(tmp_path):
    """Run a command that must fail; return its one line."""

    def run(code, *arguments):
        before = snapshot(tmp_path)
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == code, result.output
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ")
        assert snapshot(tmp_path) == before
        as_json = CliRunner().invoke(app, [*map(str, arguments), "--json"])
        assert json.loads(as_json.stdout) == {"error": line.removeprefix("error: "), "exit_code": code}
        return line

    return run


def snapshot(directory: Path) -> dict[str, int]:
    return {str(path.relative_to(directory)): path.lstat().st_size for path in sorted(directory.rglob("*"))}


def shards(model: Path, **changes: torch.Tensor) -> None:
    """Write the model again in two shards with an index, some tensors changed."""
    tensors = load_file(model / "model.safetensors") | changes
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, model / file)
    placement = {name: file for file, part in parts.items() for name in part}
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placement}))


# --- names and options


@pytest.mark.parametrize(
    ("code", "arguments", "words"),
    [
        pytest.param(3, ["llama-7", "-o", "x"], ["llama-7b", "org/name"], id="alias"),
        pytest.param(3, ["./no-such-directory", "-o", "x"], ["no-such-directory", "does not exist"], id="directory"),
        pytest.param(2, ["tiny", "--method", "omniquan", "-o", "x"], ["did you mean omniquant"], id="method"),
        pytest.param(2, ["tiny", "--wbits", "9", "-o", "x"], ["2 to 8, not 9"], id="bits above"),
        pytest.param(2, ["tiny", "--wbits", "1", "-o", "x"], ["2 to 8, not 1"], id="bits below"),
        pytest.param(2, ["tiny", "--target-bpw", "2", "-o", "x"], ["2.125", "at least 2.125"], id="target below"),
        pytest.param(2, ["tiny", "--target-bpw", "9", "-o", "x"], ["8.125", "--wbits 8"], id="target above"),
        pytest.param(2, ["tiny", "--target-bpw", "3", "--wbits", "3", "-o", "x"], ["give one"], id="target and bits"),
        pytest.param(
            2, ["tiny", "--target-bpw", "3", "--asymmetric"], ["--asymmetric", "zero points"], id="asymmetric"
        ),
        pytest.param(2, ["tiny", "--abits", "9", "-o", "x"], ["2 to 8, or 16 for none, not 9"], id="activation bits"),
        pytest.param(2, ["tiny", "--kv-bits", "1", "-o", "x"], ["kv bits", "not 1"], id="bits of keys and values"),
        pytest.param(2, ["tiny", "--symmetric-activations", "-o", "x"], ["give their bits"], id="no activations"),
        pytest.param(2, ["tiny", "--group-size", "48", "-o", "x"], ["width 128", "16, 32, 64, 128"], id="group size"),
        pytest.param(2, ["tiny", "--group-size", "many", "-o", "x"], ["channel"], id="group size word"),
        pytest.param(2, ["tiny", "--ignore", "*.w_proj", "-o", "x"], ["'*.w_proj'", "model.layers.0"], id="glob"),
        pytest.param(2, ["tiny", "--ignore", "*", "-o", "x"], ["nothing is left"], id="glob for all"),
        pytest.param(2, ["tiny", "--seqlen", "4096", "-o", "x"], ["4096", "256"], id="context"),
        pytest.param(2, ["tiny", "--samples", "0", "-o", "x"], ["samples", "0"], id="samples"),
        pytest.param(2, ["tiny", "--updates", "-1", "-o", "x"], ["updates", "-1"], id="updates"),
        pytest.param(2, ["tiny", "--window", "0", "-o", "x"], ["window", "at least 1"], id="window"),
        pytest.param(2, ["tiny", *RTN, "--updates", "3", "-o", "x"], ["rtn", "updates"], id="option of another method"),
        pytest.param(2, ["tiny", "--preset", "fastest", "-o", "x"], ["did you mean fast"], id="preset"),
        pytest.param(2, ["tiny", *RTN, "--preset", "best"], ["--method rtn", "--preset best", "one"], id="both"),
        pytest.param(2, ["tiny", "--method", "distill", "-o", "x"], ["nothing rounds", "balanced"], id="no rounding"),
        pytest.param(2, ["tiny", "--updates", "ten", "-o", "x"], ["--updates", "integer", "--help"], id="no number"),
        pytest.param(2, ["tiny", "--presett", "best"], ["--presett", "--preset", "--help"], id="flag"),
        pytest.param(2, ["tiny", "--set", "updats=2"], ["(did you mean updates?)"], id="setting's name, twice there"),
        pytest.param(2, ["tiny", "--set", "alpha", "-o", "x"], ["NAME=VALUE", "'alpha'"], id="setting"),
        pytest.param(2, ["tiny", "--set", "alpha=two", "-o", "x"], ["alpha", "a number", "'two'"], id="value"),
        pytest.param(2, ["tiny", "--set", "alfa=1", "-o", "x"], ["did you mean alpha"], id="setting's name"),
        pytest.param(2, ["tiny", "--set", "distil.lr=1", "-o", "x"], ["did you mean distill"], id="pass"),
        pytest.param(
            2, ["tiny", "--updates", "2", "--set", "updates=3", "-o", "x"], ["updates is given twice"], id="twice"
        ),
        pytest.param(2, ["tiny", "--device", "abacus", "-o", "x"], ["abacus", "cpu"], id="device"),
        pytest.param(2, ["tiny", "--calibration", "embeded", "-o", "x"], ["did you mean embedded"], id="text"),
        pytest.param(4, ["tiny", "--calibration", "no.jsonl", "-o", "x"], ["no.jsonl"], id="text file"),
        pytest.param(2, ["tiny"], ["-o", "--dry-run"], id="no output"),
        pytest.param(2, ["-o", "x"], ["name a model"], id="no model"),
        pytest.param(2, ["tiny", "--revision", "main", "-o", "x"], ["revision"], id="revision of a directory"),
        pytest.param(2, ["--recipe", "no.toml", "-o", "x"], ["no.toml"], id="recipe file"),
    ],
)
def test_unusable_options_are_named(refused, monkeypatch, tmp_path, code, arguments, words):
    monkeypatch.chdir(tmp_path)
    line = refused(code, "quantize", *arguments)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("recipe", "word"),
    [
        pytest.param("model = ", "recipe", id="not TOML"),
        pytest.param('model = "tiny"\nsed = 1', "seed", id="unknown key"),
        pytest.param('model = "tiny"\n[scheme]\nbit = 3', "bits", id="unknown key of a table"),
        pytest.param('model = "tiny"\n[[passes]]\nmethod = "rtn"\nlr = 1', "lr", id="unknown hyper-parameter"),
        pytest.param('model = "tiny"\n[[passes]]\nmethod = "omniquant"\nupdates = "ten"', "omniquant", id="wrong kind"),
        pytest.param('model = "tiny"\nseed = "x"', "seed", id="wrong kind of a field"),
        pytest.param("seed = 1", "names no model", id="no model"),
    ],
)
def test_a_bad_recipe_is_refused(refused, tmp_path, recipe, word):
    file = tmp_path / "r.toml"
    file.write_text(recipe)
    assert word in refused(2, "quantize", "--recipe", file, "-o", tmp_path / "out")


# --- the checkpoint


def test_truncated_shard(refused, model, tmp_path):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "truncated" in refused(3, "quantize", model, *RTN, "-o", tmp_path / "out")


def test_missing_shard(refused, model, tmp_path):
    shards(model)
    (model / "b.safetensors").unlink()
    assert "b.safetensors" in refused(3, "quantize", model, *RTN, "-o", tmp_path / "out")


def test_no_weights(refused, model, tmp_path):
    (model / "model.safetensors").unlink()
    assert "model.safetensors" in refused(3, "quantize", model, *RTN, "-o", tmp_path / "out")


def test_pickled_weights(refused, model, tmp_path):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "save_pretrained" in refused(3, "quantize", model, *RTN, "-o", tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(refused, model, tmp_path, value):
    norm = load_file(model / "model.safetensors")["model.norm.weight"]
    norm[3] = value
    shards(model, **{"model.norm.weight": norm})
    assert "model.norm.weight" in refused(3, "quantize", model, *RTN, "-o", tmp_path / "out")


@pytest.mark.parametrize("file", ["../a.safetensors", "/etc/passwd", "c.safetensors", ""])
def test_index_that_leads_elsewhere(refused, model, tmp_path, file):
    shards(model)
    index = json.loads((model / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = file
    (model / INDEX).write_text(json.dumps(index))
    assert INDEX in refused(3, "quantize", model, *RTN, "-o", tmp_path / "out")


def test_missing_tensor(refused, model, tmp_path):
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors")
    assert "model.layers.2.mlp.up_proj.weight" in refused(3, "quantize", model, *RTN, "-o", tmp_path / "out")


def test_config_and_weights_of_different_models(refused, model, tmp_path):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    assert "shape" in refused(3, "quantize", model, *RTN, "-o", tmp_path / "out")


def test_model_that_is_quantized_already(refused, tiny_rtn_w4, tmp_path):
    assert "quantized already" in refused(3, "quantize", tiny_rtn_w4, *RTN, "-o", tmp_path / "out")


# --- the text


def test_short_text_says_how_much_there_is(refused, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("Mira goes to the market. " * 20)
    line = refused(4, "quantize", "tiny", *RTN, "--calibration", text, "--seqlen", "64", "-o", tmp_path / "out")
    assert "--allow-short" in line
    assert "sequences of 64 tokens, not 4" in line


def test_no_network_names_the_ways_out(refused, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    line = refused(5, "quantize", "tiny", "--group-size", "32", "-o", tmp_path / "out")
    assert all(word in line for word in ("allenai/c4", "--calibration embedded", "HF_ENDPOINT"))


# --- the output


def test_existing_output_is_kept(refused, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").write_text("data")
    assert "--overwrite" in refused(6, "quantize", "tiny", *RTN, "-o", output)


def test_output_that_holds_the_source(refused, model, tmp_path):
    assert "being read" in refused(6, "quantize", model, *RTN, "-o", model, "--overwrite")
    assert "being read" in refused(6, "quantize", model, *RTN, "-o", tmp_path, "--overwrite")


def test_too_small_a_disk_is_seen_before_anything_is_computed(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    assert "GB free" in refused(6, "quantize", "tiny", *RTN, "-o", tmp_path / "out")


def test_disk_that_fills_up_keeps_the_old_output(refused, monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")
    monkeypatch.setattr("quantkit.model.writer.save_file", full)
    assert "disk is full" in refused(6, "quantize", "tiny", *RTN, "-o", tmp_path / "out", "--overwrite")


# --- the other commands


@pytest.mark.parametrize(
    ("code", "arguments", "words"),
    [
        pytest.param(3, ["evaluate", "llama-7", "--text", "embedded-test"], ["llama-7b"], id="evaluate a model"),
        pytest.param(2, ["evaluate", "tiny", "--text", "wikitext"], ["wikitext2-test"], id="evaluate a text"),
        pytest.param(2, ["evaluate", "tiny", "--text", "embedded-test"], ["1024", "--seqlen 256"], id="context"),
        pytest.param(2, ["evaluate", "tiny", "--text", "embedded-test", "--windows", "0"], ["windows"], id="windows"),
        pytest.param(3, ["check", "."], ["report.json"], id="check no output"),
        pytest.param(3, ["generate", "./nowhere", "--prompt", "x"], ["nowhere"], id="generate"),
        pytest.param(2, ["quantise", "tiny"], ["quantise", "quantize"], id="command"),
        pytest.param(2, ["check"], ["output", "quantkit check --help"], id="argument"),
        pytest.param(2, ["list", "mehtods"], ["did you mean methods"], id="list"),
    ],
)
def test_other_commands(refused, monkeypatch, tmp_path, code, arguments, words):
    monkeypatch.chdir(tmp_path)
    line = refused(code, *arguments)
    assert all(word in line for word in words), line
