"""The promises on a real model: stories260k, a Llama trained on TinyStories, which does not ship with quantkit."""

import os
from pathlib import Path

import pytest
import torch

from quantkit import api
from quantkit.calibrate.data import evaluation_windows
from quantkit.calibrate.text import read_text
from quantkit.core.affine import fake_quantize, group_bounds
from quantkit.core.scheme import QuantScheme
from quantkit.evaluation.loading import load_model, quantize_activations
from quantkit.evaluation.perplexity import perplexity as measure
from quantkit.model.activations import Activations

SHARED = Path(os.environ.get("QUANTKIT_SHARED", Path(__file__).resolve().parents[3] / "shared"))
STORIES = SHARED / "data" / "tinystories"

pytestmark = [
    pytest.mark.shared,
    pytest.mark.slow,
    pytest.mark.skipif(not STORIES.is_dir(), reason=f"no real models in {SHARED}; set QUANTKIT_SHARED"),
]


def perplexity(model):
    return api.evaluate(model, text=STORIES / "test.jsonl", seqlen=256, windows=20).perplexity


@pytest.fixture(scope="module")
def original():
    return perplexity(SHARED / "models" / "stories260k")


@pytest.mark.parametrize(("bits", "gain"), [(4, 1.0), (3, 0.98), (2, 0.7)])
def test_learned_clipping_beats_rounding(tmp_path, original, bits, gain):
    figures = {}
    for method, options in (("rtn", {}), ("omniquant", {"updates": 160 if bits > 2 else 320})):
        result = api.quantize(
            SHARED / "models" / "stories260k",
            output=tmp_path / method,
            method=method,
            options=options,
            wbits=bits,
            group_size=None,
            calibration=STORIES / "train.jsonl",
            samples=8,
            seqlen=128,
        )
        figures[method] = perplexity(result.output)
    assert original < figures["omniquant"] < gain * figures["rtn"]


@pytest.mark.parametrize("bits", [3, 2])
def test_the_default_beats_gptq_and_gptq_beats_rounding(tmp_path, original, bits):
    text = {"calibration": STORIES / "train.jsonl", "samples": 32, "seqlen": 128}
    ways = {"default": {"preset": "balanced"}, "gptq": {"method": "gptq"}, "rtn": {"method": "rtn"}}
    found = {}
    for name, way in ways.items():
        model = SHARED / "models" / "stories260k"
        result = api.quantize(model, output=tmp_path / name, wbits=bits, group_size=None, **text, **way)
        found[name] = perplexity(result.output)
    assert original < found["default"] < 0.95 * found["gptq"] < 0.9 * found["rtn"]


FIGURES = pytest.mark.parametrize(("bits", "expected"), [(8, 2.6209), (6, 2.7062), (4, 5.5088)])


@FIGURES
def test_rounded_weights_and_activations_of_linears_give_the_fields_figures(monkeypatch, bits, expected):
    """Round to nearest, weights per channel with float32 scales, activations per token, Q, K and V left alone."""
    model, tokenizer = load_model(SHARED / "models" / "stories15m", device="cpu")
    scheme = QuantScheme(bits=bits, activation_bits=bits)
    for name, linear in model.named_modules():
        if isinstance(linear, torch.nn.Linear) and name != "lm_head":
            linear.weight.copy_(fake_quantize(linear.weight, *group_bounds(linear.weight, scheme), scheme))
    monkeypatch.setattr(Activations, "_quantize_heads", lambda self, *heads: heads)
    quantize_activations(model, scheme, dense=["lm_head"])
    rows = evaluation_windows(read_text(str(STORIES / "test.jsonl")), tokenizer, seqlen=256, windows=80)
    assert measure(model, rows).perplexity == pytest.approx(expected, rel=1e-3)


@FIGURES
def test_an_output_with_queries_keys_and_values_quantized_too_is_a_little_worse(tmp_path, bits, expected):
    fields = {"wbits": bits, "abits": bits, "group_size": None, "method": "rtn"}
    output = api.quantize(SHARED / "models" / "stories15m", output=tmp_path / "out", **fields).output
    found = api.evaluate(output, text=STORIES / "test.jsonl", seqlen=256, windows=80).perplexity
    assert expected < found < 1.1 * expected
    assert api.check(output).faults == ()


def test_a_real_output_passes_its_check(tmp_path):
    model = SHARED / "models" / "stories15m"
    api.quantize(model, output=tmp_path / "out", method="rtn", wbits=4, group_size=32)
    result = api.check(tmp_path / "out")
    assert result.faults == ()
    assert result.facts["quantized_share"] == pytest.approx(0.39, abs=0.02)
