"""Checkpoints of every kind, written once, still mean what they meant: to plain transformers, to us, and packed."""

import json
from pathlib import Path

import pytest
import torch
from golden.make import ACTIVATION_BITS, GGUF, KINDS, dense_model, logits_of, logits_of_gguf
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import quantkit
from quantkit.exporters.compressed_tensors import weights_only

GOLDEN = Path(__file__).parent.parent / "golden"
NATIVE = [kind for kind in KINDS if kind.startswith("ct-")]  # transformers reads them without further packages
EVERY = pytest.mark.parametrize("kind", KINDS)
WEIGHTS = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ACTIVATION_BITS])
EXACT = {"rtol": 0, "atol": 2e-4}  # of logits that have a spread of 2; sums differ in their order alone


def expected(kind):
    return load_file(GOLDEN / f"{kind}.safetensors")


def transformers_logits(kind, tokens, **config):
    """Return what plain transformers computes; in the checkpoint's dtype until the weights are unpacked."""
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / kind, dtype="auto", **config)
    logits_of(model, tokens[:, :1])
    return logits_of(model.to("cpu", torch.float32), tokens)


@EVERY
def test_the_logits_say_something(kind):
    logits = expected(kind)["logits"]
    assert logits.shape == (2, 8, 128)
    assert logits.std() > 1
    assert logits.isfinite().all()


@EVERY
def test_we_read_the_same_weights(kind):
    golden = expected(kind)
    torch.testing.assert_close(logits_of(dense_model(GOLDEN / kind), golden["tokens"]), golden["logits"], **EXACT)


@WEIGHTS
def test_packed_inference_computes_the_same(kind):
    golden = expected(kind)
    found = logits_of(quantkit.load(GOLDEN / kind, device="cpu"), golden["tokens"])
    assert (found - golden["logits"]).norm() < 0.02 * golden["logits"].norm()  # no product is rounded to 16 bits there


@pytest.mark.parametrize("kind", [kind for kind in NATIVE if kind not in ACTIVATION_BITS])
def test_plain_transformers_computes_the_same(kind):
    golden = expected(kind)
    torch.testing.assert_close(transformers_logits(kind, golden["tokens"]), golden["logits"], **EXACT)


@pytest.mark.parametrize("kind", ACTIVATION_BITS)
def test_plain_transformers_quantizes_activations_as_it_did(kind):
    """Rounding makes of the smallest differences between machines some of its own size, so not to the last digit."""
    golden = expected(kind)
    found = transformers_logits(kind, golden["tokens"])
    cost = (golden["quantized"] - golden["logits"]).norm()
    assert (found - golden["quantized"]).norm() < 0.3 * cost
    config = AutoConfig.from_pretrained(GOLDEN / kind)
    config.quantization_config = weights_only(config.quantization_config)
    found = transformers_logits(kind, golden["tokens"], config=config)
    torch.testing.assert_close(found, golden["logits"], **EXACT)


@pytest.mark.parametrize("kind", GGUF)
def test_transformers_reads_the_same_from_a_gguf_file(kind):
    golden = expected(kind)
    found = logits_of_gguf(GOLDEN / kind, golden["tokens"])
    torch.testing.assert_close(found, golden["logits"], **EXACT)
    assert (found.shape[-1], found.std() > 1) == (259, True)


@EVERY
def test_the_kinds_are_what_their_names_say(kind):
    config = json.loads((GOLDEN / kind / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == {"ct": "compressed-tensors"}.get(kind.partition("-")[0], kind.partition("-")[0])
    words = {
        "ct-w8a8": ("format", "int-quantized"),
        "ct-w4a8": ("format", "pack-quantized"),
        "gptq-v1-symmetric": ("checkpoint_format", "gptq"),
        "gptq-v2-asymmetric": ("checkpoint_format", "gptq_v2"),
        "awq": ("version", "gemm"),
    }
    name, value = words.get(kind, ("quant_method", config["quant_method"]))
    assert config[name] == value
    assert kind != "ct-mixed" or len(config["config_groups"]) > 1


def test_golden_files_are_small():
    sizes = [path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(sizes) < 600_000
    assert max(sizes) < 100_000
