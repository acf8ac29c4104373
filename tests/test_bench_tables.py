"""The benches that print tables: finished cells, what each row changes, tables; one cell of each on the tiny model."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from quantkit import presets
from quantkit.recipe import Recipe

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts" / "bench"))
import ablation
import activations
import bits
import common
import self_calibration

ROOT = Path(__file__).resolve().parent.parent
BENCHES = [ablation, activations, bits, self_calibration]
W2, W4A4 = common.scheme("w2g32"), common.scheme("w4a4")


@pytest.fixture
def args(tmp_path):
    texts = [str(ROOT / "calibration" / name) for name in ("embedded.jsonl", "embedded-test.jsonl")]
    sizes = ["--samples", "2", "--seqlen", "16", "--windows", "2", "--threads", "1", "--work", str(tmp_path)]
    made = common.parser(None).parse_args(["tiny", *texts, *sizes])
    vars(made).update(updates=2, window=2, distill=1, seeds=1, seed=0, set=[], presets=False, preset="fast")
    vars(made).update(settings=[W2, W4A4], targets=[3.0], method="rtn", group_size=32)
    return made


@pytest.fixture
def asked(monkeypatch):
    """The recipes that a bench measures, by the names of their cells, instead of their figures."""
    recipes = {}

    def measure(args, name, wanted):
        assert name not in recipes
        recipes[name] = wanted
        return {"perplexity": 2.0 + len(recipes) / 100, "bits_per_weight": 2.5}

    for bench in BENCHES:
        monkeypatch.setattr(bench, "measure", measure)
    return recipes


def test_a_cell_is_computed_once_and_again_for_another_key(args):
    made = []

    def compute():
        made.append(1)
        return {"perplexity": float(len(made))}

    assert common.cell(args, "a cell/w2", {"seed": 0}, compute) == {"perplexity": 1.0}
    assert common.cell(args, "a cell/w2", {"seed": 0}, compute) == {"perplexity": 1.0}
    assert common.cell(args, "a cell/w2", {"seed": 1}, compute) == {"perplexity": 2.0}
    args.table = True
    assert common.cell(args, "a cell/w2", {"seed": 1}, compute) == {"perplexity": 2.0}
    assert common.cell(args, "a cell/w2", {"seed": 2}, compute) is None
    assert [path.name for path in args.work.iterdir()] == ["acellw2.json"]


def test_arguments_that_are_none_are_refused():
    with pytest.raises(argparse.ArgumentTypeError, match="w9 is no setting: bits must be"):
        common.scheme("w9")
    with pytest.raises(argparse.ArgumentTypeError, match="--set takes NAME=VALUE"):
        common.hyper_parameter("lr")


def test_tables_show_what_is_missing_as_dashes():
    assert (common.spread([]), common.spread([2.0]), common.spread([2.0, 4.0])) == ("–", "2.0000", "3.0000 ± 1.4142")
    assert (common.difference([3.0], [2.0, 4.0]), common.difference([], [2.0])) == ("+0.00%", "–")
    assert common.title(common.scheme("w4a8g32s")) == "W4A8 g32 symmetric"


def test_rows_with_activations_turn_on_what_they_are_called_after(args, asked):
    args.set, args.presets = [("let_lr", 0.25)], True
    text = activations.table(args)
    assert text.count("\n") == 2 + 9  # the model itself and nine rows
    built = {name.removeprefix("activations-w4a4-"): recipe for name, recipe in asked.items() if "w4a4" in name}
    for name, recipe in built.items():
        assert recipe.rotate == ("rotation" in name)
        if "LWC" in name:
            step = recipe.build_passes()["omniquant"]
            assert (step.window == 2) == ("window" in name)
            assert (step.lwc, step.let, step.let_lr, step.updates, step.rounding) == (True, True, 0.25, 2, False)
    untrained = built["LET without training"].build_passes()["omniquant"]
    assert (untrained.updates, untrained.let, untrained.lwc) == (0, True, False)
    assert asked["unquantized"] is None


@pytest.mark.parametrize("setting", [W2, W4A4], ids=str)
def test_a_row_of_the_ablation_differs_from_the_base_in_one_thing(args, setting):
    rows = ablation.variants(args, setting)
    base, *others = rows.values()
    assert len({str(row) for row in rows.values()}) == len(rows)
    for row in others:
        changed = {name for name in row.block if row.block[name] != base.block.get(name)}
        parts = [changed - {"weights"}, row.distill != base.distill, row.rotate != base.rotate]
        assert sum(map(bool, parts)) == 1
        assert len(changed - {"weights"}) <= 1
        Recipe(model="tiny", scheme=setting, passes=row.passes).build_passes()


def test_rounding_comes_as_far_with_fewer_updates(args):
    preset = presets.find("balanced", W2).passes["omniquant"]
    for args.updates in (7, 50):
        block, distill = ablation.options(args, W2)
        assert block["rounding_lr"] * 7 == pytest.approx(preset["rounding_lr"] * preset["updates"] * 7 / args.updates)
        assert (block["updates"], distill["updates"]) == (args.updates, args.distill)


def test_the_ablation_has_a_cell_for_every_seed_and_says_how_far_they_are_apart(args, asked):
    args.seeds = 3
    text = ablation.table(args, W2)
    assert [recipe.seed for recipe in asked.values()] == [0, 1, 2] * len(ablation.variants(args, W2))
    assert "| base: LWC, rounding, window, distillation | 2.0200 ± 0.0100 | +0.00% |" in text


def test_calibration_texts_share_everything_but_the_text(args, asked):
    args.settings = [W2]
    text = self_calibration.table(args)
    recipes = list(asked.values())
    assert [recipe.calibration.text for recipe in recipes] == [args.train, "embedded", "self"]
    assert len({replace(r, calibration=replace(r.calibration, text="")).to_toml() for r in recipes}) == 1
    assert "| W2 g32 | the model's own text | 2.0300 | +1.00% |" in text


def test_a_target_stands_beside_the_widest_width_that_fits():
    uniform = {b: {"bits_per_weight": b + 0.5, "perplexity": 10.0 / b} for b in (2, 3, 4)}
    mixed = {"bits_per_weight": 3.49, "perplexity": 3.0}
    assert bits.line(3.5, mixed, uniform) == ["3.5", "3.490", "3.0000", "W3", "3.500", "3.3333", "-10.00%"]
    assert bits.line(3.4, None, uniform) == ["3.4", "–", "–", "W2", "2.500", "5.0000", "–"]
    assert bits.line(2.4, mixed, uniform)[3:] == ["–"] * 4


def test_a_cell_with_activations_is_measured_on_the_exported_model(args, capsys):
    row = activations.Row("LWC + LET", "omniquant", {"updates": 1, "let": True})
    figures = activations.run(args, row, W4A4)
    assert figures["perplexity"] > 1
    assert figures["bits_per_weight"] < 5
    assert "activations-w4a4-LWC + LET: perplexity " in capsys.readouterr().err
    args.table = True
    assert activations.run(args, row, W4A4) == figures


def test_a_cell_of_the_ablation_is_measured(args):
    base = next(iter(ablation.variants(args, W2).items()))
    assert ablation.run(args, W2, *base)[0] > 1


def test_a_cell_with_text_of_the_model_itself_is_measured(args):
    assert self_calibration.run(args, W2, "self")[0] > 1


def test_a_cell_with_a_target_is_measured(args):
    assert 2.5 < bits.run(args, target=3.0)["bits_per_weight"] <= 3.0
