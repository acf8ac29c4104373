"""Loading a model as everyone does, with plain transformers: what quantkit judges is what others will get.

One exception: an output whose scheme quantizes activations is judged with all of what was calibrated, the inputs of
linears and Q, K and V, though no runtime does all of it (`exporters/compressed_tensors.py` says what each does).
`load_model` then loads the weights alone and lets every call of the model quantize its activations itself.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from quantkit.calibrate.data import load_tokenizer
from quantkit.core.scheme import QuantScheme
from quantkit.errors import ModelError, UsageError
from quantkit.exporters.compressed_tensors import OWN, schemes_of, weights_only
from quantkit.model import names
from quantkit.model.activations import quantize_activations as quantize_around
from quantkit.model.checkpoint import Checkpoint
from quantkit.model.device import pick_device
from quantkit.model.skeleton import LINEARS, read_config

Model: TypeAlias = PreTrainedModel  # so that transformers is imported here alone
Tokenizer: TypeAlias = PreTrainedTokenizerBase

# what transformers and compressed-tensors raise for files that they cannot use
_FAULTS = (
    *(OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, ImportError, RuntimeError),
    *(ArithmeticError, AssertionError, SafetensorError, StrictDataclassError),
)


def load_model(
    model: str | Path, *, revision: str | None = None, device: str | None = None, activations: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a causal language model and its tokenizer; no code that comes with the model is run.

    The weights have the checkpoint's dtype on a GPU and float32 on the CPU. Every one of them was read from
    the checkpoint, none was initialised at random.

    Args:
        model: a directory, an alias or a Hub id, quantized or not.
        revision: revision on the Hub.
        device: `cpu`, `cuda`, `cuda:1`; None: a GPU if there is one.
        activations: quantize activations as the scheme of an output of quantkit says; False: its weights alone.

    Raises:
        ModelError: unknown, incomplete, damaged, or no causal language model.
        UsageError, NetworkError, OutputError: see `names.resolve`; an unknown device.
    """
    place = pick_device(device)
    directory = names.resolve(str(model), revision=revision).path
    Checkpoint(directory)  # its messages about missing and truncated shards are better than transformers' own
    with quiet():
        config = read_config(directory)
        own = _own_quantization(config, directory)
        if own:
            config.quantization_config = weights_only(own)
        loaded, loading = _from_pretrained(directory, config if own else None)
        _refuse_incomplete(directory, loading)
        _unpack(loaded, directory)
        tokenizer = load_tokenizer(directory)
    _place(loaded, place)
    if own and activations:
        quantize_activations(loaded, _any_scheme(own), dense=own["ignore"])
    return loaded, tokenizer


def quantize_activations(model: PreTrainedModel, scheme: QuantScheme, *, dense: Iterable[str] = ()) -> None:
    """Let every later call of `model` quantize its activations as `scheme` says; nothing is hooked between calls.

    `dense` names the linears whose inputs stay as they are. See `model.activations` for what is quantized.
    """
    skipped = set(dense)
    linears = [name for name, part in model.named_modules() if isinstance(part, LINEARS) and name not in skipped]
    quantize_around(model, linears, scheme)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars and advice of libraries off the terminal; their settings come back afterwards."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_bars_were_off = are_progress_bars_disabled()
    draw, own = (
        tqdm.__init__,
        vars(tqdm)["__init__"],
    )  # compressed-tensors draws its bars with the plain class, which has no switch
    tqdm.__init__ = lambda bar, *args, **options: draw(bar, *args, **options | {"disable": True})
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        tqdm.__init__ = own
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
            if hub_bars_were_off:
                disable_progress_bars()


def context_length(model: PreTrainedModel) -> int | None:
    """Return how many tokens the model can see, None if its configuration does not say."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def _own_quantization(config: PretrainedConfig, directory: Path) -> Mapping[str, Any] | None:
    """Return the `quantization_config` of an output of quantkit that quantizes activations, None for other models."""
    found = getattr(config, "quantization_config", None)
    if not isinstance(found, dict) or OWN not in found:
        return None
    try:
        return found if _any_scheme(found).quantizes_activations else None
    except (KeyError, TypeError, AttributeError, StopIteration, UsageError) as error:
        raise ModelError(f"{directory / 'config.json'} is damaged: it names no scheme ({error})") from error


def _any_scheme(quantization: Mapping[str, Any]) -> QuantScheme:
    """Return one of the schemes: they agree in all that they say of activations."""
    return next(iter(schemes_of(quantization).values()))


def _from_pretrained(directory: Path, config: PretrainedConfig | None) -> tuple[PreTrainedModel, dict[str, Any]]:
    try:
        # mismatched sizes are ignored here only to be named by `_refuse_incomplete`
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype="auto",
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except _FAULTS as error:
        raise ModelError(f"transformers cannot load {directory}: {_reason(error)}") from error
    model, loading = loaded
    return model, loading


def _unpack(model: PreTrainedModel, directory: Path) -> None:
    """Unpack weights that transformers would leave packed until the first forward, by running one token.

    Here they still have the checkpoint's dtype, to which every user's are rounded; in float32 they would not be.
    """
    if not hasattr(model, "ct_decompress_hook"):
        return
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
    except _FAULTS as error:
        raise ModelError(f"transformers cannot unpack {directory}: {_reason(error)}") from error


def _refuse_incomplete(directory: Path, loading: dict[str, Any]) -> None:
    """Raise ModelError for a parameter that transformers had to initialise at random."""
    if mismatched := sorted(loading["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        raise ModelError(
            f"{name} in {directory} has shape {tuple(stored)} but config.json asks for {tuple(expected)}"
            f"{_more(mismatched)}; the config and the weights belong to different models"
        )
    if missing := sorted(loading["missing_keys"]):
        raise ModelError(f"{directory} has no tensor for {missing[0]}{_more(missing)}; the checkpoint is incomplete")


def _more(items: list[Any]) -> str:
    return f" (and {len(items) - 1} more)" if len(items) > 1 else ""


def _place(model: nn.Module, device: torch.device) -> None:
    """Move the model to where it will run, in the dtype in which it will run there."""
    try:
        model.to(device, torch.float32 if device.type == "cpu" else None).eval().requires_grad_(False)
    except torch.cuda.OutOfMemoryError as error:
        raise ModelError(f"the model does not fit into the memory of {device}; use --device cpu") from error


def _reason(error: Exception) -> str:
    """Return the first paragraph of what `error` says, in one line."""
    return " ".join(str(error).strip().split("\n\n")[0].split()) or type(error).__name__
