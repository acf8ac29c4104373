"""The benches: each prints a table of measured cells, measures a cell once, and its rows differ in what they name."""

import argparse
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts" / "bench"))
import ablation
import activations
import bits
import bounds
import common
import personalize
import self_calibration
import zeroth_order

FEW = ["tiny", "embedded", "embedded-test", "--samples", "2", "--seqlen", "32", "--windows", "2", "--threads", "1"]
ANIMALS = ["fox", "hen", "cow", "owl", "bee", "cat", "dog", "pig"]


def printed(bench, capsys, monkeypatch, work, *options):
    monkeypatch.setattr(sys, "argv", ["bench", *FEW, "--work", str(work), *options])
    bench.main()
    lines = capsys.readouterr().out.splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def given(bench, *options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bench", *FEW, *options])
        return bench._arguments()


def test_activations(capsys, monkeypatch, tmp_path):
    options = ["--settings", "w4a4", "--rows", "rtn", "let", "--updates", "1"]
    header, _, *rows = printed(activations, capsys, monkeypatch, tmp_path, *options)
    assert header == ["", "W4A4 per channel"]
    assert [row[0] for row in rows] == ["RTN", "LET untrained"]
    assert all(1 < float(row[1]) < 100 for row in rows)


def test_ablation(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(ablation, "WEIGHTS", ablation.WEIGHTS[:2])
    options = ["--settings", "w2g32", "--seeds", "2", "--updates", "1", "--distill", "1"]
    _, _, *rows = printed(ablation, capsys, monkeypatch, tmp_path, *options)
    assert [row[0] for row in rows] == ["everything", "without LWC"]
    assert all("±" in row[1] for row in rows)
    assert rows[0][2] == "+0.00%"


def test_bits(capsys, monkeypatch, tmp_path):
    options = ["--targets", "3.25", "--uniform", "3", "--method", "rtn"]
    _, _, *rows = printed(bits, capsys, monkeypatch, tmp_path, *options)
    assert [row[0] for row in rows] == ["--target-bpw 3.25", "all linears 3 bits"]
    assert float(rows[0][1]) <= 3.25 < float(rows[1][1]) == 3.5


def test_self_calibration(capsys, monkeypatch, tmp_path):
    options = ["--settings", "w3g32", "--preset", "fast"]
    _, _, *rows = printed(self_calibration, capsys, monkeypatch, tmp_path, *options)
    assert [row[0] for row in rows] == ["real text", "self", "embedded text"]
    assert rows[0][1] == rows[2][1] != rows[1][1]  # here the real text is the embedded one


def test_a_cell_is_measured_once_and_again_when_anything_changes(tmp_path):
    args, calls = argparse.Namespace(work=tmp_path, table=False), []

    def compute():
        calls.append(1)
        return {"perplexity": float(len(calls))}

    assert common.cell(args, "name", {"recipe": "a"}, compute) == {"perplexity": 1.0}
    assert common.cell(args, "name", {"recipe": "a"}, compute) == {"perplexity": 1.0}
    assert common.cell(args, "name", {"recipe": "b"}, compute) == {"perplexity": 2.0}
    args.table = True
    assert common.cell(args, "name", {"recipe": "c"}, compute) is None
    assert len(calls) == 2


@pytest.mark.parametrize("setting", ["w2g32", "w4a4"])
def test_each_row_of_the_ablation_is_another_recipe(setting):
    args, scheme = given(ablation), common.scheme(setting)
    recipes = {row.name: ablation.wanted(args, row, scheme, 0) for row in ablation.rows_of(scheme)}
    base = recipes.pop("everything").build_passes()["omniquant"]
    assert (base.lwc, base.rounding, base.window, base.let) == (True, True, 2, setting == "w4a4")
    assert len({recipe.to_toml() for recipe in recipes.values()}) == len(recipes)
    assert not recipes["without LWC"].build_passes()["omniquant"].lwc
    assert [*recipes["without distillation"].passes] == ["omniquant"]
    assert ablation.wanted(args, ablation.COMMON[0], scheme, 1).seed == 1


def test_bounds(capsys, monkeypatch, tmp_path):
    header, _, *rows = printed(bounds, capsys, monkeypatch, tmp_path, "--rows", "ranger-profiled", "hybrid-joint")
    assert [row[:2] for row in rows] == [["ranger", "profiled"], ["hybrid", "joint"]]
    assert all(float(row[2].split()[0]) > 1 for row in rows)
    held_out = [float(row[header.index("held out")].split()[0]) for row in rows]
    assert max(held_out) <= 0.5  # the budget
    assert int(rows[0][4]) < int(rows[1][4].replace(",", ""))


@pytest.mark.slow
def test_personalizing_by_passes_and_by_gradients(capsys, monkeypatch, tmp_path):
    lines = ["mr,ref", *(f"name[{animal}],The {animal} sings a song." for animal in ANIMALS * 8)]
    (tmp_path / "devset.csv").write_text("\n".join(lines))
    methods = ["zero-shot", "backprop-last", "mezo-last"]
    command = ["bench", "tiny", "e2e", str(tmp_path), "--methods", *methods, "--seeds", "1", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--examples", "40", "--test-examples", "4", "--work", str(tmp_path)])
    personalize.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row[0] for row in rows[2:]] == methods
    losses = [float(row[1]) for row in rows[2:]]
    assert all(0 < loss < 20 for loss in losses)
    assert losses[1] < losses[0]
    assert rows[3][2] == rows[4][2] == "2"


def test_what_a_step_of_forward_passes_can_gain(capsys, monkeypatch, tmp_path):
    lines = [f"the {animal} sings\t{number % 2}" for number, animal in enumerate(ANIMALS)]
    (tmp_path / "train.tsv").write_text("\n".join(lines))
    command = ["bench", "pace", "tiny", "--data", str(tmp_path / "train.tsv"), "--examples", "8", "--batch", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--words", "silver", "golden"])
    zeroth_order.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    found, best = rows[2:]
    assert float(best[2]) >= max(0.0, float(found[2]))
