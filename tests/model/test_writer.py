"""An output appears whole or not at all."""

import errno
import hashlib
import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import torch
from families import save_tiny
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from quantkit.errors import OutputError
from quantkit.model import writer as module
from quantkit.model.checkpoint import INDEX, Checkpoint
from quantkit.model.writer import Writer, refuse_full_disk, whole

FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("I/O error: No space left on device (os error 28)"),
]


@pytest.fixture
def output(tmp_path):
    return tmp_path / "home" / "output"


@pytest.fixture
def old(output):
    """An output that exists already."""
    write(output, old=torch.zeros(2))
    return output


def write(output, overwrite=False, **tensors):
    with Writer(output, overwrite=overwrite) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.write_text("config.json", "{}")
        hashes = writer.close_shards()
        writer.finish()
    return hashes


def beside(output):
    """Return the names of everything in the directory of the output, hidden or not."""
    return sorted(path.name for path in output.parent.iterdir())


def assert_untouched(old):
    assert beside(old) == ["output"]
    assert list(Checkpoint(old)) == ["old"]


def fail(error):
    def failing(*_, **__):
        raise error

    return failing


def test_what_is_written_can_be_read(output):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.zeros(0, 3).half()}
    write(output, **tensors)
    loaded = Checkpoint(output).load(tensors)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_nothing_is_visible_before_the_end(output):
    with Writer(output) as writer:
        writer.add("a", torch.zeros(4))
        writer.close_shards()
        assert not output.exists()
        assert all(name.startswith(".output.partial") for name in beside(output))
        writer.finish()
    assert beside(output) == ["output"]


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_no_trace(output, error):
    with pytest.raises(error), Writer(output) as writer:  # noqa: PT012  the raise is what is tested
        writer.add("a", torch.zeros(4))
        writer.close_shards()
        raise error
    assert beside(output) == []


def test_leaving_without_finishing_leaves_no_trace(output):
    with Writer(output) as writer:
        writer.add("a", torch.zeros(4))
    assert beside(output) == []


def test_an_existing_output_is_refused(old):
    with pytest.raises(OutputError, match=f"^{old} exists; choose another -o, or replace it with --overwrite$"):
        Writer(old)
    assert_untouched(old)


def test_overwriting_replaces_everything(old):
    (old / "left-over.txt").write_text("from before")
    write(old, overwrite=True, new=torch.ones(1))
    assert beside(old) == ["output"]
    assert list(Checkpoint(old)) == ["new"]
    assert not (old / "left-over.txt").exists()


def test_an_overwritten_output_stays_until_the_new_one_is_whole(old):
    with Writer(old, overwrite=True) as writer:
        writer.add("new", torch.ones(1))
        writer.close_shards()
        assert list(Checkpoint(old)) == ["old"]
    assert_untouched(old)


def test_a_failure_of_the_last_rename_puts_the_old_output_back(old, monkeypatch):
    rename = Path.rename

    def failing(path, target):
        if path.name == "output" and path.parent.name.endswith(".partial"):
            raise OSError(errno.EIO, "input/output error")
        return rename(path, target)

    monkeypatch.setattr(
        Path, "rename", lambda path, target: failing(path, target) if path.is_dir() else rename(path, target)
    )
    with pytest.raises(OutputError, match="nothing was changed"):
        write(old, overwrite=True, new=torch.ones(1))
    monkeypatch.undo()
    assert_untouched(old)


def test_a_failure_to_move_the_old_output_away_leaves_no_trace(old, monkeypatch):
    monkeypatch.setattr(module.os, "replace", fail(OSError(errno.EBUSY, "busy")))
    with pytest.raises(OutputError, match="nothing was changed"):
        write(old, overwrite=True, new=torch.ones(1))
    assert_untouched(old)


def test_a_link_to_the_output_stays_a_link(old, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(old)
    write(link, overwrite=True, new=torch.ones(1))
    assert link.is_symlink()
    assert list(Checkpoint(old)) == ["new"]
    assert beside(old) == ["output"]


@pytest.mark.parametrize("overwrite", [False, True], ids=["no overwrite", "overwrite"])
def test_a_file_in_the_place_of_the_output(tmp_path, overwrite):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(OutputError, match=r"exists; choose|is a file, not a directory"):
        Writer(file, overwrite=overwrite)
    assert file.read_text() == "mine"


def test_a_file_in_the_place_of_a_parent(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=f"^cannot write {tmp_path / 'file' / 'output'}: "):
        Writer(tmp_path / "file" / "output")


def test_missing_parents_are_made(tmp_path):
    write(tmp_path / "a" / "b" / "c", x=torch.zeros(1))
    assert (tmp_path / "a" / "b" / "c" / INDEX).is_file()


@pytest.mark.parametrize("error", FULL, ids=["OSError", "SafetensorError"])
def test_a_full_disk_is_named_and_leaves_no_trace(output, monkeypatch, error):
    monkeypatch.setattr(module, "save_file", fail(error))
    with pytest.raises(OutputError) as caught:
        write(output, a=torch.zeros(4))
    assert str(caught.value) == f"cannot write {output}: the disk is full; nothing was changed"
    assert beside(output) == []


@pytest.mark.parametrize("error", FULL, ids=["OSError", "SafetensorError"])
def test_a_full_disk_leaves_the_old_output(old, monkeypatch, error):
    monkeypatch.setattr(module, "save_file", fail(error))
    with pytest.raises(OutputError, match="the disk is full"):
        write(old, overwrite=True, a=torch.zeros(4))
    assert_untouched(old)


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root alone")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full(small_disk):
    with pytest.raises(OutputError, match="the disk is full; nothing was changed"):
        write(small_disk / "output", a=torch.zeros(200_000))
    assert list(small_disk.iterdir()) == []
    assert shutil.disk_usage(small_disk).free > 200_000


def test_a_mount_point_is_refused_at_once(small_disk):
    with pytest.raises(OutputError, match="is a mount point, which cannot be replaced; choose a directory below"):
        Writer(small_disk, overwrite=True)


def test_a_side_file_that_does_not_fit_on_a_disk_that_is_really_full(small_disk):
    with (
        pytest.raises(OutputError, match="the disk is full; nothing was changed"),
        Writer(small_disk / "out") as writer,
    ):
        writer.write_text("report.json", "x" * 300_000)
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_is_too_small_is_refused_before_the_work(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    refuse_full_disk(tmp_path / "not" / "there", free // 2)
    with pytest.raises(OutputError, match=r"GB free; free some or choose another -o$"):
        refuse_full_disk(tmp_path / "not" / "there", 10 * free)


def test_shards_hold_what_fits_and_the_index_says_where(output):
    with Writer(output, shard_bytes=100) as writer:
        for number in range(5):
            writer.add(f"t{number}", torch.full((10,), float(number)))  # 40 bytes
        hashes = writer.close_shards()
        writer.finish()
    shards = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    index = json.loads((output / INDEX).read_text())
    assert index["weight_map"] == dict(
        zip(("t0", "t1", "t2", "t3", "t4"), [*shards[:1] * 2, *shards[1:2] * 2, shards[2]], strict=True)
    )
    assert index["metadata"]["total_size"] == 200
    assert list(hashes) == shards
    assert [len(load_file(output / shard)) for shard in shards] == [2, 2, 1]


def test_a_tensor_larger_than_a_shard_gets_its_own(output):
    with Writer(output, shard_bytes=16) as writer:
        for name, size in (("small", 1), ("large", 100), ("other", 1)):
            writer.add(name, torch.zeros(size))
        writer.close_shards()
        writer.finish()
    assert len(list(output.glob("*.safetensors"))) == 3


def test_hashes_are_those_of_the_files(output):
    hashes = write(output, a=torch.zeros(4))
    assert hashes == {
        name: hashlib.sha256((output / name).read_bytes()).hexdigest() for name in ("model-00001-of-00001.safetensors",)
    }


def test_the_same_tensors_make_the_same_bytes(tmp_path):
    tensors = {"b": torch.ones(3), "a": torch.zeros(4).half()}
    assert write(tmp_path / "one", **tensors) == write(tmp_path / "two", **tensors)


def test_many_shards_load_in_transformers(tmp_path, output):
    model = save_tiny("llama", tmp_path / "source")
    with Writer(output, shard_bytes=50_000) as writer:
        for name, tensor in model.state_dict().items():
            writer.add(name, tensor)
        writer.copy(tmp_path / "source" / "config.json")
        assert len(writer.close_shards()) > 3
        writer.finish()
    loaded = AutoModelForCausalLM.from_pretrained(output).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


def test_a_tensor_is_written_once(output):
    with Writer(output) as writer:
        writer.add("a", torch.zeros(1))
        with pytest.raises(ValueError, match="a is written twice"):
            writer.add("a", torch.zeros(1))


def test_the_size_is_counted(output):
    with Writer(output) as writer:
        writer.add("a", torch.zeros(3))
        writer.add("b", torch.zeros(5, dtype=torch.int8))
        assert writer.bytes == 17


def test_a_view_is_written_as_it_looks(output):
    matrix = torch.arange(12.0).view(3, 4)
    write(output, t=matrix.T, row=matrix[1])
    loaded = Checkpoint(output).load(["t", "row"])
    assert torch.equal(loaded["t"], matrix.T)
    assert torch.equal(loaded["row"], matrix[1])


def test_links_are_followed(tmp_path, output):
    (tmp_path / "blob").write_text("content")
    (tmp_path / "sub").mkdir()
    for link in (tmp_path / "tokenizer.json", tmp_path / "sub" / "inner.json"):
        link.symlink_to(tmp_path / "blob")
    with Writer(output) as writer:
        writer.copy(tmp_path / "tokenizer.json")
        writer.copy(tmp_path / "sub")
        writer.close_shards()
        writer.finish()
    for copied in (output / "tokenizer.json", output / "sub" / "inner.json"):
        assert not copied.is_symlink()
        assert copied.read_text() == "content"


def test_modes_are_those_of_ordinary_files(tmp_path, output):
    secret = tmp_path / "tokenizer.json"
    secret.write_text("{}")
    secret.chmod(0o400)
    mask = os.umask(0o022)
    try:
        with Writer(output) as writer:
            writer.add("a", torch.zeros(1))
            writer.copy(secret)
            writer.close_shards()
            writer.finish()
    finally:
        os.umask(mask)
    assert stat.S_IMODE(output.stat().st_mode) == 0o755
    assert {stat.S_IMODE(path.stat().st_mode) for path in output.iterdir()} == {0o644}


def test_a_side_file_that_is_larger_than_the_disk_is_refused_before_it_is_copied(tmp_path, output):
    huge = tmp_path / "tokenizer.json"
    huge.touch()
    os.truncate(huge, 2**40)  # a hole, which takes no room itself
    with pytest.raises(OutputError, match=r"needs 1099\.51 GB but"), Writer(output) as writer:
        writer.copy(huge)
    assert not output.exists()


def test_a_file_takes_its_place_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "file"
    with whole(path, make=True) as partial:
        partial.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"
    assert [each.name for each in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [*FULL, KeyboardInterrupt()], ids=["OSError", "SafetensorError", "interrupted"])
@pytest.mark.parametrize("before", ["old", None])
def test_a_file_that_cannot_be_written_leaves_what_was_there(tmp_path, error, before):
    path = tmp_path / "new" / "file"
    if before:
        path.parent.mkdir()
        path.write_text(before)

    def begin():
        with whole(path, make=True) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises((OutputError, KeyboardInterrupt)) as caught:
        begin()
    if not isinstance(error, KeyboardInterrupt):
        assert str(caught.value) == f"cannot write {path}: the disk is full; nothing was changed"
    assert path.parent.exists() == bool(before)
    if before:
        assert [(each.name, each.read_text()) for each in path.parent.iterdir()] == [("file", before)]
