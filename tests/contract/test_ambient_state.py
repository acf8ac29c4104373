"""What belongs to the user's process is left as it was found, and does not decide a result."""

import random
import shutil
import signal

import numpy as np
import pytest
import torch

import quantkit
from quantkit.errors import QuantkitError

FEW = {"method": "rtn", "wbits": 4, "group_size": 32, "samples": 2, "seqlen": 16, "calibration": "embedded"}
LEARNING = {**FEW, "method": "omniquant", "options": {"updates": 1}}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD)


def generators():
    state = {"python": random.getstate(), "numpy": repr(np.random.get_state()), "torch": torch.get_rng_state().tolist()}
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
    others = {"evaluate_tasks", "apply_masks", "prune_module", "prune"}  # see test_harness, test_modules
    verbs = {name for name in quantkit.__all__ if name[0].islower()} - others
    assert verbs == {verb.split(",")[0] for verb in VERBS}


@pytest.mark.parametrize("look", [generators, torch_flags], ids=lambda look: look.__name__)
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_leaves_what_it_finds(verb, look, work):
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    before = look()
    call(verb, work)
    assert differences(before, look()) == set()


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


def test_the_users_generators_do_not_decide_a_result(usual, work):
    random.seed(123), np.random.seed(123), torch.manual_seed(123)
    assert results(work) == usual


def test_a_learning_run_leaves_no_global_hooks(work):
    call("quantize, learning", work)
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks
