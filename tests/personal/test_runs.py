"""`quantkit.personalize` from examples to a delta: what it learns, what it leaves alone, how it goes on and refuses."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tinies import TEXTS, packed, write_rows
from typer.testing import CliRunner

import quantkit
from quantkit.cli import app
from quantkit.errors import DataError, ModelError, OutputError, UsageError
from quantkit.personal import choices
from quantkit.personal.delta import Delta
from quantkit.personal.journal import SlopeJournal
from quantkit.personal.parameters._places import take_out
from quantkit.personalization import personalize, replay

QUICK = {"steps": 6, "validate_every": 2, "batch_size": 4, "device": "cpu"}
LABELLED = [{"sentence": f"{'good' if i % 2 else 'bad'} {i}", "label": i % 2} for i in range(24)]
WORDS = {"0": "n", "1": "p"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return packed("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def texts(tmp_path):
    return write_rows(tmp_path / "texts.jsonl", TEXTS)


@pytest.fixture
def labels(tmp_path):
    return write_rows(tmp_path / "labels.jsonl", LABELLED)


def digest(directory):
    files = sorted(path for path in Path(directory).rglob("*") if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@torch.no_grad()
def logits(model):
    return model(torch.arange(3, 40).unsqueeze(0), use_cache=False).logits


@pytest.mark.parametrize("train", choices.names("parameters"))
def test_the_loss_falls_and_the_delta_is_all_that_is_needed(checkpoint, texts, tmp_path, train):
    before = digest(checkpoint)
    made = personalize(checkpoint, texts, output=tmp_path / "d.safetensors", train=train, **QUICK)
    losses = [loss for _, loss in made.report["validations"]]
    assert losses[-1] < losses[0]
    assert made.report["steps"] == 6
    assert made.report["bytes"] == (tmp_path / "d.safetensors").stat().st_size
    assert digest(checkpoint) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.safetensors", "texts.jsonl"]
    delta = Delta.read(tmp_path / "d.safetensors")
    assert (delta.trainable, delta.report["privacy"]) == (train, None)
    model = quantkit.load(checkpoint, device="cpu")
    plain = logits(model)
    delta.attach(model)
    attached = logits(model)
    assert not torch.equal(attached, plain)
    take_out(model)
    assert torch.equal(logits(model), plain)
    loaded = logits(quantkit.load(checkpoint, device="cpu", delta=tmp_path / "d.safetensors"))
    if train == "scales":
        torch.testing.assert_close(loaded, attached, rtol=0, atol=1e-3 * float(attached.std()))
    else:
        assert torch.equal(loaded, attached)


@pytest.mark.parametrize("gradient", choices.names("gradients"))
def test_every_gradient(checkpoint, texts, tmp_path, gradient):
    private = gradient in ("dp", "dp-mezo", "dice")
    more = {"noise": 1.0, "delta": 1e-3, "seeded": True} if private else {}
    made = personalize(checkpoint, texts, output=tmp_path / "d.safetensors", gradient=gradient, **QUICK, **more)
    assert made.report["steps"] == 6
    assert ("privacy" in made.report and made.report["privacy"] is not None) == private
    assert made.report["forwards"] > 0
    assert (Delta.read(tmp_path / "d.safetensors").ledger == "none: the result tells of the examples") != private


@pytest.mark.parametrize("objective", ["classification", "metric", "lm"])
def test_labels_and_words(checkpoint, labels, tmp_path, objective):
    gradient = "mezo" if objective == "metric" else "backprop"
    options = {"objective": objective, "gradient": gradient, "words": WORDS, "template": "{sentence}: "}
    made = personalize(checkpoint, labels, output=tmp_path / "d.safetensors", **options, **QUICK)
    losses = [loss for _, loss in made.report["validations"]]
    assert all(0 <= loss <= 1 for loss in losses) if objective == "metric" else min(losses) < losses[0]


def test_a_function_of_somebodys_is_a_score(checkpoint, texts, tmp_path):
    seen = []

    def same_length(found, right):
        seen.append((found, right))
        return float(len(found) == len(right))

    options = {"objective": "metric", "gradient": "mezo", "options": {"score": same_length}}
    made = personalize(checkpoint, texts, output=tmp_path / "d.safetensors", **options, **{**QUICK, "steps": 1})
    assert made.report["options"] == {"score": "same_length"}
    assert all(isinstance(text, str) for pair in seen for text in pair)


def test_the_same_arguments_give_the_same_bytes_whatever_the_micro_batch(checkpoint, texts, tmp_path):
    for name in ("a", "b"):
        personalize(checkpoint, texts, output=tmp_path / f"{name}.safetensors", **QUICK)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    personalize(checkpoint, texts, output=tmp_path / "c.safetensors", micro_batch=2, **QUICK)
    whole, parts = (Delta.read(tmp_path / f"{name}.safetensors").tensors for name in "ac")
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=2e-3)


RUN = """
import sys, time
from quantkit.personalization import personalize, replay
options = {"steps": 12, "validate_every": 3, "batch_size": 4, "device": "cpu", "save_seconds": 0.0}
personalize(sys.argv[1], sys.argv[2], output=sys.argv[3], gradient=sys.argv[4], progress=lambda _: time.sleep(0.05),
            train="bias", **options)
"""


@pytest.mark.slow
@pytest.mark.parametrize("gradient", ["backprop", "mezo"])
def test_a_killed_run_comes_to_the_same_bytes(checkpoint, texts, tmp_path, gradient):
    arguments = [str(checkpoint), str(texts)]

    def run(output):
        command = [sys.executable, "-c", RUN, *arguments, str(output), gradient]
        return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})

    assert run(tmp_path / "whole.safetensors").wait(timeout=120) == 0
    process, state = run(tmp_path / "cut.safetensors"), tmp_path / ".cut.safetensors.partial/run/state.safetensors"
    while not state.exists() or progress_of(state) < 4:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut.safetensors").exists()
    with pytest.raises(OutputError, match="other arguments"):
        personalize(checkpoint, texts, output=tmp_path / "cut.safetensors", gradient=gradient, **QUICK)
    assert run(tmp_path / "cut.safetensors").wait(timeout=120) == 0
    assert (tmp_path / "cut.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not state.parent.parent.exists()


def progress_of(state):
    with safe_open(state, framework="pt") as file:
        return json.loads(file.metadata()["progress"])["step"]


def test_a_loss_that_is_not_finite_keeps_the_last_good_delta(checkpoint, texts, tmp_path, monkeypatch):
    from quantkit.personal.gradients.backprop import Backprop

    honest = Backprop.estimate

    def spoiled(self, losses, parameters, *, step):
        loss = honest(self, losses, parameters, step=step)
        return float("nan") if step == 4 else loss

    monkeypatch.setattr(Backprop, "estimate", spoiled)
    made = personalize(checkpoint, texts, output=tmp_path / "d.safetensors", **QUICK)
    assert made.report["stopped"] == "the loss is not finite at step 4; what was good before it is kept"
    assert made.report["best_step"] == 4
    monkeypatch.setattr(Backprop, "estimate", honest)
    personalize(checkpoint, texts, output=tmp_path / "four.safetensors", **{**QUICK, "steps": 4})
    stopped, whole = (Delta.read(tmp_path / f"{name}.safetensors").tensors for name in ("d", "four"))
    assert all(torch.equal(stopped[name], value) for name, value in whole.items())


def test_nothing_is_written_where_nothing_was_learned(checkpoint, texts, tmp_path):
    with pytest.raises(DataError, match="not finite at step"):
        personalize(checkpoint, texts, output=tmp_path / "d.safetensors", lr=1e38, optimizer="sgd", **QUICK)
    assert not (tmp_path / "d.safetensors").exists()


def test_it_ends_early_and_keeps_the_best(checkpoint, texts, tmp_path):
    options = {**QUICK, "steps": 40, "validate_every": 1, "patience": 2, "lr": 3.0, "train": "norm"}
    made = personalize(checkpoint, texts, output=tmp_path / "d.safetensors", **options)
    assert made.report["stopped"] == "no validation was better for 2 in a row"
    assert made.report["steps"] == made.report["best_step"] + 2 < 40


def test_a_delta_of_another_model_is_refused(checkpoint, texts, tmp_path, tiny_rtn_w4):
    personalize(checkpoint, texts, output=tmp_path / "d.safetensors", **{**QUICK, "steps": 1})
    with pytest.raises(ModelError, match="was made for another model"):
        quantkit.load(tiny_rtn_w4, device="cpu", delta=tmp_path / "d.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "biases"}, "unknown parameter 'biases' .did you mean bias"),
        ({"gradient": "backdrop"}, "unknown gradient 'backdrop' .did you mean backprop"),
        ({"objective": "accuracy"}, "unknown objective 'accuracy'"),
        ({"objective": "metric"}, "metric has no gradient; use --gradient mezo"),
        ({"options": {"rank": 3}}, "none of bias, backprop, language-model has an option 'rank'"),
        ({"epsilon": 3.0}, "is a promise that backprop cannot keep"),
        ({"gradient": "dp"}, "needs a budget or a noise"),
        ({"gradient": "dp", "noise": 1.0, "delta": 1e-3, "sampling": "shuffled"}, "proved for Poisson sampling"),
        ({"gradient": "dp", "noise": 1.0, "delta": 1e-3, "train": "lora"}, "gradients of single examples"),
        ({"seqlen": 4096}, "longer than the model's context; pass --seqlen 64"),
        ({"seqlen": 8}, "row 1 of .*texts.jsonl is 28 tokens, more than 8; shorten it"),
        ({"columns": {"text": "story"}}, "has no column 'story' .did you mean|has no column 'story'"),
        ({"validation": 0.001}, "one part would be empty"),
        ({"validation": 1.5}, "validation must be a share"),
        ({"batch_size": 100}, "a batch of 100 cannot be drawn from"),
        ({"lr": -1.0}, "rate -1"),
        ({"journal": "x"}, "backprop has no journal"),
    ],
)
def test_what_does_not_fit_is_refused(checkpoint, texts, tmp_path, options, message):
    before = digest(tmp_path)
    with pytest.raises((UsageError, DataError), match=message):
        personalize(checkpoint, texts, output=tmp_path / "d.safetensors", **{**QUICK, **options})
    assert digest(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "optimizer", "rate"),
    [
        ({}, "adam", 5e-3),
        ({"gradient": "mezo"}, "sgd", None),
        ({"gradient": "mezo", "lr": 1e-4}, "sgd", 1e-4),
        ({"gradient": "mezo", "optimizer": "adam", "train": "norm"}, "adam", 2e-3),
        ({"gradient": "mezo", "objective": "metric"}, "adam", 5e-3),
        ({"gradient": "dp-mezo", "noise": 1.0, "delta": 1e-3}, "adam", 5e-3),
    ],
)
def test_how_far_a_step_goes_by_itself(checkpoint, texts, tmp_path, options, optimizer, rate):
    made = personalize(checkpoint, texts, output=tmp_path / "d.safetensors", **options, **QUICK)
    told = made.report["updates"]
    assert told["optimizer"] == optimizer
    if rate is not None:
        assert told["rate"] == rate
        return
    assert 0 < told["rate"] != 5e-3
    assert made.report["forwards"] >= 17 + 2 * QUICK["steps"]  # the rate was found by forward passes


def test_a_journal_gives_the_delta_again_without_the_data(checkpoint, texts, tmp_path):
    options = {"gradient": "mezo", "journal": tmp_path / "j.safetensors", "train": "norm"}
    personalize(checkpoint, texts, output=tmp_path / "d.safetensors", **options, **QUICK)
    texts.unlink()
    replay(checkpoint, tmp_path / "j.safetensors", output=tmp_path / "again.safetensors")
    told, again = (Delta.read(tmp_path / f"{name}.safetensors") for name in ("d", "again"))
    assert all(torch.equal(again.tensors[name], value) for name, value in told.tensors.items())
    assert (again.base, again.trainable) == (told.base, told.trainable)
    command = ["replay", checkpoint, tmp_path / "j.safetensors", "-o", tmp_path / "third.safetensors", "--json"]
    shown = CliRunner().invoke(app, list(map(str, command)))
    assert json.loads(shown.stdout)["steps"] == len(SlopeJournal.read(tmp_path / "j.safetensors").rho)
    assert (tmp_path / "third.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_a_journal_that_could_not_be_written_is_refused_before_the_run(checkpoint, texts, tmp_path):
    options = {"gradient": "mezo", "journal": tmp_path / "missing" / "j.safetensors"}
    with pytest.raises(OutputError, match=r"j\.safetensors cannot be written: there is no directory"):
        personalize(checkpoint, texts, output=tmp_path / "d.safetensors", **options, **QUICK)
    assert not (tmp_path / "d.safetensors").exists()


def test_a_journal_of_another_model_is_refused(checkpoint, texts, tmp_path, tiny_rtn_w4):
    options = {"gradient": "mezo", "journal": tmp_path / "j.safetensors"}
    personalize(checkpoint, texts, output=tmp_path / "d.safetensors", **options, **{**QUICK, "steps": 1})
    with pytest.raises(ModelError, match="the journal is of another model"):
        replay(tiny_rtn_w4, tmp_path / "j.safetensors", output=tmp_path / "again.safetensors")


def quantkit_says(*arguments):
    command = [sys.executable, "-m", "quantkit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_the_command_line(checkpoint, texts, tmp_path):
    delta, options = tmp_path / "d.safetensors", ["--steps", 4, "--validate-every", 2, "--batch-size", 4]
    done = quantkit_says("personalize", checkpoint, texts, "-o", delta, *options, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["steps"], report["train"], report["ledger"]) == (4, "bias", "none: the result tells of the examples")
    again = quantkit_says("personalize", checkpoint, texts, "-o", delta, *options)
    assert again.returncode == OutputError.exit_code
    assert "exists; pass --overwrite" in again.stderr
    shown = quantkit_says("personalize", checkpoint, texts, "-o", delta, *options, "--overwrite", "--set", "include=*")
    assert "not private" not in shown.stdout
    assert "validation" in shown.stdout
    text = quantkit_says("generate", checkpoint, "--prompt", "The", "--tokens", 4, "--delta", delta)
    assert text.returncode == 0, text.stderr
    where = ["--text", texts, "--seqlen", 32, "--json"]
    with_delta, without = (quantkit_says("evaluate", checkpoint, *where, *more) for more in (["--delta", delta], []))
    assert json.loads(with_delta.stdout)["perplexity"] < json.loads(without.stdout)["perplexity"]
    merged = quantkit_says("merge", checkpoint, delta, "-o", tmp_path / "merged")
    assert merged.returncode == 0, merged.stderr
    dense = quantkit_says("evaluate", checkpoint, *where, "--delta", delta, "--runtime", "dense")
    assert (dense.returncode, dense.stdout.count("\n") > 1) == (UsageError.exit_code, True)
    refused = quantkit_says("personalize", checkpoint, texts, "-o", delta, "--overwrite", "--train", "everything")
    assert (refused.returncode, refused.stderr.count("\n")) == (UsageError.exit_code, 1)
