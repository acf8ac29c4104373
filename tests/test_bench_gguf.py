"""The proof of GGUF files sets quantkit's perplexity beside another's, and fails where they differ."""

import math
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts" / "bench"))
import gguf_proof

from quantkit.calibrate.data import load_tokenizer
from quantkit.resources import data_dir

TINY = data_dir("model_zoo") / "tiny"
FEW = ["tiny", "embedded-test", "--llama", "none", "--seqlen", "32", "--windows", "2", "--threads", "1", "--texts", "2"]


def proof(monkeypatch, tmp_path, answer, *options):
    monkeypatch.setattr(gguf_proof, "_llama", lambda args, file, questions: answer(questions))
    monkeypatch.setattr(sys, "argv", ["bench", *FEW, "--settings", "w4g32", "--keep", str(tmp_path), *options])
    gguf_proof.main()


def truth(questions, loss):
    tokenizer = load_tokenizer(TINY)
    return {
        "loss": loss,
        "tokens": [tokenizer(text, add_special_tokens=False).input_ids for text in questions["texts"]],
    }


def test_equal_answers_are_a_ratio_of_one(monkeypatch, tmp_path, capsys):
    proof(monkeypatch, tmp_path, lambda questions: truth(questions, 0.0), "--tolerance", "1")
    row = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].strip("|").split("|")]
    assert row[:3] == ["tiny", "w4a16g32", "Q4_1"]
    assert (row[5], row[7]) == ("1.0000", "100%")
    ours = float(row[4])
    proof(monkeypatch, tmp_path, lambda questions: truth(questions, math.log(ours)), "--tolerance", "0.0001")
    assert "| 1.0000 | 100% |" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["loss", "tokens"])
def test_a_difference_fails(wrong, monkeypatch, tmp_path):
    def answer(questions):
        found = truth(questions, 0.0)
        return found | {"tokens": [[0] for _ in found["tokens"]]} if wrong == "tokens" else found

    with pytest.raises(SystemExit) as stopped:
        proof(monkeypatch, tmp_path, answer, "--tolerance", "0.5" if wrong == "loss" else "1")
    assert stopped.value.code == 1
