"""What is written loads without quantkit and computes what another unpacker says that it holds."""

import json
import subprocess
import sys

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.core.scheme import QuantScheme
from quantkit.errors import UsageError
from quantkit.exporters.compressed_tensors import CompressedTensors, schemes_of
from quantkit.model.checkpoint import Checkpoint
from quantkit.resources import data_dir

TINY = data_dir("model_zoo") / "tiny"
SCHEMES = {
    text: QuantScheme.parse(text) for text in ("w2g32", "w3s", "w3g64", "w4g128s", "w4", "w5g32s", "w8", "w8g64s")
}
EVERY = pytest.mark.parametrize("text", SCHEMES)
TOKENS = torch.randint(3, 1024, (2, 24), generator=torch.Generator().manual_seed(5))
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
tokens, *directories = sys.argv[1:]
ids = torch.load(tokens)
for directory in directories:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        torch.save(model(input_ids=ids, use_cache=False).logits, directory + ".logits")
assert "quantkit" not in sys.modules
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """The embedded model in every scheme, each loaded by transformers in a process without quantkit."""
    directory = tmp_path_factory.mktemp("exports")
    for text, scheme in SCHEMES.items():
        kind = {"wbits": scheme.bits, "group_size": scheme.group_size, "symmetric": scheme.symmetric}
        quantkit.quantize("tiny", output=directory / text, method="rtn", samples=1, seqlen=16, device="cpu", **kind)
    torch.save(TOKENS, directory / "tokens")
    arguments = [str(directory / "tokens"), *(str(directory / text) for text in SCHEMES)]
    subprocess.run([sys.executable, "-P", "-c", LOAD, *arguments], check=True, cwd=directory, timeout=300)
    return directory


def configuration(directory):
    return json.loads((directory / "config.json").read_text())["quantization_config"]


def unpacked(directory):
    """Return {site: dense weight} as compressed-tensors itself unpacks what was written."""
    (scheme,) = QuantizationConfig.model_validate(configuration(directory)).config_groups.values()
    checkpoint = Checkpoint(directory)
    sites = {}
    for name in checkpoint:
        site, _, end = name.rpartition(".")
        if end.startswith("weight_"):
            sites.setdefault(site, {})[end] = checkpoint.load([name])[name]
    return {s: PackedQuantizationCompressor.decompress(parts, scheme)["weight"] for s, parts in sites.items()}


@torch.no_grad()
def logits_of_dense_model(weights):
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    for site, weight in weights.items():
        model.get_submodule(site).weight.copy_(weight)
    return model(input_ids=TOKENS, use_cache=False).logits


@EVERY
def test_it_computes_what_the_dense_model_with_the_unpacked_weights_does(outputs, text):
    expected = logits_of_dense_model(unpacked(outputs / text))
    loaded = torch.load(outputs / f"{text}.logits")
    torch.testing.assert_close(loaded, expected, rtol=0, atol=1e-5)


@EVERY
def test_quantkit_reads_the_same_weights_as_compressed_tensors(outputs, text):
    checkpoint = Checkpoint(outputs / text)
    for site, weight in unpacked(outputs / text).items():
        ends = [name for name in checkpoint if name.startswith(f"{site}.weight_")]
        tensors = {name.removeprefix(f"{site}."): tensor for name, tensor in checkpoint.load(ends).items()}
        assert torch.equal(CompressedTensors().decode(tensors, SCHEMES[text]).dequantize(), weight)


def test_more_bits_come_closer_to_the_original(outputs):
    original = logits_of_dense_model({})
    error = {text: (torch.load(outputs / f"{text}.logits") - original).norm().item() for text in SCHEMES}
    assert error["w2g32"] > error["w4"] > error["w8"] > 0
    assert error["w3s"] > error["w4g128s"] > error["w5g32s"] > error["w8g64s"] > 0


@EVERY
def test_the_configuration_is_one_of_compressed_tensors(outputs, text):
    config = QuantizationConfig.model_validate(configuration(outputs / text))
    (group,) = config.config_groups.values()
    assert config.format == group.format == "pack-quantized"
    assert config.quantization_status == "compressed"
    assert (group.weights.num_bits, group.weights.symmetric) == (SCHEMES[text].bits, SCHEMES[text].symmetric)
    assert group.weights.strategy == ("group" if SCHEMES[text].group_size else "channel")
    assert group.weights.group_size == SCHEMES[text].group_size
    assert group.input_activations is None


@EVERY
def test_the_configuration_names_its_scheme(outputs, text):
    assert schemes_of(configuration(outputs / text)) == {"Linear": SCHEMES[text]}


def test_linears_that_stay_dense_are_named(tmp_path):
    ignored = "model.layers.0.self_attn.q_proj"
    few = {"samples": 1, "seqlen": 16, "group_size": 32, "device": "cpu"}
    output = quantkit.quantize("tiny", output=tmp_path / "out", method="rtn", ignore=[ignored], **few).output
    assert configuration(output)["ignore"] == [ignored, "lm_head"]
    weight = Checkpoint(output).load([f"{ignored}.weight"])[f"{ignored}.weight"]
    assert torch.equal(weight, Checkpoint(TINY).load([f"{ignored}.weight"])[f"{ignored}.weight"])
    loaded = AutoModelForCausalLM.from_pretrained(output, dtype=torch.bfloat16)
    assert torch.equal(loaded.get_submodule(ignored).weight, weight)


def test_several_schemes_with_zero_points_are_refused():
    symmetric = {"a": QuantScheme(bits=3, symmetric=True), "b": QuantScheme(bits=4, symmetric=True)}
    CompressedTensors().check(symmetric)
    with pytest.raises(UsageError, match="load only without zero points, but w2a16 has them"):
        CompressedTensors().check({**symmetric, "c": QuantScheme(bits=2)})


def test_several_schemes_are_one_group_each_in_the_eyes_of_compressed_tensors():
    schemes = {
        "m.0.a": QuantScheme(bits=3, symmetric=True),
        "m.0.b": QuantScheme(bits=4, group_size=32, symmetric=True),
    }
    schemes["m.1.a"] = schemes["m.0.a"]
    config = CompressedTensors().config(schemes, ["Linear"], ["lm_head"])
    assert schemes_of(config) == schemes
    groups = QuantizationConfig.model_validate(config).config_groups.values()
    assert [(group.targets, group.weights.num_bits) for group in groups] == [(["m.0.a", "m.1.a"], 3), (["m.0.b"], 4)]


def test_symmetry_is_a_matter_of_yes_or_no():
    config = CompressedTensors().config({"model.layers.0.a": QuantScheme(bits=4)}, ("Linear",), ())
    config["config_groups"]["group_0"]["weights"]["symmetric"] = [True]
    with pytest.raises(TypeError, match=r"symmetric is \[True\], neither true nor false"):
        schemes_of(config)
