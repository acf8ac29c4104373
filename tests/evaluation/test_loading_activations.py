"""An output whose scheme quantizes activations is judged with them, exactly as it was calibrated."""

import json
import shutil
from functools import cache

import pytest
import torch
from families import save_tiny, save_tokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import quantkit
from quantkit.core.scheme import QuantScheme
from quantkit.errors import ModelError
from quantkit.evaluation.check import check
from quantkit.evaluation.generate import generate
from quantkit.evaluation.loading import load_model
from quantkit.model.activations import Activations

FEW = {"method": "rtn", "group_size": None, "samples": 4, "seqlen": 32, "device": "cpu"}
IDS = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(5))
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEARS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def quantized(directory, text, model="tiny", **fields):
    scheme = QuantScheme.parse(text)
    fields |= {
        "wbits": scheme.bits,
        "abits": scheme.activation_bits,
        "kv_bits": scheme.kv_bits,
        "symmetric": scheme.symmetric,
        "symmetric_activations": scheme.activation_symmetric,
    }
    return quantkit.quantize(model, output=directory / text, **FEW, **fields).output


def perplexity(model):
    return quantkit.evaluate(model, text="embedded-test", seqlen=64, windows=24, device="cpu").perplexity


@pytest.fixture(scope="module")
def output_of(tmp_path_factory):
    """Return a function from a scheme to the embedded model in it, not to be changed."""
    directory = tmp_path_factory.mktemp("activations")
    return cache(lambda text: quantized(directory, text))


@pytest.fixture(scope="module")
def w4a4(output_of):
    return output_of("w4a4")


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


@torch.no_grad()
def logits_by_block(output, text):
    """Return the logits of the weights alone, every block's activations quantized as during calibration."""
    model, _ = load_model(output, device="cpu", activations=False)
    plain = logits(model)
    contexts = [Activations(block, LINEARS, QuantScheme.parse(text)) for block in model.model.layers]
    for block, context in zip(model.model.layers, contexts, strict=True):
        context_of_block(block, context)
    return logits(model), plain


def context_of_block(block, activations):
    forward = block.forward

    def within(*args, **kwargs):
        with activations.quantized():
            return forward(*args, **kwargs)

    block.forward = within


@pytest.mark.parametrize("text", ["w4a4", "w8as8s", "w4kv3"])
def test_a_model_computes_what_its_blocks_do_in_calibration(output_of, text):
    output = output_of(text)
    expected, plain = logits_by_block(output, text)
    found = logits(load_model(output, device="cpu")[0])
    assert torch.equal(found, expected)
    assert (found - plain).norm() > 0.003 * plain.norm()


def test_linears_that_stay_dense_keep_their_inputs(tmp_path):
    output = quantized(tmp_path, "w4a4", ignore=["*.mlp.*", "*.self_attn.[qkv]_proj"])
    model, _ = load_model(output, device="cpu")
    seen = {}
    for name, part in model.named_modules():
        if name.endswith("_proj"):
            part.register_forward_hook(lambda _, args, __, name=name: seen.update({name: args[0]}))
    logits(model)
    levels = {name: max(len(token.unique()) for token in values.flatten(0, 1)) for name, values in seen.items()}
    assert {name for name, count in levels.items() if count <= 16} == {n for n in seen if n.endswith("o_proj")}
    assert len(levels) == 35


def test_fewer_bits_of_activations_are_worse(output_of):
    figures = [*(perplexity(output_of(text)) for text in ("w4a4", "w6a6", "w8as8s")), perplexity("tiny")]
    assert figures == sorted(figures, reverse=True)
    assert figures[0] > 1.02 * figures[1]
    assert figures[2] == pytest.approx(figures[3], rel=0.01)


@torch.no_grad()
def test_keys_and_values_cost_something_and_all_activations_more(output_of):
    """The weights are the same, so the distance from their own logits is what the activations cost."""
    plain = logits(load_model(output_of("w4kv3"), device="cpu", activations=False)[0])
    keys, everything = (
        (logits(load_model(output_of(text), device="cpu")[0]) - plain).norm() for text in ("w4kv3", "w4a4")
    )
    assert 0 < keys < everything


def test_a_model_with_shared_keys_and_values_and_a_mask_of_its_own(tmp_path):
    save_tiny("gemma2", tmp_path / "gemma2")
    save_tokenizer(tmp_path / "gemma2")
    output = quantized(tmp_path, "w4a4", tmp_path / "gemma2")
    model, plain = (load_model(output, device="cpu", activations=flag)[0] for flag in (True, False))
    assert not torch.equal(logits(model), logits(plain))


def test_nothing_is_hooked_between_calls(w4a4):
    model, _ = load_model(w4a4, device="cpu")
    logits(model)
    assert not any(part._forward_pre_hooks for part in model.modules())
    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)


def test_two_models_do_not_disturb_each_other(w4a4):
    first, second = load_model(w4a4, device="cpu")[0], load_model("tiny", device="cpu")[0]
    alone = logits(second)
    logits(first)
    assert torch.equal(logits(second), alone)


def test_a_cache_changes_nothing(w4a4):
    """Keys that wait in the cache are quantized like fresh ones: token by token."""
    model, tokenizer = load_model(w4a4, device="cpu")
    text = generate(model, tokenizer, "The", max_new_tokens=12)
    ids = torch.tensor([tokenizer("The")["input_ids"]])
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert tokenizer.decode(ids[0], skip_special_tokens=True).endswith(text)
    assert text.strip()


def test_check_finds_an_honest_output_whole_and_compares_with_activations(w4a4):
    result = check(w4a4, against="tiny", windows=4, seqlen=64, device="cpu")
    assert result.faults == ()
    assert result.facts["scheme"] == "w4a4"
    assert result.facts["logit_difference"] < 0.2 * result.facts["logit_tolerance"]
    assert result.facts["perplexity"] > 1.02 * result.facts["reference_perplexity"]


def edit_config(output, change):
    path = output / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def test_other_bits_of_activations_in_the_configuration_are_a_fault(w4a4, tmp_path):
    copy = shutil.copytree(w4a4, tmp_path / "copy")
    edit_config(copy, lambda config: config["quantkit"].update(scheme="w4a8"))
    faults = check(copy, device="cpu").faults
    assert any("config.json says that the weights are w4a8" in fault and "w4a4" in fault for fault in faults)


@pytest.mark.parametrize("own", [{}, {"scheme": "w4a4x"}, {"scheme": 4}, [], "w4a4"], ids=str)
def test_a_damaged_scheme_is_one_line(w4a4, tmp_path, own):
    copy = shutil.copytree(w4a4, tmp_path / "copy")
    edit_config(copy, lambda config: config.update(quantkit=own))
    with pytest.raises(ModelError, match="is damaged") as caught:
        load_model(copy, device="cpu")
    assert "\n" not in str(caught.value)
    assert any("config.json is damaged" in fault for fault in check(copy, device="cpu").faults)
