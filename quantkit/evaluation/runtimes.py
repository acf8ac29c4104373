"""With what a model is run when it is judged: unpacked by transformers, or packed as it is stored."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from quantkit.calibrate.data import load_tokenizer
from quantkit.errors import ModelError, UsageError, nearest
from quantkit.evaluation.loading import Model, Tokenizer, load_model, quiet
from quantkit.model import names
from quantkit.model.device import pick_device
from quantkit.model.skeleton import read_config

RUNTIMES = ("packed", "dense")
DEFAULT_RUNTIME = "dense"


def refuse_unknown_runtime(runtime: str) -> None:
    """Raise UsageError unless `runtime` is one of `RUNTIMES`."""
    if runtime not in RUNTIMES:
        raise UsageError(f"unknown runtime {runtime!r}{nearest(runtime, RUNTIMES)}")


def load_with(
    runtime: str, model: str | Path, *, revision: str | None = None, device: str | None = None
) -> tuple[Model, Tokenizer]:
    """Return a model to be judged, and its tokenizer: float32 on a CPU, the checkpoint's dtype on a GPU.

    `dense` unpacks every weight (`load_model`). `packed` keeps the linears of a packed checkpoint packed; a model
    that is not packed is loaded as it is.

    Raises:
        UsageError: an unknown runtime or device, or a checkpoint that the runtime does not compute in full.
        ModelError, NetworkError, OutputError: see `load_model`.
    """
    refuse_unknown_runtime(runtime)
    if runtime == "packed":
        directory = names.resolve(str(model), revision=revision).path
        if getattr(read_config(directory), "quantization_config", None) is not None:
            return _packed(directory, device), load_tokenizer(directory)
    return load_model(model, revision=revision, device=device)


def _packed(directory: Path, device: str | None) -> Model:
    place = pick_device(device)
    try:
        runtime: Any = import_module("quantkit.runtime.packed_model")
    except ModuleNotFoundError as error:
        raise ModelError("this quantkit has no packed runtime; use --runtime dense") from error
    with quiet():
        model: Model = runtime.load(directory, device=place, dtype=torch.float32 if place.type == "cpu" else None)
    model.eval().requires_grad_(False)
    return model
