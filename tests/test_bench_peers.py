"""What `scripts/bench/peers.py` decides by itself: cells, which results count, the table; the drivers' shared steps."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts" / "bench"))
import peer_common
import peers


@pytest.fixture
def bench(tmp_path):
    args = argparse.Namespace(
        work=tmp_path,
        model=Path("tiny"),
        calibration=Path("train.jsonl"),
        test=Path("test.jsonl"),
        samples=4,
        seqlen=8,
        seed=0,
        eval_seqlen=None,
        windows=2,
        threads=1,
        referee=None,
    )
    return peers.Bench(args)


def put(bench, tool, cell, perplexity):
    document = {"perplexity": perplexity, "seconds": 7.2, "cpu_seconds": 9.8, "peak_bytes": 5e8}
    bench._save(tool, peers.Cell.parse(cell), document)


def test_cells_are_read_as_they_are_written():
    for text in ("w4g32", "w3", "w2g128"):
        assert str(peers.Cell.parse(text)) == text
    assert peers.Cell.parse("w3").group_size == -1


@pytest.mark.parametrize("text", ["4g32", "w1g32", "w4g", "w4a8"])
def test_what_is_no_cell_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"{text} is no cell"):
        peers.Cell.parse(text)


def test_a_result_of_another_setting_does_not_count(bench):
    cell = peers.Cell.parse("w4g32")
    put(bench, "gptq", "w4g32", 2.7)
    assert bench.result("gptq", cell)["perplexity"] == 2.7
    bench.setting = dataclasses.replace(bench.setting, samples=5)
    assert bench.result("gptq", cell) is None


def test_the_table_names_the_lowest_and_the_share_of_rtn(bench):
    for tool, perplexity in (("rtn", 4.0), ("gptq", 3.0), ("quantkit-best", 2.5)):
        put(bench, tool, "w3g32", perplexity)
    text = peers.table(bench, [peers.Cell.parse("w3g32"), peers.Cell.parse("w3")], list(peers.TOOLS))
    assert "| tool | W3 g32 | W3 per channel |" in text
    assert "| quantkit-best | **2.5000** | – |" in text
    assert "| W3 g32 | gptq | 3.0000 | -25.0% | 7 | 10 | 500 |" in text
    assert text.count("**") == 4  # once in each of the two tables


def test_weights_rounded_to_bfloat16_return_to_their_grid():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (6, 4, 8), generator=generator).float()
    scale, zero_point = torch.rand(6, 4, generator=generator) + 0.1, torch.full((6, 4), 7.0)
    weight = ((codes - 7) * scale.unsqueeze(-1)).view(6, 32)
    rounded = weight.bfloat16()
    assert not torch.equal(rounded.float(), weight)
    assert torch.equal(peer_common.on_grid(rounded, scale, zero_point, 4), weight)
    with pytest.raises(SystemExit, match="do not fit into 3 bits"):
        peer_common.on_grid(rounded, scale, zero_point, 3)
    with pytest.raises(SystemExit, match="do not lie on the grid"):
        peer_common.on_grid(weight + 0.3 * scale.repeat_interleave(8, 1), scale, zero_point, 4)


def test_a_dense_checkpoint_replaces_only_what_was_quantized(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    save_file({"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.ones(3)}, source / "model.safetensors")
    (source / "config.json").write_text('{"torch_dtype": "bfloat16", "model_type": "llama"}')
    peer_common.write_dense(source, tmp_path / "out", {"a": torch.full((2,), 1.001)})
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["a"], torch.full((2,), 1.001))
    assert torch.equal(written["b"], torch.ones(3))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "llama", "dtype": "float32"}
    with pytest.raises(SystemExit, match="has no tensor c"):
        peer_common.write_dense(source, tmp_path / "other", {"c": torch.ones(1)})
