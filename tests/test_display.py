"""What a person sees of a run: nothing that went wrong is left out."""

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from quantkit import display, host
from quantkit.calibrate.walk import BlockReport
from quantkit.recipe import Recipe

NOTES = {"fallback": "rtn, because training diverged", "diverged": "after 2 passes over the batches"}


@pytest.fixture(params=[80, 120])
def terminal(request, monkeypatch):
    """A terminal of that width; what it was sent."""
    screen = Console(file=io.StringIO(), force_terminal=True, width=request.param, highlight=False, soft_wrap=True)
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr(display, "err", screen)
    monkeypatch.setattr(display, "out", screen)
    return screen


def report(notes=None, whole=None):
    blocks = [{"index": n, "error_rtn": 0.2, "error": 0.1, "notes": {}} for n in range(5)]
    for index in (1, 3):
        blocks[index]["notes"] = notes or {}
    return {
        "scheme": "w4a4g32, …",
        "method": "omniquant + distill",
        "bits_per_weight": 4.5,
        "quantized_parameters": 8,
        "parameters": 10,
        "blocks": blocks,
        "whole": whole or {},
        "formats": ["gptq"],
        "notes": ["no runtime does this"],
        "measured": {"output_bytes": 10, "memory_bytes": 10, "seconds": 10.0},
        "predicted": {"memory_bytes": 12},
    }


def test_a_summary_says_what_went_wrong_and_what_is_not_applied(capsys):
    whole = {"divergence_before": 0.2, "divergence_after": 0.1, "diverged": "after 1 passes"}
    display.quantized(Path("out"), report({"diverged": "x"} | NOTES, whole), as_json=False)
    text = capsys.readouterr().out
    assert "rounded to nearest in blocks 1, 3" in text
    assert "training diverged, its best pass was kept in blocks 1, 3" in text
    assert "2.000e-01 → 1.000e-01 nats per token by distilling (-50%)" in text
    assert "diverged: after 1 passes" in text
    assert "note: no runtime does this" in text
    assert "also as gptq" in text


def test_a_summary_without_trouble_mentions_none(capsys):
    display.quantized(Path("out"), report(), as_json=False)
    text = capsys.readouterr().out
    assert not any(word in text for word in ("fallback", "diverged", "divergence"))


def test_blocks_and_stages_are_followed_with_the_time_that_is_left(terminal):
    with display.QuantizeProgress(Recipe(model="tiny"), quiet=False) as progress:
        for stage, counted in (
            ("calibrating", "block 3 of 4"),
            ("distilling", "50%"),
            ("writing text", "token 2 of 4"),
        ):
            progress.stage(stage)
            for done in (0, 1, 2):
                progress.progress(done, 4)
            progress.bar.refresh()
            last = terminal.file.getvalue().splitlines()[-1]
            assert stage in last
            assert counted in last
            assert "left" in last
        progress.block(BlockReport(index=7, error_rtn=0.2, error=0.2, notes=NOTES))
    text = " ".join(terminal.file.getvalue().split())
    assert "block 7" in text
    assert all(f"{name}: {why}" in text for name, why in NOTES.items())


def test_a_plan_that_does_not_fit_says_so(monkeypatch, capsys):
    from quantkit.pipeline import prepare

    monkeypatch.setattr(host, "free_memory", lambda: 1)
    prepared = prepare(Recipe(model="tiny", passes={"rtn": {}}), "cpu")
    display.plan(prepared.plan, prepared.recipe, as_json=False)
    text = capsys.readouterr().out
    assert text.count("does not fit") == 4  # the presets, and a run that is none of them
    assert "would be refused: the run needs " in text
    facts = display.plan_facts(prepared.plan, prepared.recipe)
    assert facts["refusal"] == prepared.plan.refusal
    assert [cost["fits"] for cost in facts["presets"]] == [False] * 3
