"""Eight bits of weights and of activations, both symmetric: stored as bytes, computed by transformers as simulated."""

import json

import pytest
import torch
from compressed_tensors.compressors.naive_quantized.base import IntQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from families import save_tiny, save_tokenizer
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.core.scheme import QuantScheme
from quantkit.errors import ModelError
from quantkit.evaluation.check import check
from quantkit.evaluation.loading import load_model
from quantkit.exporters.compressed_tensors import CompressedTensors, format_of
from quantkit.model.checkpoint import Checkpoint

TOKENS = torch.randint(3, 100, (2, 24), generator=torch.Generator().manual_seed(5))
FEW = {"method": "rtn", "group_size": None, "samples": 1, "seqlen": 16, "device": "cpu"}
W8A8 = {"abits": 8, "symmetric": True, "symmetric_activations": True}
LINEAR = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return quantkit.quantize("tiny", output=tmp_path_factory.mktemp("integer") / "out", wbits=8, **W8A8, **FEW).output


def configuration(output):
    return json.loads((output / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("w8as8s", "int-quantized"),
        ("w8a8s", "pack-quantized"),
        ("w8as8", "pack-quantized"),
        ("w8as8g32s", "pack-quantized"),
        ("w4as8s", "pack-quantized"),
        ("w4as4s", "pack-quantized"),
        ("w8s", "pack-quantized"),
    ],
)
def test_only_the_pair_that_kernels_multiply_is_stored_as_bytes(text, expected):
    scheme = QuantScheme.parse(text)
    assert format_of(scheme) == expected
    config = CompressedTensors().config({"a": scheme}, ["Linear"], [])
    assert config["format"] == config["config_groups"]["group_0"]["format"] == expected
    QuantizationConfig.model_validate(config)


def test_the_tensors_are_those_of_compressed_tensors(output):
    """Its own decompressor reads the weights that ours does, and the calibrated ones."""
    (group,) = QuantizationConfig.model_validate(configuration(output)).config_groups.values()
    ends, checkpoint = IntQuantizationCompressor.compression_param_names(group), Checkpoint(output)
    stored = {end: checkpoint.load([f"{LINEAR}.{end}"])[f"{LINEAR}.{end}"] for end in ends}
    assert {f"{LINEAR}.{end}" for end in ends} == {name for name in checkpoint if name.startswith(LINEAR)}
    assert (stored["weight"].dtype, stored["weight_scale"].shape[1]) == (torch.int8, 1)
    decoded = CompressedTensors().decode(stored, QuantScheme.parse("w8as8s"))
    assert torch.equal(decoded.dequantize(), IntQuantizationCompressor.decompress(stored, group)["weight"])


def quantize_as_compressed_tensors(values):
    """Round per token with the step of compressed-tensors: max |x| / ((2^8 - 1) / 2)."""
    step = values.abs().amax(-1, keepdim=True) / (255 / 2)
    return (values / step).round().clamp(-128, 127) * step


@torch.no_grad()
def test_transformers_quantizes_the_activations(output):
    loaded = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    dense, _ = load_model(output, device="cpu", activations=False)
    found, plain = loaded(input_ids=TOKENS).logits, dense(input_ids=TOKENS).logits
    for name, linear in dense.named_modules():
        if isinstance(linear, torch.nn.Linear) and name != "lm_head":
            # on this path the scale's product is not rounded to its dtype again
            torch.testing.assert_close(loaded.get_submodule(name).weight, linear.weight, rtol=2**-8, atol=1e-6)
            linear.weight.copy_(loaded.get_submodule(name).weight)
            linear.register_forward_pre_hook(lambda _, args: (quantize_as_compressed_tensors(args[0]),))
    torch.testing.assert_close(found, dense(input_ids=TOKENS).logits, rtol=0, atol=1e-4)
    assert (found - plain).norm() > 0.001 * plain.norm()


@torch.no_grad()
def test_our_simulation_is_as_far_from_the_weights_alone(output):
    """It rounds queries, keys and values too, so the two differ, but not by more than what either costs."""
    transformers = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)(input_ids=TOKENS).logits
    ours, plain = (load_model(output, device="cpu", activations=flag)[0] for flag in (True, False))
    cost = (ours(input_ids=TOKENS).logits - plain(input_ids=TOKENS).logits).norm()
    assert (ours(input_ids=TOKENS).logits - transformers).norm() < 1.5 * cost


def test_check_finds_it_whole(output):
    result = check(output, device="cpu")
    assert result.faults == ()
    assert result.facts["bits_per_weight"] == pytest.approx(8 + 16 / 128, abs=0.1)
    assert result.facts["quantized_share"] == pytest.approx(0.75, abs=0.2)


@pytest.mark.parametrize("family", ["gpt2", "falcon", "qwen2"])
def test_families_load_it(tmp_path, family):
    save_tiny(family, tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    run = quantkit.quantize(tmp_path / "source", output=tmp_path / "out", wbits=8, **W8A8, **FEW)
    assert configuration(run.output)["format"] == "int-quantized"
    assert check(run.output, device="cpu").faults == ()
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(run.output, dtype=torch.float32)(input_ids=TOKENS).logits
        original = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)(TOKENS).logits
    assert (loaded - original).norm() < 0.05 * original.norm()


def test_beside_other_widths_each_linear_keeps_its_own_form(tmp_path):
    run = quantkit.quantize("tiny", output=tmp_path / "out", target_bpw=6.6, **W8A8, **FEW)
    config = configuration(run.output)
    assert config["format"] == "mixed-precision"
    assert {group["format"] for group in config["config_groups"].values()} == {"int-quantized", "pack-quantized"}
    assert check(run.output, device="cpu").faults == ()


def test_codes_of_another_dtype_are_damage(output):
    checkpoint = Checkpoint(output)
    stored = {end: checkpoint.load([f"{LINEAR}.{end}"])[f"{LINEAR}.{end}"] for end in ("weight", "weight_scale")}
    for damaged in ({"weight": stored["weight"].float()}, {"weight_scale": stored["weight_scale"][:-1]}):
        with pytest.raises(ModelError, match="of a packed linear is"):
            CompressedTensors().decode(stored | damaged, QuantScheme.parse("w8as8s"))
