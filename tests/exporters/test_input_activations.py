"""What an output asks runtimes to do with activations, what transformers does with it, and what the user is told."""

import json

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from families import save_tiny, save_tokenizer
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.core.scheme import QuantScheme
from quantkit.evaluation.loading import load_model
from quantkit.exporters.compressed_tensors import CompressedTensors, schemes_of, weights_only

TOKENS = torch.randint(3, 100, (2, 24), generator=torch.Generator().manual_seed(5))
FEW = {"method": "rtn", "group_size": 32, "samples": 1, "seqlen": 16, "device": "cpu"}
DENSE = {"dequantize": True}
TOKEN = {"type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def config_of(text, classes=("Linear",)):
    return CompressedTensors().config({"a": QuantScheme.parse(text)}, classes, ["lm_head"])


def notices(text, classes=("Linear",)):
    return list(CompressedTensors().notices({"a": QuantScheme.parse(text)}, classes))


@pytest.mark.parametrize(
    ("text", "classes", "bits", "dequantize"),
    [
        ("w4a8g128", ["Linear"], 8, True),
        ("w4a4", ["Linear"], 4, True),
        ("w4a8g128s", ["Linear"], 8, False),
        ("w4as4s", ["Linear"], 4, False),
        ("w4a8s", ["FalconLinear"], 8, True),
        ("w4a8s", ["Conv1D"], 8, True),
        ("w6a6", ["Linear"], None, True),
        ("w6a6s", ["Linear"], None, True),
        ("w4kv4s", ["Linear"], None, True),
        ("w4s", ["Linear"], None, True),
    ],
)
def test_only_what_runtimes_know_is_asked_for(text, classes, bits, dequantize):
    config = config_of(text, classes)
    (group,) = config["config_groups"].values()
    assert group["input_activations"] == (bits and TOKEN | {"num_bits": bits})
    assert config.get("dequantize", False) is dequantize
    assert group["targets"] == (["Conv1D"] if classes == ["Conv1D"] else ["Linear"])
    parsed = QuantizationConfig.model_validate(config)
    assert (parsed.config_groups["group_0"].input_activations is not None) == bool(bits)


@pytest.mark.parametrize("text", ["w4a16g128", "w4a8kv4g128s", "w6as6", "w3kv8", "w8as8s"])
def test_the_whole_scheme_is_kept_under_our_own_key(text):
    config = json.loads(json.dumps(config_of(text)))
    assert config["quantkit"] == {"scheme": str(QuantScheme.parse(text))}
    assert schemes_of(config) == {"Linear": QuantScheme.parse(text)}


def test_an_output_without_our_key_is_weights_alone():
    config = config_of("w4g128s")
    del config["quantkit"]
    assert schemes_of(config) == {"Linear": QuantScheme.parse("w4g128s")}


def test_weights_only_changes_nothing_else():
    config = config_of("w4as8s")
    plain = weights_only(config)
    assert plain["config_groups"]["group_0"] == config["config_groups"]["group_0"] | {"input_activations": None}
    assert plain == config | DENSE | {"config_groups": plain["config_groups"]}
    assert config["config_groups"]["group_0"]["input_activations"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("w4g128", []),
        ("w4as8s", ["queries, keys and values"]),
        ("w4a8s", ["--symmetric-activations", "queries, keys and values"]),
        ("w4as8", ["transformers will not quantize activations", "queries, keys and values"]),
        ("w4a4", ["transformers will not", "--symmetric-activations", "queries, keys and values"]),
        ("w6a6s", ["no runtime quantizes activations to 6 bits", "queries, keys and values"]),
        ("w4kv4", ["that keys and values are quantized"]),
    ],
)
def test_whatever_is_not_carried_is_told_one_line_each(text, words):
    found = notices(text)
    assert len(found) == len(words) + bool(words)
    assert all(word in line for word, line in zip(words, found, strict=False)), found
    assert all("evaluate" in line for line in found[-1:])


def test_a_remedy_is_offered_only_where_it_helps():
    assert "with --symmetric both will" in notices("w4as8")[0]
    assert "with --symmetric both will" not in notices("w4as8s", ["Conv1D"])[0]


def quantize_as_compressed_tensors(values, bits):
    """Round per token with the step of compressed-tensors' symmetric quantization: max |x| / ((2^N - 1) / 2)."""
    step = values.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)
    return (values / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step


@torch.no_grad()
def logits_of(directory, **config):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **config)(input_ids=TOKENS).logits


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
def test_transformers_quantizes_the_inputs_of_symmetric_linears(tmp_path, bits):
    fields = {"symmetric": True, "symmetric_activations": True, "abits": bits}
    output = quantkit.quantize("tiny", output=tmp_path / "out", wbits=4, **fields, **FEW).output
    loaded = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    found = loaded(input_ids=TOKENS).logits  # unpacks the weights
    dense, _ = load_model(output, device="cpu", activations=False)
    plain = dense(input_ids=TOKENS).logits
    for name, linear in dense.named_modules():
        if isinstance(linear, torch.nn.Linear) and name != "lm_head":
            # on this path the scale's product is not rounded to its dtype again
            torch.testing.assert_close(loaded.get_submodule(name).weight, linear.weight, rtol=2**-8, atol=1e-6)
            linear.weight.copy_(loaded.get_submodule(name).weight)
            linear.register_forward_pre_hook(lambda _, args: (quantize_as_compressed_tensors(args[0], bits),))
    expected = dense(input_ids=TOKENS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (found - plain).norm() > 0.01 * plain.norm()


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_transformers_loads_the_weights_alone_where_it_dequantizes(tmp_path, family):
    save_tiny(family, tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    symmetric = family != "llama"
    run = quantkit.quantize(tmp_path / "source", output=tmp_path / "out", abits=8, symmetric=symmetric, **FEW)
    plain, _ = load_model(run.output, device="cpu", activations=False)
    torch.testing.assert_close(logits_of(run.output), plain(input_ids=TOKENS).logits, rtol=0, atol=1e-5)
    assert any("transformers will not quantize activations" in note for note in run.report["notes"])
