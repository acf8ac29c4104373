"""`quantkit prune` and `quantkit quantize --prune`, as users type them."""

import json

import pytest
from families import save_tiny, save_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import quantkit
from quantkit.cli import app
from quantkit.evaluation.check import check
from quantkit.recipe import Recipe

TEXT = ["--calibration", "embedded", "--samples", "4", "--seqlen", "32", "--batch-size", "4"]


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


def test_a_pruned_model_is_loaded_by_plain_transformers_and_passes_its_check(tmp_path):
    said = run("prune", "tiny", "--method", "wanda", "--sparsity", "2:4", *TEXT, "-o", tmp_path / "out")
    assert "50.0% of the weights of 35 linears" in said
    assert "if z" in said  # what packs the files, zlib or zstd
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert not hasattr(model.config, "quantization_config")
    weight = model.model.layers[0].mlp.up_proj.weight
    assert ((weight.view(len(weight), -1, 4) == 0).sum(-1) == 2).all()
    assert "ok:" in run("check", tmp_path / "out")


def test_a_recipe_repeats_the_run(tmp_path):
    run(
        "prune",
        "tiny",
        "--method",
        "sparsegpt",
        "--sparsity",
        "0.3",
        "--exclude",
        "*.down_proj",
        *TEXT,
        "-o",
        tmp_path / "a",
    )
    recipe = Recipe.from_toml(tmp_path / "a" / "recipe.toml")
    assert recipe.dense
    assert recipe.passes["sparsegpt"]["exclude"] == ["*.down_proj"]
    run("prune", "--recipe", tmp_path / "a" / "recipe.toml", "-o", tmp_path / "b")
    a, b = (json.loads((tmp_path / name / "report.json").read_text()) for name in "ab")
    assert a["sha256"] == b["sha256"]
    assert len(a["sparsity"]["linears"]) == 30


def test_pruning_and_quantizing_in_one_run(tmp_path):
    arguments = ["--prune", "sparsegpt", "--sparsity", "0.5", "--preset", "fast", "--group-size", "32", *TEXT]
    said = run("quantize", "tiny", *arguments, "-o", tmp_path / "out")
    assert "w4a16g32 by sparsegpt + gptq" in said
    assert "50.0% of the weights of 35 linears" in said
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["sparsity"]["share"] == 0.5
    assert check(tmp_path / "out").facts["zeros"] >= 0.5 * report["quantized_parameters"]


def test_a_preset_keeps_the_pruner_of_a_recipe():
    recipe = quantkit.make_recipe("tiny", preset="balanced", prune="wanda", options={"sparsity": "2:4"})
    assert [*recipe.passes] == ["wanda", "omniquant", "distill"]
    joint = quantkit.make_recipe("tiny", method="rtn", prune="sparsegpt", options={"joint": True})
    assert [*joint.passes] == ["sparsegpt", "rtn"]
    assert joint.calibration.samples == 128  # rtn alone would take 4


def test_the_plan_says_what_is_pruned(tmp_path):
    said = run("prune", "tiny", "--sparsity", "4:8", "--dry-run")
    assert "4:8 of 35 linears" in said
    assert "presets" not in json.loads(run("prune", "tiny", "--dry-run", "--json"))["scheme"]
    assert run("list", "pruners").count("\n") >= 6


def test_a_pruned_output_that_was_refilled_fails_its_check(tmp_path):
    run("prune", "tiny", "--method", "magnitude", "-o", tmp_path / "out")
    (shard,) = [
        path
        for path in (tmp_path / "out").glob("*.safetensors")
        if "model.layers.0.mlp.up_proj.weight" in load_file(path)
    ]
    tensors = load_file(shard)
    tensors["model.layers.0.mlp.up_proj.weight"] += 0.01
    save_file(tensors, shard, metadata={"format": "pt"})
    faults = " ".join(check(tmp_path / "out").faults)
    assert "model.layers.0.mlp.up_proj has 0 weights that are zero, but" in faults
    config = tmp_path / "out" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {}}))
    assert "it has a quantization_config" in " ".join(check(tmp_path / "out").faults)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "mfac", "random-graph"])
def test_linears_of_every_kind_are_pruned(family, method, tmp_path):
    save_tiny(family, tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    small = {"mfac": {"gradients": 8, "block": 8, "recomputations": 2}}.get(method, {})
    text = {"calibration": "embedded", "samples": 2, "seqlen": 16}
    done = quantkit.prune(
        tmp_path / "model", method=method, sparsity="2:4", options=small, output=tmp_path / "out", device="cpu", **text
    )
    stored = {n: w for path in (tmp_path / "out").glob("*.safetensors") for n, w in load_file(path).items()}
    for name, facts in done.report["sparsity"]["linears"].items():
        weight = next(w for n, w in stored.items() if n.endswith(f"{name.partition('.')[2]}.weight"))
        weight = weight.T if family == "gpt2" else weight
        assert ((weight.reshape(len(weight), -1, 4) == 0).sum(-1) >= 2).all(), name
        assert facts["zeros"] == weight.numel() // 2
    assert check(tmp_path / "out").faults == ()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sparsity", "1"], "from 0 to below 1, not 1; give 0.5"),
        (["--sparsity", "4:4"], "must be at least 1 and below M"),
        (["--sparsity", "2:5"], "2:5 needs rows of a multiple of 5 inputs"),
        (["--method", "wandaa"], "unknown method 'wandaa' (did you mean wanda?)"),
        (["--method", "gptq"], "unknown method 'gptq'"),
        (["--include", "*.nothing"], "--include '*.nothing' matches no linear"),
        (["--exclude", "*"], "leaves nothing to prune"),
        (["--allocation", "best"], "allocation in the method sparsegpt must be one of uniform, magnitude, loss, mfac"),
        (["--allocation", "loss", "--sparsity", "2:4"], "is the same share of every few weights"),
        (["--recover", "-1"], "recover is a number of updates, not -1"),
        (["--set", "bock=3"], "has no 'bock' (did you mean block?)"),
    ],
)
def test_bad_input_gets_one_line(arguments, says, tmp_path):
    (line,) = run("prune", "tiny", *arguments, "-o", tmp_path / "out", code=2).splitlines()
    assert says in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--method", "wanda"], "nothing rounds: wanda prunes; use quantkit prune, or --prune wanda"),
        (["--sparsity", "0.5", "--method", "rtn"], "has no 'sparsity', which is one of magnitude and mfac"),
        (["--prune", "sparsegpt", "--set", "joint=true"], "rounds by itself; use --method rtn, not omniquant"),
        (["--prune", "rtn"], "unknown method 'rtn'"),
    ],
)
def test_quantize_refuses_what_does_not_go_together(arguments, says, tmp_path):
    (line,) = run("quantize", "tiny", *arguments, "-o", tmp_path / "out", code=2).splitlines()
    assert says in line


def test_a_recipe_that_quantizes_is_not_one_of_prune(tmp_path):
    (tmp_path / "r.toml").write_text('model = "tiny"\n')
    (line,) = run("prune", "--recipe", tmp_path / "r.toml", "-o", tmp_path / "out", code=2).splitlines()
    assert "is a recipe that quantizes; use quantkit quantize" in line
