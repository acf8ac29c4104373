"""A run that was cut off goes on where it was, says why where it cannot, and ends as if nothing had happened."""

import json
import os
import shutil
import signal
import sys
import warnings
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.calibrate.journal import Journal
from quantkit.core.scheme import QuantScheme
from quantkit.errors import ModelError, OutputError, QuantkitWarning, UsageError
from quantkit.keeping import Keeper, Stopped
from quantkit.model import writer
from quantkit.model.workspace import Workspace, place_of
from quantkit.pipeline import Silent, execute, prepare
from quantkit.recipe import Calibration, Recipe
from quantkit.resources import data_dir

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts" / "bench"))
import kills

FEW = {"wbits": 4, "group_size": 32, "calibration": "embedded", "samples": 4, "seqlen": 32}
RTN = {"method": "rtn", **FEW}
SLIDING = {"method": "omniquant", "options": {"updates": 3, "window": 2, "rounding": True}, **FEW}

SLIDING_PASSES = {"omniquant": SLIDING["options"]}
CALIBRATION = Calibration(text="embedded", samples=4, seqlen=32)


def start(output, *, after=None, restart=False, overwrite=False, **options):
    """Do a run of the embedded model, stopped behind block `after` if one is given."""
    prepared, blocks = prepare(quantkit.make_recipe("tiny", **(options or RTN)), "cpu"), []

    class Count(Silent):
        def block(self, report):
            blocks.append(report.index)

    stop = (lambda: blocks[-1] == after) if after is not None else (lambda: False)
    return execute(prepared, output, progress=Count(), stop=stop, restart=restart, overwrite=overwrite)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def stopped(output):
    """Where a run was stopped behind block 2."""
    with pytest.raises(Stopped):
        start(output, after=2)
    return output


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an uninterrupted run makes."""
    output = tmp_path_factory.mktemp("whole") / "out"
    start(output)
    return kills.content(output)


def kept(output):
    """Return the names of what the run keeps for the next process."""
    return sorted(path.name for path in (place_of(output) / "run").iterdir())


def test_a_stopped_run_says_where_the_same_command_goes_on(output):
    with pytest.raises(Stopped) as caught:
        start(output, after=2)
    assert caught.value.__notes__ == ["the same command goes on, behind block 2"]
    assert not output.exists()
    assert "block-00002.json" in kept(output)


def test_the_end_is_that_of_an_uninterrupted_run(stopped, whole):
    report = start(stopped)
    assert kills.content(stopped) == whole
    assert report["attempts"] == {"count": 2, "identical": True}
    assert [path.name for path in stopped.parent.iterdir()] == ["out"]


PRUNED = {
    "dense": Recipe(model="tiny", passes={"wanda": {"allocation": "loss"}}, dense=True, calibration=CALIBRATION),
    "sliding": Recipe(
        model="tiny",
        scheme=QuantScheme(bits=3, group_size=32),
        passes={"sparsegpt": {"sparsity": "2:4"}, **SLIDING_PASSES},
        calibration=CALIBRATION,
    ),
}


@pytest.mark.parametrize("name", PRUNED)
def test_a_run_that_prunes_goes_on_too(name, tmp_path):
    whole, output = tmp_path / "whole", tmp_path / "out"
    before = execute(prepare(PRUNED[name], "cpu"), whole)
    blocks = []

    class Count(Silent):
        def block(self, report):
            blocks.append(report.index)

    with pytest.raises(Stopped):
        execute(prepare(PRUNED[name], "cpu"), output, progress=Count(), stop=lambda: blocks[-1] == 2)
    report = execute(prepare(PRUNED[name], "cpu"), output)
    assert report["attempts"] == {"count": 2, "identical": True}
    assert kills.content(output) == kills.content(whole)
    assert report["sparsity"] == before["sparsity"]


def test_what_is_finished_is_not_finished_again(stopped):
    diary = []

    class Diary(Silent):
        def stage(self, name):
            diary.append(name)

        def block(self, report):
            diary.append(report.index)

    execute(prepare(quantkit.make_recipe("tiny", **RTN), "cpu"), stopped, progress=Diary())
    assert [entry for entry in diary if isinstance(entry, int)] == [3, 4]
    assert diary[diary.index("calibrating") :] == ["calibrating", "catching up", "calibrating", 3, 4, "writing"]


def test_time_of_earlier_processes_counts(stopped):
    before = json.loads((place_of(stopped) / "run" / "block-00002.json").read_text())["facts"]["seconds"]
    assert start(stopped)["measured"]["seconds"] > before > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["awq, also as gptq", "window of 2, rounding, from gptq", "distilled, own text"])
def test_it_may_be_killed_anywhere(tmp_path, name):
    trial = kills.Trial(name, tmp_path)
    chance = kills.random.Random(7)
    assert trial.attempt("boundary", chance) == (pytest.approx(2, abs=1), [])
    count, differing = trial.attempt("writer", chance)
    assert (count > 0, differing) == (True, [])


@pytest.mark.parametrize("after", range(4))
def test_sliding_windows_go_on_behind_every_block(tmp_path, after):
    start(tmp_path / "whole", **SLIDING)
    with pytest.raises(Stopped):
        start(tmp_path / "out", after=after, **SLIDING)
    start(tmp_path / "out", **SLIDING)
    assert kills.content(tmp_path / "out") == kills.content(tmp_path / "whole")


def test_a_failure_in_the_middle_loses_nothing(output, whole, monkeypatch):
    keep = Keeper.keep

    def failing(keeper, block, report, walk):
        if block.index == 3:
            raise ZeroDivisionError
        keep(keeper, block, report, walk)

    monkeypatch.setattr(Keeper, "keep", failing)
    with pytest.raises(ZeroDivisionError):
        start(output)
    monkeypatch.undo()
    start(output)
    assert kills.content(output) == whole


def test_a_full_disk_loses_nothing(output, whole, monkeypatch):
    save, calls = writer.save_file, []

    def failing(*args, **options):
        calls.append(args)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        save(*args, **options)

    monkeypatch.setattr(writer, "save_file", failing)
    with pytest.raises(OutputError, match="the disk is full; nothing was changed") as caught:
        start(output)
    assert caught.value.__notes__ == ["the same command goes on, behind block 1"]
    monkeypatch.undo()
    start(output)
    assert kills.content(output) == whole


def test_a_failure_before_the_first_block_leaves_nothing(output, monkeypatch):
    monkeypatch.setattr(Keeper, "keep", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        start(output)
    assert not hasattr(caught.value, "__notes__")
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"wbits": 3}, "had bits 4, not 3"),
        ({"samples": 3}, "had samples 4, not 3"),
        ({"seed": 1}, "had seed 0, not 1"),
        ({"method": "gptq"}, 'had method "rtn", not "gptq"'),
    ],
    ids=lambda value: str(value)[:20],
)
def test_another_run_is_refused_and_loses_nothing(stopped, whole, change, said):
    before = kept(stopped)
    with pytest.raises(UsageError, match=said) as caught:
        start(stopped, **RTN | change)
    assert "pass --restart to begin anew, or choose another -o" in str(caught.value)
    assert kept(stopped) == before
    start(stopped)
    assert kills.content(stopped) == whole


def test_restarting_begins_anew(stopped):
    report = start(stopped, restart=True, **RTN | {"wbits": 3})
    assert report["attempts"]["count"] == 1
    assert report["scheme"].startswith("w3")


def damage(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["output/shard-00001.safetensors", "run/block-00001.json", "run/tokens.safetensors", "run/identity.json"]
)
def test_a_damaged_state_is_refused(stopped, name):
    damage(place_of(stopped) / name)
    with pytest.raises(OutputError, match=r"is not what an interrupted run wrote there, .*; --restart begins anew$"):
        start(stopped)
    start(stopped, restart=True)
    assert quantkit.check(stopped, device="cpu").faults == ()


@pytest.mark.parametrize("name", ["output/shard-00001.safetensors", "run/tokens.safetensors"])
def test_a_missing_part_of_the_state_is_refused(stopped, name):
    (place_of(stopped) / name).unlink()
    with pytest.raises((OutputError, ModelError), match=Path(name).name):
        start(stopped)
    assert not stopped.exists()


def test_a_damaged_window_is_refused(output):
    with pytest.raises(Stopped):
        start(output, after=1, **SLIDING)
    damage(place_of(output) / "run" / "block-00001.safetensors")
    with pytest.raises(OutputError, match=r"block-00001\.safetensors is not what an interrupted run wrote"):
        start(output, **SLIDING)


def test_other_weights_are_refused(tmp_path):
    shutil.copytree(data_dir("model_zoo") / "tiny", tmp_path / "model")
    recipe = quantkit.make_recipe(tmp_path / "model", **RTN | {"text": "embedded"})
    prepared = prepare(recipe, "cpu")
    asked = iter([True])
    with pytest.raises(Stopped):
        execute(prepared, tmp_path / "out", stop=lambda: next(asked))
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="are not those that the interrupted run had; --restart begins anew"):
        execute(prepare(recipe, "cpu"), tmp_path / "out")


def test_a_second_run_is_refused_while_the_first_writes(output):
    with (
        Workspace(output),
        pytest.raises(OutputError, match=f"is being written by process {os.getpid()} on ") as caught,
    ):
        start(output)
    assert str(caught.value).endswith("; wait for it, or choose another -o")
    start(output)


def test_the_lock_dies_with_its_process(output):
    def die():
        Workspace(output)
        os.kill(os.getpid(), signal.SIGKILL)

    assert kills.ended(kills.forked(die)) == signal.SIGKILL
    assert place_of(output).exists()
    start(output)
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_a_process_that_died_while_it_swept_up_is_finished(output, monkeypatch):
    monkeypatch.setattr(Workspace, "remove", lambda _: None)
    report = start(output)
    monkeypatch.undo()
    assert place_of(output).exists()
    assert start(output)["sha256"] == report["sha256"]
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_what_it_left_is_not_taken_for_another_run(output, monkeypatch):
    monkeypatch.setattr(Workspace, "remove", lambda _: None)
    start(output)
    monkeypatch.undo()
    with pytest.raises(OutputError, match="exists; choose another -o, or replace it with --overwrite --restart"):
        start(output, **RTN | {"wbits": 3})
    report = start(output, overwrite=True, restart=True, **RTN | {"wbits": 3})
    assert report["scheme"].startswith("w3")


@pytest.mark.parametrize("renames", [0, 1], ids=["before", "between"])
def test_an_output_that_is_being_replaced_is_old_or_new_and_never_missing_for_good(output, whole, renames):
    start(output, **RTN | {"wbits": 3})
    old = kills.content(output)

    def die_at_the_swap():
        rename = Path.rename

        def counting(path, target):
            if path.is_dir():
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(path, target)

        Path.rename = counting
        if not renames:
            writer.Workspace.finish = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        start(output, overwrite=True)

    assert kills.ended(kills.forked(die_at_the_swap)) == signal.SIGKILL
    assert output.exists() == (not renames)
    if not renames:
        assert kills.content(output) == old
    start(output, overwrite=True)
    assert kills.content(output) == whole
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_another_number_of_threads_is_said(stopped):
    path = place_of(stopped) / "run" / "block-00002.json"
    facts = json.loads(path.read_text())["facts"]
    facts["machine"]["threads"] = 48
    identity = json.loads((path.parent / "identity.json").read_text())["facts"]
    Journal(path.parent, identity).note("block-00002", facts, {})
    with pytest.warns(
        QuantkitWarning, match=r"had threads 48, here it is \d+; the last bits of what follows may be others"
    ):
        start(stopped)


def test_streams_that_come_out_differently_are_said(stopped, monkeypatch):
    monkeypatch.setattr("quantkit.keeping._digest", lambda _: "other")
    with pytest.warns(QuantkitWarning, match="comes out differently here, as on other hardware"):
        report = start(stopped)
    assert report["attempts"]["identical"] is False


def test_an_uninterrupted_run_warns_of_nothing(output):
    with warnings.catch_warnings():
        warnings.simplefilter("error", QuantkitWarning)
        start(output)


def test_an_export_does_not_sweep_a_run_away(stopped, tiny_rtn_w4):
    with pytest.raises(OutputError, match="holds an interrupted run of `quantkit quantize`; finish it, choose another"):
        quantkit.export(tiny_rtn_w4, format="gptq", to=stopped)
    assert "block-00002.json" in kept(stopped)
