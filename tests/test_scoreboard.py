"""What a person sees of scores: whole rows, whatever the width."""

import io
import re
import sys

import pytest
from rich.console import Console

from quantkit import scoreboard
from quantkit.api import Comparison
from quantkit.errors import OutputError
from quantkit.evaluation.divergence import EDGES, Divergence
from quantkit.evaluation.scores import Score, TaskScores


def score(task, metric, value, right=None, **more):
    options = {"filter": "none", "stderr": 0.0116, "higher_is_better": True, "samples": 1838, "num_fewshot": 0}
    return Score(task=task, metric=metric, value=value, right=right, **options | more)


ROWS = (
    score("piqa", "acc", 0.5201, (True, False, False)),
    score("lambada_openai", "perplexity", 5.3e12, stderr=1e11, higher_is_better=False),
    score("gsm8k", "exact_match", 0.1, filter="strict-match", stderr=None, num_fewshot=5, higher_is_better=None),
)
OTHERS = (
    score("piqa", "acc", 0.5239, (False, True, True)),
    score("lambada_openai", "perplexity", 12.5, higher_is_better=False),
    score("gsm8k", "exact_match", 0.2, filter="strict-match", stderr=None, num_fewshot=5, higher_is_better=None),
)
SCORES = TaskScores(scores=ROWS, notes=("cut",), reference=TaskScores(scores=OTHERS, notes=("cut", "other")))
MEASURED = Divergence(
    kl=0.02,
    kl_median=0.001,
    kl_p99=0.3,
    kl_max=1.9,
    kl_histogram=(0, 1, 0, 40, 80, 20, 5, 0, 0),
    top1_agreement=0.93,
    perplexity=12.0,
    reference_perplexity=10.0,
    tokens=146,
)


@pytest.fixture
def screen(monkeypatch):
    """What is shown on a terminal 100 columns wide."""
    made = Console(file=io.StringIO(), force_terminal=True, width=100, highlight=False, soft_wrap=True)
    monkeypatch.setattr(scoreboard, "out", made)
    return lambda: re.sub(r"\x1b\[[0-9;]*m", "", made.file.getvalue())


def test_scores_fit_a_terminal_of_100_columns(screen):
    scoreboard.scored("models/w4", "org/llama", SCORES, {}, runtime="dense", as_json=False)
    text = screen()
    assert all(len(line) <= 100 for line in text.splitlines())
    for part in ("0.5201", "0.5201 ±", "-0.0038", "gsm8k (5-shot)", "exact_match, strict-match", "5.3e+12", "acc ↑"):
        assert part in text
    assert "perplexity ↓" in text
    assert text.count("cut") == text.count("other") == 1


def test_a_file_gets_one_line_per_row(capsys):
    scoreboard.scored("models/w4", "org/llama", SCORES, {}, runtime="dense", as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["task", "metric", "n", "w4", "llama", "change", "lost", "won"]
    assert lines[1].split()[-3:] == ["-0.0038", "2", "1"]
    assert len(lines) == 4 + 2


def test_a_comparison_shows_where_the_divergence_lies(screen):
    options = {"text": "wikitext2-test", "seqlen": 1024}
    scoreboard.compared("w4", "llama", Comparison(divergence=MEASURED), options, as_json=False)
    text = screen()
    assert "the reference's 10.0000 (+20.00%)" in text
    rows = [line.strip() for line in text.splitlines() if " to " in line and "%" in line]
    bars = {row.split("  ")[0]: row.count("█") for row in rows}
    assert list(bars)[:3] == ["1e-6 to 1e-5", "1e-5 to 0.0001", "0.0001 to 0.001"]
    assert list(bars.values()) == [0, 0, 20, 40, 10, 2]
    assert [("▏" in row) for row in rows] == [True] + [False] * 5  # seen, if seldom; never


def test_its_json_has_all_of_it(capsys, tmp_path):
    result = Comparison(divergence=MEASURED, tasks=SCORES)
    file = tmp_path / "out.json"
    scoreboard.compared("w4", "llama", result, {"text": "t", "seqlen": 8}, as_json=True, output=file)
    text = capsys.readouterr().out
    assert file.read_text() == text
    assert f'"edges": [\n      {EDGES[0]}' in text
    assert '"right"' not in text


def test_the_bar_counts(monkeypatch):
    made = Console(file=io.StringIO(), force_terminal=True, width=100, no_color=True)
    monkeypatch.setattr(scoreboard, "err", made)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with scoreboard.counting(quiet=False) as tell:
        tell("loading tiny", 0, 0)
        tell("asking tiny", 3, 1200)
    text = made.file.getvalue()
    assert "asking tiny" in text
    assert "3 of 1,200" in text


def test_a_full_disk_is_one_line(monkeypatch, tmp_path):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_text", full)
    with pytest.raises(OutputError, match=r"out\.json cannot be written: No space left on device"):
        scoreboard.scored("w4", None, SCORES, {}, runtime="dense", as_json=True, output=tmp_path / "out.json")
