"""Ctrl-C and `--restart` on the command line."""

import signal

import pytest
from typer.testing import CliRunner

from quantkit.cli import app
from quantkit.errors import UsageError
from quantkit.keeping import Keeper

COMMAND = ["quantize", "tiny", "--method", "rtn", "--group-size", "32", "--samples", "2", "--seqlen", "32", "-o"]


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


def interrupting(monkeypatch, times):
    """Send SIGINT when block 1 is about to be kept."""
    keep = Keeper.keep

    def interrupted(keeper, block, report, walk):
        for _ in range(times if block.index == 1 else 0):
            signal.raise_signal(signal.SIGINT)
        keep(keeper, block, report, walk)

    monkeypatch.setattr(Keeper, "keep", interrupted)


@pytest.mark.parametrize(("times", "finished"), [(1, 1), (2, 0)], ids=["once", "twice"])
def test_ctrl_c(output, monkeypatch, times, finished):
    before = signal.getsignal(signal.SIGINT)
    interrupting(monkeypatch, times)
    result = CliRunner().invoke(app, [*COMMAND, str(output)])
    assert result.exit_code == 130
    warning, error = result.stderr.splitlines()
    assert warning.startswith("warning: stopping behind this window of blocks, which is kept; Ctrl-C again")
    assert error == f"error: interrupted; the same command goes on, behind block {finished}"
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    assert CliRunner().invoke(app, [*COMMAND, str(output)]).exit_code == 0


def test_restart(output, monkeypatch):
    interrupting(monkeypatch, 1)
    assert CliRunner().invoke(app, [*COMMAND, str(output)]).exit_code == 130
    monkeypatch.undo()
    other = [*COMMAND, str(output), "--seed", "1"]
    refused = CliRunner().invoke(app, other)
    assert refused.exit_code == UsageError.exit_code
    assert "had seed 0, not 1; start it again as it was to finish it, pass --restart to begin anew" in refused.stderr
    assert CliRunner().invoke(app, [*other, "--restart"]).exit_code == 0
