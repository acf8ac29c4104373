"""The bench of pruners prints a row for each method and sparsity."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts" / "bench"))
import pruning

FEW = ["tiny", "embedded", "embedded-test", "--samples", "2", "--seqlen", "32", "--windows", "2", "--threads", "1"]


def test_its_table(capsys, monkeypatch, tmp_path):
    options = ["--methods", "magnitude", "wanda", "--with-w4", "wanda", "--sparsities", "2:4", "--work", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench", *FEW, *options])
    pruning.main()
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]
    assert [row[:2] for row in rows[2:]] == [["magnitude", "2:4"], ["wanda", "2:4"]]
    assert float(rows[3][2]) > 1
    assert rows[2][3] == "–"
    assert float(rows[3][3]) > 1
    assert "Original: " in out
