"""The bench of packed inference: every kernel computes the product, and its tables have a row for each."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts" / "bench"))
import inference
import inference_kernels
import inference_process

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


@pytest.fixture(autouse=True)
def _few_copies(monkeypatch):
    monkeypatch.setattr(inference_kernels, "COLD", 1)
    monkeypatch.setattr(inference, "READ", 2**20)


def test_every_kernel_computes_the_product():
    inputs = torch.randn(1, 128, generator=torch.Generator().manual_seed(2))
    found = inference_kernels.candidates(64, 128, 32, threads=1)
    assert len([each for each in found if not each.absent]) >= 6
    for each in found:
        assert each.absent or each.error(inputs) < TOLERANCE[each.dtype], each.name


def test_copies_take_turns_and_exceed_the_caches(monkeypatch):
    monkeypatch.setattr(inference_kernels, "COLD", 2**20)
    found = inference_kernels.dense(torch.randn(64, 128), torch.float32)
    addresses = {parts[0].data_ptr() for parts, _ in zip(found.copies, range(100), strict=False)}
    assert len(addresses) * found.size == 2**20


def test_tables_of_a_layer(capsys, monkeypatch):
    options = ["--threads", "1", "--layer", "64", "128", "--group-size", "32", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["bench", *options])
    monkeypatch.setattr(inference, "PROMPTS", (4, 16))
    inference.main()
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[:3] == ["one token", "dense float32", "dense bfloat16"]
    assert {"ours, C++, W2", "ours, C++, W8", "numba, W4", "torch int4, bfloat16"} <= set(rows)
    assert rows.index("dense") > rows.index("ours, C++, W8")


def test_a_runtime_that_is_not_installed_has_an_empty_row(monkeypatch, tmp_path):
    monkeypatch.setattr(inference, "HERE", tmp_path)
    script = tmp_path / "inference_process.py"
    script.write_text("import llama_cpp_that_is_not_there", encoding="utf-8")
    with pytest.raises(SystemExit, match="failed"):
        inference._measured("llama.cpp", tmp_path, sys.executable, 1)
    script.write_text("raise SystemExit(\"No module named 'llama_cpp'\")", encoding="utf-8")
    assert inference._measured("llama.cpp", tmp_path, sys.executable, 1) == {}


class Counting(inference_process.Model):
    """Remembers how many tokens it was given at a time."""

    def __init__(self):
        self.steps, self.restarts = [], 0

    def restart(self):
        self.restarts += 1

    def step(self, tokens):
        self.steps.append(len(tokens))
        return 7

    def generate(self, tokens, count):
        return count


def test_all_runtimes_are_asked_for_the_same():
    model = Counting()
    args = inference_process.arguments(["ours", "path", "--repeats", "2", "--tokens", "3", "--prompt", "9"])
    rates = inference_process.rates(model, args)
    assert all(rates[name] > 0 for name in ("prompt", "decode", "generate"))
    assert model.steps == [9, 16, 1, 1, 1] * 2
    assert model.restarts == 6
