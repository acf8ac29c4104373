"""Every family: what is written loads in plain transformers and packed, and computes what was calibrated."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers
from families import FAMILIES, VOCABULARY, WINDOW, edit_tensors, save_tiny, save_tokenizer
from packaging.version import Version
from transformers import AutoModelForCausalLM

from quantkit.api import quantize
from quantkit.core.affine import round_to_nearest
from quantkit.core.scheme import QuantScheme
from quantkit.runtime.linear import PackedLinear
from quantkit.runtime.packed_model import load

TOKENS = torch.randint(3, VOCABULARY, (2, 2 * WINDOW), generator=torch.Generator().manual_seed(3))
GROUPS = QuantScheme(bits=4, group_size=32)
CHANNELS = QuantScheme(bits=4, symmetric=True)
# transformers 5.17 does not round a float32 model's weights to the scale's dtype, and cannot load all families packed
OLD = Version(transformers.__version__) < Version("5.23")
HUB_TOWER = ("vision_tower.", "vision_tower.vision_model.")


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=TOKENS, use_cache=False).logits


@torch.no_grad()
def fake_quantized(model, sites, scheme):
    """Return the model twice, the weights of `sites` as transformers has them and as they are packed.

    Scales are stored in float16, to which transformers rounds the weights as well.
    """
    exact = copy.deepcopy(model)
    for site in sites:
        rounded = round_to_nearest(model.get_submodule(site).weight, scheme, torch.float16)
        model.get_submodule(site).weight.copy_(rounded.dequantize())
        exact.get_submodule(site).weight.copy_(replace(rounded, scale=rounded.scale.float()).dequantize())
    return model, exact


def export(source, output, scheme):
    save_tokenizer(source)
    kind = {"wbits": scheme.bits, "group_size": scheme.group_size, "symmetric": scheme.symmetric}
    return quantize(source, output=output, method="rtn", samples=2, seqlen=2 * WINDOW, device="cpu", **kind)


def assert_reloads(model, source, output, scheme):
    if OLD and model.config.model_type in ("gpt2", "falcon", "gemma3"):
        pytest.skip(f"transformers {transformers.__version__} cannot load this family packed")
    dense = logits(model)
    sites = export(source, output, scheme).report["sites"]
    rounded, exact = fake_quantized(model, sites, scheme)
    expected, unrounded = logits(rounded), logits(exact)
    loaded = logits(AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32))
    torch.testing.assert_close(loaded, expected, rtol=0, atol=1e-2 if OLD else 1e-6)
    assert (expected - dense).norm() > 0.01 * dense.norm()
    packed = load(output, device="cpu")
    assert sum(isinstance(part, PackedLinear) for part in packed.modules()) == len(sites)
    error = (logits(packed) - unrounded).abs() / unrounded.std()
    assert error.max() < 1e-3  # activations have 16 bits of fixed point
    assert error.mean() < 2e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_asymmetric_groups(tmp_path, family):
    source = tmp_path / "source"
    assert_reloads(save_tiny(family, source), source, tmp_path / "output", GROUPS)


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_symmetric_channels(tmp_path, family):
    source = tmp_path / "source"
    assert_reloads(save_tiny(family, source), source, tmp_path / "output", CHANNELS)


@pytest.mark.skipif(OLD, reason="transformers 5.17 cannot load them packed")
@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_names_without_the_base_models_prefix(tmp_path, family):
    source = tmp_path / "source"
    model = save_tiny(family, source)
    edit_tensors(source, lambda tensors: {n.removeprefix("transformer."): tensors[n] for n in tensors})
    assert_reloads(model, source, tmp_path / "output", GROUPS)


def test_a_vision_tower_named_as_on_the_hub(tmp_path):
    source = tmp_path / "source"
    model = save_tiny("gemma3", source)
    edit_tensors(source, lambda tensors: {n.replace(*HUB_TOWER): tensors[n] for n in tensors})
    assert_reloads(model, source, tmp_path / "output", GROUPS)


def test_a_tied_head_that_is_stored_too(tmp_path):
    source = tmp_path / "source"
    model = save_tiny("bloom", source)
    head = {"lm_head.weight": model.lm_head.weight.detach().clone()}
    edit_tensors(source, lambda tensors: tensors | head)
    assert_reloads(model, source, tmp_path / "output", GROUPS)


def test_a_head_that_is_tied_by_the_config_but_stored_with_other_values(tmp_path):
    source = tmp_path / "source"
    save_tiny("qwen2", source)
    edit_tensors(source, lambda tensors: tensors | {"lm_head.weight": 2 * tensors["model.embed_tokens.weight"]})
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert_reloads(model, source, tmp_path / "output", GROUPS)


@pytest.mark.skipif(OLD, reason="not tried with transformers 5.17")
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt-350m", "bloom", "phi3", "gpt_neox"])
def test_several_schemes_in_one_checkpoint(tmp_path, family):
    model = save_tiny(family, tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    few = {"method": "rtn", "group_size": 32, "samples": 2, "seqlen": 2 * WINDOW, "device": "cpu"}
    report = quantize(tmp_path / "source", output=tmp_path / "output", target_bpw=4, **few).report
    chosen = {
        n: QuantScheme.parse(group["scheme"]) for group in report["allocation"]["groups"] for n in group["linears"]
    }
    assert len(set(chosen.values())) > 1
    for site, scheme in chosen.items():
        weight = model.get_submodule(site).weight
        rounded = round_to_nearest(weight, scheme, torch.float16)
        # without `dequantize` transformers multiplies in the model's dtype, float32 here
        steps = rounded.codes.float().unflatten(1, (rounded.scale.shape[1], -1))
        weight.data.copy_((steps * rounded.scale.float().unsqueeze(-1)).flatten(1))
    loaded = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "output", dtype=torch.float32))
    torch.testing.assert_close(loaded, logits(model), rtol=0, atol=1e-6)
