"""One process at a time makes an output, in a place that the next can find."""

import errno
import fcntl
from pathlib import Path

import pytest

from quantkit.errors import OutputError
from quantkit.model.workspace import Workspace, is_finished, place_of


@pytest.fixture
def output(tmp_path):
    return tmp_path / "home" / "output"


def test_the_place_is_beside_the_output(output, tmp_path):
    assert place_of(output) == tmp_path / "home" / ".output.partial"
    link = tmp_path / "link"
    link.symlink_to(output)
    assert place_of(link) == place_of(output)


def test_what_is_made_takes_the_place_of_the_output(output):
    with Workspace(output) as place:
        (place.made / "file").write_text("new")
        place.finish()
    assert [path.name for path in output.parent.iterdir()] == ["output"]
    assert (output / "file").read_text() == "new"


def test_only_a_place_with_something_to_go_on_with_stays(output):
    with Workspace(output):
        pass
    assert not place_of(output).exists()
    with Workspace(output) as place:
        place.run.mkdir()
    with Workspace(output) as place:
        assert place.run.exists()


def test_another_output_beside_it_is_another_place(output):
    with Workspace(output), Workspace(output.with_name("other")):
        pass


def test_two_cannot_have_it(output):
    with Workspace(output), pytest.raises(OutputError, match="is being written by process"):
        Workspace(output)
    with Workspace(output):
        pass


def test_one_that_has_just_been_swept_is_made_again(output, monkeypatch):
    flock, calls = fcntl.flock, []

    def swept(file, operation):
        flock(file, operation)
        calls.append(operation)
        if len(calls) == 1:  # its last owner removed the directory between the opening of the file and the lock
            Path(file.name).unlink()

    monkeypatch.setattr(fcntl, "flock", swept)
    with Workspace(output) as place:
        assert (place.directory / "lock").read_text().startswith("process ")
    assert len(calls) == 2


def test_a_file_system_without_locks_is_used_without(output, monkeypatch):
    def unable(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", unable)
    with Workspace(output) as place:
        assert place.made.exists()


def test_a_parent_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=r"^cannot write "):
        Workspace(tmp_path / "file" / "output")


def test_an_interrupted_swap_is_brought_to_an_end(output):
    with Workspace(output) as place:
        place.run.mkdir()
        (place.made / "file").write_text("new")
        (place.directory / "old").mkdir()
    with Workspace(output) as place:
        assert place.finished
        assert (output / "file").read_text() == "new"
        assert not (place.directory / "old").exists()


def test_finished_is_what_lacks_only_the_sweeping(output):
    assert not is_finished(output)
    with Workspace(output) as place:
        place.run.mkdir()
        assert not is_finished(output)
        place.made.rename(output)
        assert is_finished(output)
