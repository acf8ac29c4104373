import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from families import save_tiny

from quantkit.calibrate.data import evaluation_windows
from quantkit.calibrate.text import read_text
from quantkit.evaluation import perplexity as module
from quantkit.evaluation.loading import load_model
from quantkit.evaluation.perplexity import perplexity

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("QUANTKIT_SHARED", ROOT.parent / "shared"))
REFEREE, STORIES = SHARED / "bench" / "ppl.py", SHARED / "models" / "stories260k"


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", device="cpu")


def windows(tokenizer, seqlen, count):
    return evaluation_windows(read_text("embedded-test"), tokenizer, seqlen=seqlen, windows=count)


@torch.no_grad()
def by_definition(model, rows):
    """One window, one position at a time, in float64."""
    losses = []
    for row in rows:
        logits = model(row[None]).logits[0].double()
        losses += [F.cross_entropy(logits[i : i + 1], row[i + 1 : i + 2]).item() for i in range(len(row) - 1)]
    return sum(losses) / len(losses)


def test_is_the_exponential_of_the_mean_loss(tiny):
    rows = windows(tiny[1], 48, 5)
    result = perplexity(tiny[0], rows)
    assert result.loss == pytest.approx(by_definition(tiny[0], rows), abs=1e-6)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert (result.tokens, result.windows) == (5 * 47, 5)


@pytest.mark.parametrize(("batch", "chunk"), [(1, 512), (100, 7), (10_000, 10_000)])
def test_does_not_depend_on_how_the_work_is_cut(tiny, monkeypatch, batch, chunk):
    rows = windows(tiny[1], 32, 6)
    whole = perplexity(tiny[0], rows).loss
    monkeypatch.setattr(module, "BATCH_TOKENS", batch)
    monkeypatch.setattr(module, "CHUNK", chunk)
    assert perplexity(tiny[0], rows).loss == pytest.approx(whole, abs=1e-6)


def test_tells_its_progress(tiny):
    seen = []
    perplexity(tiny[0], windows(tiny[1], 256, 6), lambda *numbers: seen.append(numbers))
    assert seen == [(4, 6), (6, 6)]


def test_a_hopeless_model_has_infinite_perplexity(tmp_path):
    model = save_tiny("llama", tmp_path).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    assert perplexity(model, torch.arange(64)[None]).perplexity == math.inf


def test_says_nothing(tmp_path, capfd):
    model = save_tiny("gpt2", tmp_path).eval()  # warns of padding when token 0 comes without an attention mask
    capfd.readouterr()
    perplexity(model, torch.zeros(2, 8, dtype=torch.int64))
    assert capfd.readouterr() == ("", "")


@pytest.mark.shared
def test_agrees_with_an_independent_script(tmp_path):
    if not (REFEREE.is_file() and STORIES.is_dir()):
        pytest.skip(f"no {REFEREE} or no {STORIES}; set QUANTKIT_SHARED to the folder that holds them")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(read_text("embedded-test")[0].documents), encoding="utf-8")
    command = [sys.executable, str(REFEREE), str(STORIES), str(text), "128", "24", "--bos"]
    expected = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    model, tokenizer = load_model(STORIES, device="cpu")
    rows = evaluation_windows(read_text(str(text)), tokenizer, seqlen=128, windows=24, bos=True)
    assert f"{perplexity(model, rows).perplexity:.4f}" == expected.strip()
