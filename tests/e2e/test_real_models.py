"""The promises on a real model: stories260k, a Llama trained on TinyStories, which does not ship with quantkit."""

import os
from pathlib import Path

import pytest

from quantkit import api

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
    for method in ("rtn", "omniquant"):
        result = api.quantize(
            SHARED / "models" / "stories260k",
            output=tmp_path / method,
            method=method,
            wbits=bits,
            group_size=None,
            calibration=STORIES / "train.jsonl",
            samples=8,
            seqlen=128,
        )
        figures[method] = perplexity(result.output)
    assert original < figures["omniquant"] < gain * figures["rtn"]


def test_a_real_output_passes_its_check(tmp_path):
    model = SHARED / "models" / "stories15m"
    api.quantize(model, output=tmp_path / "out", method="rtn", wbits=4, group_size=32)
    result = api.check(tmp_path / "out")
    assert result.faults == ()
    assert result.facts["quantized_share"] == pytest.approx(0.39, abs=0.02)
