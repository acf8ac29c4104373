"""With what a model is run when it is judged: unpacked by transformers, or packed as it is stored."""

from pathlib import Path

from quantkit.calibrate.data import load_tokenizer
from quantkit.errors import UsageError, nearest
from quantkit.evaluation.loading import Model, Tokenizer, load_model, quiet
from quantkit.model import names
from quantkit.model.skeleton import read_config
from quantkit.personal.delta import apply
from quantkit.runtime import RUNTIMES, packed_model


def refuse_unknown_runtime(runtime: str) -> None:
    """Raise UsageError unless `runtime` is one of `RUNTIMES`."""
    if runtime not in RUNTIMES:
        raise UsageError(f"unknown runtime {runtime!r}{nearest(runtime, RUNTIMES)}")


def load_with(
    runtime: str,
    model: str | Path,
    *,
    revision: str | None = None,
    device: str | None = None,
    delta: str | Path | None = None,
) -> tuple[Model, Tokenizer]:
    """Return a model to be judged, and its tokenizer: float32 on a CPU, the checkpoint's dtype on a GPU.

    `dense` unpacks every weight (`load_model`). `packed` keeps the linears of a packed checkpoint packed
    (`packed_model.load`); a model that is not quantized is loaded as it is. A `delta` is of a packed one.

    Raises:
        UsageError: an unknown runtime or device, or a delta for a model that is not run packed.
        DataError, ModelError, NetworkError, OutputError: see `load_model` and `packed_model.load`.
    """
    refuse_unknown_runtime(runtime)
    if runtime == "packed":
        directory = names.resolve(str(model), revision=revision).path
        if getattr(read_config(directory), "quantization_config", None) is not None:
            loaded = packed_model.load(directory, device=device)  # its warning of a slow kernel is for the user
            if delta is not None:
                apply(loaded, directory, delta)
            with quiet():
                return loaded, load_tokenizer(directory)
    if delta is not None:
        raise UsageError("a delta belongs to a packed model; use --runtime packed and an output of quantkit quantize")
    return load_model(model, revision=revision, device=device)
