"""What report.json says a run was made from, and with."""

import hashlib
import json
import subprocess
from itertools import count

import pytest
import torch

import quantkit
from quantkit import provenance
from quantkit.calibrate.data import calibration_tokens, load_tokenizer
from quantkit.calibrate.text import read_text
from quantkit.model.checkpoint import Checkpoint, fingerprint
from quantkit.pipeline import Silent
from quantkit.resources import data_dir

TINY = data_dir("model_zoo") / "tiny"


@pytest.fixture(scope="module")
def report(tiny_rtn_w4):
    return json.loads((tiny_rtn_w4 / "report.json").read_text(encoding="utf-8"))


def test_the_source_is_named_by_the_digests_of_all_its_files(report):
    assert report["source_sha256"] == fingerprint(TINY) | Checkpoint(TINY).verify()
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= set(report["source_sha256"])


def test_a_digest_of_the_source_is_that_of_sha256sum(report):
    lines = subprocess.run(["sha256sum", *TINY.iterdir()], capture_output=True, text=True, check=True).stdout
    told = {line.split("/")[-1]: line.split()[0] for line in lines.splitlines()}
    assert report["source_sha256"].items() <= told.items()


def test_the_calibration_is_named_by_the_digest_of_its_tokens(report):
    said = report["calibration"]
    tokens = calibration_tokens(
        read_text(said["text"]),
        load_tokenizer(TINY),
        samples=said["samples"],
        seqlen=said["seqlen"],
        seed=report["seed"],
    )
    numbers = b"".join(number.to_bytes(8, "little") for row in tokens.tolist() for number in row)
    assert said["sha256"] == hashlib.sha256(numbers).hexdigest()


def test_versions_and_machine_are_those_that_ran(report):
    assert report["versions"]["torch"] == torch.__version__
    assert set(report["versions"]) >= {"quantkit", "python", "transformers", "tokenizers", "safetensors"}
    assert report["machine"]["threads"] == torch.get_num_threads()
    assert report["machine"]["cpu"] == torch.backends.cpu.get_cpu_capability()


def test_stages_are_timed_and_add_up(report):
    stages = report["measured"]["stages"]
    assert list(stages) == ["reading text", "opening weights", "verifying weights", "calibrating", "writing"]
    assert all(seconds > 0 for seconds in stages.values())
    assert sum(stages.values()) == pytest.approx(report["measured"]["seconds"], abs=0.05)


def test_a_stage_that_comes_twice_is_added_up(monkeypatch):
    monkeypatch.setattr(provenance.time, "monotonic", count(0).__next__)
    watch = provenance.Timed(Silent())  # every look at the clock takes a second
    for name in ("a", "b", "a"):
        watch.stage(name)
    first = watch.stages
    assert list(first) == ["a", "b"]
    assert watch.stages["b"] == first["b"]
    assert watch.stages["a"] > first["a"] > first["b"]


def test_a_listener_is_told_through_the_watch():
    told = []

    class Diary(Silent):
        def stage(self, name):
            told.append(name)

        def progress(self, done, total):
            told.append((done, total))

        def block(self, report):
            told.append(report)

    watch = provenance.Timed(Diary())
    watch.stage("x")
    watch.progress(1, 2)
    watch.block("report")
    assert told == ["x", (1, 2), "report"]


def test_two_runs_differ_in_their_report_by_timings_alone(report, tmp_path):
    said = quantkit.quantize("tiny", output=tmp_path / "out", method="rtn", wbits=4, group_size=32).report
    said, other = json.loads(json.dumps(said)), json.loads(json.dumps(report))
    for document in (said, other):
        assert document["predicted"].pop("seconds") > 0
        assert document["predicted"].pop("memory_bytes") > 0
        assert document["predicted"].pop("memory_limit") > 0
        assert document.pop("measured")["output_bytes"] == document["predicted"]["output_bytes"]
    assert said == other
