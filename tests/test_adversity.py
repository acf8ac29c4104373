"""What vanishes or cannot be written while a run is under way: one clear line, no output, nothing else touched."""

import errno
import shutil
from pathlib import Path

import pytest

import quantkit
from quantkit.errors import DataError, ModelError, OutputError
from quantkit.keeping import Keeper
from quantkit.pipeline import execute, prepare
from quantkit.resources import data_dir

FEW = {"method": "rtn", "wbits": 4, "group_size": 32, "samples": 2, "seqlen": 32}


@pytest.fixture
def model(tmp_path):
    shutil.copytree(data_dir("model_zoo") / "tiny", tmp_path / "model")
    return tmp_path / "model"


def prepared(model, **changes):
    return prepare(quantkit.make_recipe(model, **{"calibration": "embedded", **FEW, **changes}), "cpu")


def one_line(caught):
    return "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_source_that_vanishes_before_the_run(model, tmp_path, name):
    run = prepared(model)
    (model / name).unlink()
    with pytest.raises(ModelError) as caught:
        execute(run, tmp_path / "out")
    assert one_line(caught)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_weights_that_vanish_in_the_middle_can_be_put_back(model, tmp_path, monkeypatch):
    keep = Keeper.keep

    def vanish(keeper, block, report, walk):
        keep(keeper, block, report, walk)
        if block.index == 1:
            (model / "model.safetensors").rename(model / "elsewhere")

    monkeypatch.setattr(Keeper, "keep", vanish)
    with pytest.raises(ModelError, match=r"cannot read .*model\.safetensors") as caught:
        execute(prepared(model), tmp_path / "out")
    assert one_line(caught)
    assert caught.value.__notes__ == ["the same command goes on, behind block 1"]
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    (model / "elsewhere").rename(model / "model.safetensors")
    execute(prepared(model), tmp_path / "out")
    assert quantkit.check(tmp_path / "out", device="cpu").faults == ()


def test_a_text_that_vanishes(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a fox. " * 100)
    run = prepared(model, calibration=str(text))
    text.unlink()
    with pytest.raises(DataError, match=r"text\.txt") as caught:
        execute(run, tmp_path / "out")
    assert one_line(caught)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_target_that_is_read_only(model, tmp_path, monkeypatch):
    mkdir = Path.mkdir

    def refusing(path, *args, **options):  # root may write into directories without the right to
        if path.name == ".out.partial":
            raise OSError(errno.EROFS, "Read-only file system")
        mkdir(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", refusing)
    with pytest.raises(OutputError, match=r"^cannot write .*out: .*Read-only file system; nothing was changed$"):
        execute(prepared(model), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
