"""A budget of bits: what it means before a run, how it is spent, and what a mixed output is worth."""

import json

import pytest
import torch
from families import save_tiny, save_tokenizer
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.allocation import Budget, describe, stored_bits
from quantkit.calibrate.sensitivity import TiedLinears
from quantkit.core.affine import round_to_nearest
from quantkit.core.scheme import QuantScheme
from quantkit.errors import UsageError
from quantkit.evaluation.check import check
from quantkit.exporters.compressed_tensors import CompressedTensors
from quantkit.model.architecture import architectures
from quantkit.model.checkpoint import BYTES, Checkpoint
from quantkit.recipe import Recipe

FEW = {"method": "rtn", "group_size": 32, "calibration": "embedded", "samples": 2, "seqlen": 64, "device": "cpu"}
LLAMA = next(architecture for architecture in architectures() if architecture.name == "llama")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """The embedded model at 3.5 bits per weight, and the report of its run."""
    return quantkit.quantize("tiny", output=tmp_path_factory.mktemp("mixed") / "out", target_bpw=3.5, **FEW)


@pytest.fixture(scope="module")
def uniform(tmp_path_factory):
    """The embedded model at 3 and 4 bits, without zero points: 3.5 and 4.5 bits per weight."""
    directory = tmp_path_factory.mktemp("uniform")
    return {
        bits: quantkit.quantize("tiny", output=directory / f"{bits}", wbits=bits, symmetric=True, **FEW).output
        for bits in (3, 4)
    }


def groups(result):
    return result.report["allocation"]["groups"]


def configured(output):
    """Return module name → bits, as config.json says."""
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    return {
        name: group["weights"]["num_bits"] for group in config["config_groups"].values() for name in group["targets"]
    }


def perplexity(output):
    return quantkit.evaluate(output, text="embedded-test", seqlen=128, windows=16, device="cpu").perplexity


# --- what it promises


def test_at_equal_size_the_measured_loss_is_below_that_of_one_width(mixed):
    one_width = sum(group["losses"]["w3a16g32s"] for group in groups(mixed))
    assert mixed.report["allocation"]["loss"] < 0.9 * one_width
    assert mixed.report["bits_per_weight"] <= 3.5


def test_at_equal_size_the_perplexity_is_below_that_of_one_width(mixed, uniform):
    assert perplexity(mixed.output) < perplexity(uniform[3])


def test_between_two_widths_the_perplexity_is_between_theirs(tmp_path, uniform):
    between = quantkit.quantize("tiny", output=tmp_path / "out", target_bpw=4, **FEW).output
    assert perplexity(uniform[4]) < perplexity(between) < perplexity(uniform[3])


def test_the_output_is_whole_and_computes_what_was_calibrated(mixed):
    result = check(mixed.output, device="cpu")
    assert result.faults == ()
    assert result.facts["bits_per_weight"] <= 3.5
    assert result.facts["logit_difference"] < 0.2 * result.facts["logit_tolerance"]


def test_a_float32_model_passes_too(tmp_path):
    save_tiny("llama", tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    few = FEW | {"seqlen": 16}
    output = quantkit.quantize(tmp_path / "source", output=tmp_path / "out", target_bpw=4, **few).output
    assert check(output, device="cpu").faults == ()


def test_what_runtimes_fuse_shares_its_bits(mixed):
    bits = configured(mixed.output)
    assert len(bits) == 35
    assert len(set(bits.values())) > 1
    for block in range(5):
        for group in LLAMA.groups:
            assert len({bits[f"model.layers.{block}.{linear}"] for linear in group.linears}) == 1


def test_transformers_unpacks_the_weights_that_were_calibrated(mixed):
    model = AutoModelForCausalLM.from_pretrained(mixed.output)
    with torch.no_grad():
        model(input_ids=torch.tensor([[1]]))  # until then they stay packed
    checkpoint = Checkpoint(mixed.output)
    for name, bits in configured(mixed.output).items():
        ends = ("weight_packed", "weight_scale", "weight_shape")
        parts = {end: checkpoint.load([f"{name}.{end}"])[f"{name}.{end}"] for end in ends}
        scheme = QuantScheme(bits=bits, group_size=32, symmetric=True)
        expected = CompressedTensors().decode(parts, scheme).dequantize()
        assert torch.equal(model.get_submodule(name).weight, expected)


# --- what is written


def test_the_report_says_what_was_chosen_and_why(mixed):
    found = groups(mixed)
    assert [(group["block"], group["group"]) for group in found] == [
        (block, group.name) for block in range(5) for group in LLAMA.groups
    ]
    by_name = {name: QuantScheme.parse(group["scheme"]).bits for group in found for name in group["linears"]}
    assert by_name == configured(mixed.output)
    assert all(list(group["losses"]) == [f"w{bits}a16g32s" for bits in (2, 3, 4, 5, 6, 8)] for group in found)
    widths = sorted(set(by_name.values()))
    assert mixed.report["scheme"] == f"mixed {widths[0]}-{widths[-1]} bit, {mixed.report['bits_per_weight']:.2f} bpw"


def test_the_size_is_the_sum_of_what_was_chosen(mixed):
    stored = sum(BYTES[info.dtype] * info.elements for info in Checkpoint(mixed.output).tensors.values())
    assert stored == mixed.report["predicted"]["output_bytes"] == mixed.report["measured"]["output_bytes"]
    plan = quantkit.plan("tiny", target_bpw=3.5, **FEW)
    assert plan.output_bytes - stored < 0.01 * stored
    assert plan.output_bytes >= stored


def test_the_recipe_beside_the_model_makes_the_same_model(mixed, tmp_path):
    recipe = Recipe.from_toml(mixed.output / "recipe.toml")
    assert (recipe.target_bpw, recipe.scheme.symmetric, recipe.scheme.group_size) == (3.5, True, 32)
    again = quantkit.quantize(recipe, output=tmp_path / "again", device="cpu")
    assert again.report["sha256"] == mixed.report["sha256"]
    assert again.report["allocation"] == mixed.report["allocation"]


def test_several_schemes_go_without_dequantize_and_name_every_linear(mixed, uniform):
    config = json.loads((mixed.output / "config.json").read_text())["quantization_config"]
    assert "dequantize" not in config
    assert config["ignore"] == ["lm_head"]
    assert all(group["format"] == "pack-quantized" for group in config["config_groups"].values())
    single = json.loads((uniform[3] / "config.json").read_text())["quantization_config"]
    assert single["dequantize"] is True
    assert [group["targets"] for group in single["config_groups"].values()] == [["Linear"]]


@pytest.mark.parametrize("part", ["config.json", "report.json"])
def test_another_width_in_one_document_is_told(mixed, tmp_path, part):
    for path in mixed.output.iterdir():
        (tmp_path / path.name).symlink_to(path)
    document = json.loads((mixed.output / part).read_text())
    if part == "config.json":
        ends = document["quantization_config"]["config_groups"]
        ends["group_0"]["targets"].append(ends["group_1"]["targets"].pop())
    else:
        group = document["allocation"]["groups"][0]
        group["scheme"] = next(scheme for scheme in group["losses"] if scheme != group["scheme"])
    (tmp_path / part).unlink()
    (tmp_path / part).write_text(json.dumps(document))
    faults = check(tmp_path, device="cpu").faults
    assert any("config.json says that model.layers" in fault and "but report.json says" in fault for fault in faults)


# --- budgets and plans


def test_a_budget_is_spent_where_it_saves_most():
    ties = tuple(TiedLinears(block, "a", (f"{block}.a",)) for block in range(3))
    schemes = tuple(QuantScheme(bits=bits, group_size=32, symmetric=True) for bits in (2, 4))
    budget = Budget(target=3.2, schemes=schemes, ties=ties, shapes={f"{block}.a": (64, 32) for block in range(3)})
    losses = {ties[0]: (1.0, 0.5), ties[1]: (9.0, 0.5), ties[2]: (2.0, 1.9)}
    allocation = budget.spend({tie: dict(zip(schemes, values, strict=True)) for tie, values in losses.items()})
    assert [each.bits for each in allocation.schemes.values()] == [2, 4, 2]  # 3.2 · 3 holds 2.5 + 4.5 + 2.5
    assert allocation.loss == 3.5


@pytest.mark.parametrize("text", ["w2g32s", "w3s", "w5g32s", "w3g32"])
@pytest.mark.parametrize("shape", [(64, 96), (10, 32)], ids=str)
def test_stored_bits_are_those_of_the_encoded_tensors(text, shape):
    scheme = QuantScheme.parse(text)
    tensors = CompressedTensors().encode(round_to_nearest(torch.randn(shape), scheme, torch.float16))
    expected = sum(8 * value.nbytes for end, value in tensors.items() if end != "weight_shape")
    assert stored_bits(shape, scheme) == expected


def test_a_plan_says_what_the_budget_means_and_measures_nothing(tmp_path):
    save_tiny("llama", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    plan = quantkit.plan(tmp_path, target_bpw=3.25, **FEW)
    assert (plan.bits_per_weight, plan.allocation) == (3.25, None)
    assert plan.scheme == "mixed 2-8 bit, 3.25 bpw"
    (note,) = plan.notes
    assert "each of 8 groups of linears gets the bits that its measured loss asks for (2, 3, 4, 5, 6, 8)" in note
    assert "without zero points" in note


def test_a_target_makes_a_plan_take_longer():
    plain, measured = (quantkit.plan("tiny", **FEW, **kind) for kind in ({"symmetric": True}, {"target_bpw": 4}))
    assert measured.seconds > plain.seconds


def test_a_name_for_what_the_linears_become():
    three, five = (QuantScheme(bits=bits, symmetric=True) for bits in (3, 5))
    assert describe({"a": three, "b": three}, 3.1) == "w3a16s"
    assert describe({"a": three, "b": five}, 3.987) == "mixed 3-5 bit, 3.99 bpw"


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (
            {"target_bpw": 2.4},
            "2.4 is below the 2.500 bits per weight that w2a16g32s takes .* ask for at least 2.5, or",
        ),
        ({"target_bpw": 9}, "9 is above the 8.500 bits per weight of w8a16g32s; use --wbits 8"),
        ({"target_bpw": 3, "wbits": 3}, "--wbits 3 and --target-bpw 3 both say how many bits; give one"),
        ({"target_bpw": 3, "symmetric": False}, "only without zero points; leave out --asymmetric, or use --wbits"),
        ({"target_bpw": float("nan")}, "target_bpw must be a number of bits such as 3.25, not nan"),
        ({"target_bpw": "3"}, "target_bpw in the recipe must be a number or left out, not '3'"),
    ],
    ids=["below", "above", "with wbits", "asymmetric", "nan", "text"],
)
def test_a_target_that_cannot_be(fields, problem):
    with pytest.raises(UsageError, match=problem) as caught:
        quantkit.plan("tiny", **FEW, **fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("family", "kind"), [("gpt2", "Conv1D"), ("falcon", "FalconLinear")])
def test_modules_that_only_one_scheme_loads_into_are_refused(tmp_path, family, kind):
    save_tiny(family, tmp_path)
    with pytest.raises(UsageError, match=f"loads into plain linears only, but .* is a {kind}; use --wbits"):
        quantkit.plan(tmp_path, target_bpw=4, **FEW)


def test_the_least_target_that_the_refusal_names_is_accepted():
    assert quantkit.plan("tiny", target_bpw=2.5, **FEW).bits_per_weight == 2.5
