"""What belongs to the user's process is left as it was found, and does not decide a result."""

import copy
import gc
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager

import datasets
import numpy as np
import pytest
import torch
import tqdm
import transformers
from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils import logging as transformers_logging

import quantkit
from quantkit.errors import QuantkitError
from quantkit.personalization import personalize

FEW = {"method": "rtn", "wbits": 4, "group_size": 32, "samples": 2, "seqlen": 16, "calibration": "embedded"}
TEXT = {"samples": 2, "seqlen": 16, "calibration": "embedded"}
LEARNING = {**FEW, "method": "omniquant", "options": {"updates": 1}}
DRAWS = f"""
import random, sys
import quantkit
random.seed(7)
before = random.getstate()
out = sys.argv[1] + "/out"
fields = {LEARNING | {"method": None, "options": {"updates": 1, "distill.updates": 1}}!r}
quantkit.quantize("tiny", output=out, **fields)
quantkit.check(out, against="tiny", windows=1, seqlen=16)
quantkit.generate(out, "Once", max_new_tokens=2, temperature=1.0)
print(random.getstate() == before)
"""
LINEAR = torch.nn.Linear(8, 8)
ACTIVE = torch.nn.Sequential(LINEAR, torch.nn.ReLU())
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD)


def generators():
    """Return the state of every global generator but Python's, from which the type checks of the tests draw."""
    state = {"numpy": repr(np.random.get_state()), "torch": torch.get_rng_state().tolist()}
    if torch.cuda.is_available():
        state["cuda"] = [each.tolist() for each in torch.cuda.get_rng_state_all()]
    return state


def torch_flags():
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "autocast": [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")],
        "autocast cache": torch.is_autocast_cache_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "init": torch.nn.Module.register_parameter,
        "linear": (torch.nn.Linear.forward, torch.nn.functional.linear, torch.nn.init.normal_),
    }


def process():
    mask = os.umask(0)
    os.umask(mask)
    return {
        "directory": os.getcwd(),  # noqa: PTH109  of the process, not of a path
        "environment": dict(os.environ),
        "arguments": list(sys.argv),
        "path": list(sys.path),
        "umask": mask,
        "recursion": sys.getrecursionlimit(),
        "streams": (sys.stdout, sys.stderr, sys.excepthook, threading.excepthook),
        "signals": [signal.getsignal(each) for each in SIGNALS],
        "warnings": (list(warnings.filters), warnings.showwarning),
        "gc": (gc.isenabled(), gc.get_threshold()),
        "threads": {each.name for each in threading.enumerate() if not each.daemon},
    }


def loggers():
    known = {name: each for name, each in logging.root.manager.loggerDict.items() if isinstance(each, logging.Logger)}
    return {
        "disabled": logging.root.manager.disable,
        "loggers": {
            name: (each.level, each.propagate, each.disabled, list(each.handlers))
            for name, each in {"root": logging.root, **known}.items()
        },
        "transformers": (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()),
        "hub": are_progress_bars_disabled(),
        "datasets": datasets.utils.logging.get_verbosity(),
        "bars": vars(tqdm.tqdm)["__init__"],
    }


def differences(before, after):
    """Return what differs; of loggers only those that were there before."""
    found = {key for key in before if key != "loggers" and before[key] != after[key]}
    return found | {name for name, told in before.get("loggers", {}).items() if after["loggers"][name] != told}


@pytest.fixture(scope="module")
def work(tmp_path_factory, tiny_rtn_w4):
    """A directory with a finished output that may be changed."""
    home = tmp_path_factory.mktemp("ambient")
    shutil.copytree(tiny_rtn_w4, home / "w4")
    return home


def learned(room, **options):
    """Let the packed model learn from a few lines; return the delta."""
    lines, delta = room / "lines.jsonl", room / "delta.safetensors"
    lines.write_text("".join(f'{{"text": "The cat said {number}."}}\n' for number in range(8)))
    few = {"steps": 2, "validate_every": 1, "batch_size": 4, "validation": 0.25, "overwrite": True}
    return personalize(room / "w4", lines, output=delta, **few, **options).output


FEW_TOKENS = {"samples": 2, "seqlen": 16}


def copied(room):
    """Return the packed model once more, to be protected."""
    return shutil.copytree(room / "w4", room / "out")


VERBS = {
    "make_recipe": lambda _: quantkit.make_recipe("tiny", preset="best"),
    "plan": lambda _: quantkit.plan("tiny", **FEW),
    "quantize": lambda room: quantkit.quantize("tiny", output=room / "out", **FEW),
    "quantize, learning": lambda room: quantkit.quantize("tiny", output=room / "out", **LEARNING),
    "quantize, rotated": lambda room: quantkit.quantize("tiny", output=room / "out", rotate=True, **FEW),
    "quantize, own text": lambda room: quantkit.quantize("tiny", output=room / "out", **{**FEW, "calibration": "self"}),
    "quantize, distilled": lambda room: quantkit.quantize(
        "tiny", output=room / "out", **{**FEW, "method": None}, options={"updates": 1, "distill.updates": 1}
    ),
    "quantize, refused": lambda room: quantkit.quantize("tiny", output=room / "w4", **FEW),
    "check": lambda room: quantkit.check(room / "w4"),
    "check, against": lambda room: quantkit.check(room / "w4", against="tiny", seqlen=16, windows=1),
    "evaluate": lambda room: quantkit.evaluate(room / "w4", text="embedded-test", seqlen=16, windows=1),
    "evaluate, packed": lambda room: quantkit.evaluate(
        room / "w4", text="embedded-test", seqlen=16, windows=1, runtime="packed"
    ),
    "compare": lambda room: quantkit.compare(room / "w4", "tiny", text="embedded-test", seqlen=16, windows=1),
    "generate": lambda room: quantkit.generate(room / "w4", "Once", max_new_tokens=2),
    "generate, drawn": lambda room: quantkit.generate(room / "w4", "Once", max_new_tokens=2, temperature=1.0),
    "export, gptq": lambda room: quantkit.export(room / "w4", format="gptq", to=room / "gptq", overwrite=True),
    "export, gguf": lambda room: quantkit.export(room / "w4", format="gguf", to=room / "gguf", overwrite=True),
    "prune": lambda room: quantkit.prune("tiny", output=room / "out", method="wanda", **TEXT),
    "prune_module": lambda _: quantkit.prune_module(copy.deepcopy(LINEAR), sparsity=0.5),
    "apply_masks": lambda _: quantkit.apply_masks(copy.deepcopy(LINEAR), {"weight": torch.eye(8).bool()}),
    "protect": lambda room: quantkit.protect(
        copied(room), resilience="layer", calibration="embedded", samples=2, seqlen=16
    ),
    "bound_module": lambda _: quantkit.bound_module(copy.deepcopy(ACTIVE), torch.ones(4, 8), resilience="ranger"),
    "protect_scales": lambda room: quantkit.protect_scales(copied(room), "parity"),
    "faults": lambda room: quantkit.faults(
        room / "w4", rates=(1e-4,), trials=1, text="embedded-test", seqlen=16, windows=1
    ),
    "personalize": learned,
    "merge": lambda room: quantkit.merge(room / "w4", learned(room), output=room / "out", rounded=True),
    "merge, refused": lambda room: quantkit.merge(room / "w4", learned(room, train="lora"), output=room / "out"),
    "replay": lambda room: quantkit.replay(
        room / "w4",
        learned(room, gradient="mezo", journal=room / "journal").with_name("journal"),
        output=room / "again.safetensors",
        overwrite=True,
    ),
    "load": lambda room: quantkit.load(room / "w4"),
    "load, refused": lambda _: quantkit.load("tiny"),
}


def call(verb, work):
    shutil.rmtree(work / "out", ignore_errors=True)
    try:
        return VERBS[verb](work)
    except QuantkitError:
        assert "refused" in verb
        return None


def test_every_public_verb_is_here():
    verbs = {name for name in quantkit.__all__ if name[0].islower()} - {"evaluate_tasks"}  # see test_harness
    assert verbs == {verb.split(",")[0] for verb in VERBS}


@pytest.mark.parametrize("look", [generators, torch_flags, process, loggers], ids=lambda look: look.__name__)
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_leaves_what_it_finds(verb, look, work):
    np.random.seed(7)
    torch.manual_seed(7)
    before = look()
    call(verb, work)
    assert differences(before, look()) == set()


def inference():
    return torch.inference_mode()


def no_grad():
    return torch.no_grad()


@contextmanager
def float64():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def imprecise():
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def meta_device():
    return torch.device("meta")


SETTINGS = [inference, no_grad, float64, imprecise, deterministic, autocast, meta_device]


@pytest.fixture(scope="module")
def usual(work):
    return results(work)


def results(work):
    """Return what a learning run writes, and what judging it says."""
    report = call("quantize, learning", work).report
    checked = quantkit.check(work / "out")
    value = quantkit.evaluate(work / "out", text="embedded-test", seqlen=16, windows=2, runtime="packed").perplexity
    dense = quantkit.evaluate(work / "out", text="embedded-test", seqlen=16, windows=2).perplexity
    text = quantkit.generate(work / "out", "Once", max_new_tokens=4)
    return report["sha256"], report["blocks"], checked.faults, value, dense, text


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.__name__)
def test_the_users_settings_do_not_decide_a_result(setting, usual, work):
    with setting():
        before = torch_flags()
        found = results(work)
        assert differences(before, torch_flags()) == set()
    assert found == usual


@pytest.mark.slow
def test_pythons_generator_is_left_as_it_was(tmp_path):
    told = subprocess.run([sys.executable, "-c", DRAWS, tmp_path], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "True"


def test_the_users_generators_do_not_decide_a_result(usual, work):
    random.seed(123)
    np.random.seed(123)
    torch.manual_seed(123)
    assert results(work) == usual


def test_a_learning_run_leaves_no_global_hooks(work):
    call("quantize, learning", work)
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_transformers_is_as_noisy_as_before(work):
    transformers_logging.set_verbosity_info()
    try:
        call("check", work)
        assert transformers_logging.get_verbosity() == transformers.logging.INFO
    finally:
        transformers_logging.set_verbosity_warning()
