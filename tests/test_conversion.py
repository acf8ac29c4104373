"""Further formats hold exactly what was calibrated, in one run with it or afterwards, and harm nothing beside them."""

import json
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from families import FAMILIES, save_tiny, save_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import quantkit
from quantkit import conversion
from quantkit.core.scheme import QuantScheme
from quantkit.errors import ModelError, OutputError, UsageError
from quantkit.evaluation.loading import load_model
from quantkit.exporters.awq import AWQFormat
from quantkit.exporters.compressed_tensors import CompressedTensors
from quantkit.exporters.gptq import GPTQFormat
from quantkit.model.checkpoint import Checkpoint
from quantkit.model.writer import Shards

FEW = {"method": "rtn", "samples": 1, "seqlen": 16, "device": "cpu"}
LINEAR = "model.layers.1.mlp.down_proj"


def quantize(output, text="w4g32", **fields):
    scheme = QuantScheme.parse(text)
    kind = {"wbits": scheme.bits, "group_size": scheme.group_size, "symmetric": scheme.symmetric}
    return quantkit.quantize(fields.pop("model", "tiny"), output=output, **kind, **FEW, **fields)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The embedded model in three formats from one run, not to be changed."""
    return quantize(tmp_path_factory.mktemp("formats") / "out", formats=["gptq", "awq"], ignore=["*.0.*.q_proj"])


@pytest.fixture
def output(made, tmp_path):
    """A copy of the packed checkpoint alone."""
    return shutil.copytree(made.output, tmp_path / "copy", ignore=shutil.ignore_patterns("gptq", "awq"))


def weight(directory, exporter, ends, scheme="w4g32", linear=LINEAR):
    checkpoint = Checkpoint(directory)
    stored = {end: f"{linear}.{end}" for end in ends if f"{linear}.{end}" in checkpoint}
    tensors = checkpoint.load(stored.values())
    return exporter.decode({end: tensors[name] for end, name in stored.items()}, QuantScheme.parse(scheme))


def same(first, second):
    return torch.equal(first.codes, second.codes) and torch.equal(first.dequantize(), second.dequantize())


def test_one_run_writes_all_formats_of_the_same_codes(made):
    expected = weight(made.output, CompressedTensors(), conversion._ENDS)
    assert same(weight(made.formats["gptq"], GPTQFormat(), GPTQFormat.ends), expected)
    assert same(weight(made.formats["awq"], AWQFormat(), AWQFormat.ends), expected)
    assert made.report["formats"] == ["gptq", "awq"]


def test_everything_else_is_what_it_was(made):
    for directory in made.formats.values():
        original, found = Checkpoint(made.output), Checkpoint(directory)
        dense = [name for name in original if name.rpartition(".")[2] in ("weight", "bias")]
        assert dense == [name for name in found if name.rpartition(".")[2] in ("weight", "bias")]
        pairs = [(original.load([name])[name], found.load([name])[name]) for name in dense]
        assert pairs
        assert all(torch.equal(*pair) for pair in pairs)


def test_what_lies_beside_the_weights_comes_along(made):
    for directory in made.formats.values():
        names = {path.name for path in directory.iterdir()}
        assert {"config.json", "recipe.toml", "tokenizer.json", "generation_config.json"} <= names
        assert not {"report.json", "check.json", "gptq", "awq"} & names


def test_config_is_that_of_the_model_but_for_its_quantization(made):
    main, *others = (json.loads((path / "config.json").read_text()) for path in (made.output, *made.formats.values()))
    methods = [config.pop("quantization_config") for config in (main, *others)]
    assert others == [main, main]
    assert [method["quant_method"] for method in methods] == ["compressed-tensors", "gptq", "awq"]
    assert methods[2]["modules_to_not_convert"] == ["model.layers.0.self_attn.q_proj", "lm_head"]


def test_the_checks_of_an_output_do_not_see_its_other_formats(made):
    assert quantkit.check(made.output, device="cpu").faults == ()


def test_the_runtime_computes_the_same_from_every_format(made):
    tokens = torch.randint(3, 1000, (1, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, *found = (
            quantkit.load(path, device="cpu")(input_ids=tokens).logits for path in (made.output, *made.formats.values())
        )
    assert all(torch.equal(logits, expected) for logits in found)


def test_exporting_later_writes_the_same_bytes(made, output):
    again = quantkit.export(output, format="gptq")
    assert again.output == output / "gptq"
    for path in sorted(made.formats["gptq"].iterdir()):
        assert (again.output / path.name).read_bytes() == path.read_bytes()
    assert again.bytes == sum(path.stat().st_size for path in again.output.iterdir())
    assert any("vLLM and SGLang load symmetric" in line for line in again.notices)


def test_a_recipe_remembers_its_formats(made, tmp_path):
    recipe = quantkit.make_recipe("tiny", formats=["awq"])
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml())
    assert type(recipe).from_toml(path).formats == recipe.formats == ("awq",)
    assert 'formats = [\n    "gptq",\n    "awq",\n]' in (made.output / "recipe.toml").read_text()


def test_memory_holds_no_more_than_a_shard(output, monkeypatch):
    waiting, flush = [], Shards.flush

    def watched(shards):
        waiting.append(len(shards._pending))
        flush(shards)

    monkeypatch.setattr(Shards, "flush", watched)
    quantkit.export(output, format="awq")
    largest = max(len(load_file(path)) for path in (output / "awq").glob("*.safetensors"))
    assert len(list((output / "awq").glob("*.safetensors"))) == len(list(output.glob("*.safetensors"))) > 4
    assert max(waiting) == largest < 40


def test_a_format_that_is_one_file_appears_whole_or_not(output, tmp_path, monkeypatch):
    made = quantkit.export(output, format="gguf")
    assert [path.name for path in made.output.iterdir()] == ["model.gguf"]
    with pytest.raises(OutputError, match="gguf exists"):
        quantkit.export(output, format="gguf")
    assert quantkit.check(output, device="cpu").faults == ()
    monkeypatch.setattr("quantkit.exporters.gguf._write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantkit.export(output, format="gguf", to=tmp_path / "there")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_codes_that_are_stored_as_bytes_become_a_file_of_bytes(tmp_path):
    integer = {"symmetric": True, "abits": 8, "symmetric_activations": True, "formats": ["gguf"]}
    made = quantkit.quantize("tiny", output=tmp_path / "out", wbits=8, group_size=None, **integer, **FEW)
    tokens = torch.randint(3, 1000, (1, 16), generator=torch.Generator().manual_seed(0))
    file = AutoModelForCausalLM.from_pretrained(made.formats["gguf"], gguf_file="model.gguf", dtype=torch.float32)
    packed, _ = load_model(made.output, device="cpu", activations=False)
    with torch.no_grad():
        found, expected = (model(input_ids=tokens).logits for model in (file, packed))
    assert (found - expected).norm() < 0.005 * expected.norm()  # it does not round the product to 16 bits


def test_options_of_a_format(output, tmp_path):
    made = quantkit.export(output, format="gptq", to=tmp_path / "v2", options={"version": 2})
    config = json.loads((made.output / "config.json").read_text())["quantization_config"]
    assert config["checkpoint_format"] == "gptq_v2"
    with pytest.raises(UsageError, match="gptq has no option 'verzion' \\(did you mean version"):
        quantkit.export(output, format="gptq", options={"verzion": 2})
    with pytest.raises(UsageError, match="awq has no option 'version'"):
        quantkit.export(output, format="awq", options={"version": 2})


def test_a_zero_point_that_version_1_cannot_hold_leaves_nothing(output):
    with pytest.raises(UsageError, match=r"model\.layers\..*: version 1 of GPTQ stores zero points minus one"):
        quantkit.export(with_zero_point(output, -8), format="gptq", options={"version": 1})
    assert not [path for path in output.iterdir() if "gptq" in path.name]


def with_zero_point(output, value):
    """Give the first linear zero points that are all `value`."""
    name = next(name for name in Checkpoint(output) if name.endswith("weight_zero_point"))
    shard = Checkpoint(output).tensors[name].shard
    tensors = load_file(shard)
    tensors[name] = torch.full_like(tensors[name], (value + 8) * 0x11111111)
    save_file(tensors, shard)
    return output


def test_an_output_that_exists_is_kept_unless_asked(output):
    first = quantkit.export(output, format="awq").output
    (first / "mine").write_text("")
    with pytest.raises(OutputError, match="awq exists; choose another -o"):
        quantkit.export(output, format="awq")
    assert (first / "mine").exists()
    quantkit.export(output, format="awq", overwrite=True)
    assert not (first / "mine").exists()


@pytest.mark.parametrize("place", [".", ".."])
def test_the_checkpoint_that_is_read_is_never_replaced(output, place):
    with pytest.raises(OutputError, match="holds the checkpoint that is being read"):
        quantkit.export(output, format="awq", to=output / place, overwrite=True)
    assert Checkpoint(output)


@pytest.mark.parametrize(
    ("text", "formats", "reason"),
    [
        ("w3g32", ["awq"], "AWQ holds 4 bits, not 3"),
        ("w3g32", ["gguf"], "GGUF cannot hold w3a16g32"),
        ("w5g32", ["gptq"], "GPTQ holds 2, 3, 4 or 8 bits, not 5"),
        ("w4g32", ["gptq", "awk"], "unknown format 'awk'"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_before_anything_is_computed(tmp_path, monkeypatch, text, formats, reason):
    monkeypatch.setattr("quantkit.pipeline.Engine.run", lambda *_: pytest.fail("it computes"))
    with pytest.raises(UsageError, match=reason):
        quantize(tmp_path / "out", text, formats=formats)
    with pytest.raises(UsageError, match=reason):
        quantkit.plan("tiny", wbits=int(text[1]), group_size=32, formats=formats, **FEW)
    assert not (tmp_path / "out").exists()


def test_a_budget_of_bits_is_several_schemes(tmp_path):
    with pytest.raises(UsageError, match="GPTQ holds one scheme"):
        quantkit.plan("tiny", target_bpw=4.0, group_size=32, formats=["gptq"], **FEW)


def test_linears_that_are_stored_transposed_are_refused(tmp_path):
    save_tiny("gpt2", tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    with pytest.raises(UsageError, match="stored transposed"):
        quantize(tmp_path / "out", model=tmp_path / "model", formats=["gptq"])
    plain = quantize(tmp_path / "out", model=tmp_path / "model").output
    with pytest.raises(UsageError, match="stored transposed"):
        quantkit.export(plain, format="awq")


def test_shapes_that_do_not_fill_words_are_named_in_the_plan(tmp_path):
    narrow = deepcopy(FAMILIES["llama"])
    narrow.intermediate_size = 80
    save_tiny("llama", tmp_path / "model", config=narrow)
    save_tokenizer(tmp_path / "model")
    with pytest.raises(UsageError, match=r"layers\.0\.mlp\.\w+_proj: GPTQ packs whole 32-bit words"):
        quantize(tmp_path / "out", "w3g16", model=tmp_path / "model", formats=["gptq"])


def test_rows_that_blocks_of_a_file_do_not_fill_are_named_in_the_plan(tmp_path):
    narrow = deepcopy(FAMILIES["llama"])
    narrow.intermediate_size = 80
    save_tiny("llama", tmp_path / "model", config=narrow)
    save_tokenizer(tmp_path / "model")
    with pytest.raises(UsageError, match=r"rows of 80 weights in .*down_proj are no whole blocks of 32"):
        quantize(tmp_path / "out", "w4", model=tmp_path / "model", formats=["gguf"])


def test_the_plan_tells_what_runtimes_will_not_do():
    notes = quantkit.plan("tiny", wbits=3, group_size=32, formats=["gptq"], **FEW).notes
    assert any("not these asymmetric 3-bit weights" in note for note in notes)
    assert not any("GPTQ" in note for note in quantkit.plan("tiny", wbits=3, group_size=32, **FEW).notes)


def test_what_it_is_already_is_refused(output):
    with pytest.raises(UsageError, match="is compressed-tensors already; name another format: awq, "):
        quantkit.export(output, format="compressed-tensors")


@pytest.mark.parametrize("config", [None, "{}", '{"quantization_config": {"quant_method": "gptq"}}', "no"])
def test_what_is_not_packed_by_quantkit_is_refused(tmp_path, config):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError, match="is no packed checkpoint that quantkit wrote"):
        quantkit.export(tmp_path, format="awq")


def test_damage_is_named_and_nothing_is_left(output):
    shard = Checkpoint(output).tensors[f"{LINEAR}.weight_scale"].shard
    tensors = load_file(shard)
    tensors[f"{LINEAR}.weight_scale"][0, 0] = float("nan")
    save_file(tensors, shard)
    with pytest.raises(ModelError, match=f"{LINEAR} in .* has scales that are not finite"):
        quantkit.export(output, format="awq")
    tensors.pop(f"{LINEAR}.weight_packed")
    save_file(tensors, shard)
    with pytest.raises(ModelError, match="weight_packed"):
        quantkit.export(output, format="awq")
    assert not [path for path in Path(output).iterdir() if "awq" in path.name]
