"""The command line's verbs from Python: keyword arguments instead of flags, values and exceptions instead of text."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quantkit.calibrate.data import evaluation_windows
from quantkit.calibrate.text import read_text
from quantkit.conversion import Exported, convert, further
from quantkit.errors import UsageError
from quantkit.evaluation import generate as generation
from quantkit.evaluation.check import CheckResult, check
from quantkit.evaluation.loading import load_model
from quantkit.evaluation.perplexity import Perplexity, perplexity
from quantkit.model import names
from quantkit.pipeline import Progress, execute, prepare
from quantkit.planning import Plan
from quantkit.recipe import Recipe, from_defaults
from quantkit.runtime import packed_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "CheckResult",
    "Exported",
    "Quantized",
    "check",
    "evaluate",
    "export",
    "generate",
    "load",
    "make_recipe",
    "plan",
    "quantize",
]


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A finished run: where the model lies, the content of its report.json, and format → directory of further ones."""

    output: Path
    report: Mapping[str, Any]
    formats: Mapping[str, Path]


def make_recipe(
    model: str | Path,
    *,
    method: str | None = None,
    preset: str | None = None,
    options: Mapping[str, Any] | None = None,
    **fields: Any,  # noqa: ANN401
) -> Recipe:
    """Return the recipe of a run: that of a preset, or of one method.

    Args:
        model: a directory, a Hub id or an alias.
        method: name of one method, with its own defaults.
        preset: `fast`, `balanced`, `best` or `paper`; None without a method: `balanced`.
        options: hyper-parameters; `lr` is set in the first pass that has one of that name, `distill.lr` in that pass.
        fields: `wbits` or `target_bpw` (bits chosen by measured loss), `group_size` (None: one scale per row),
            `symmetric`; `abits`, `symmetric_activations`, `kv_bits`; `rotate`; `ignore` (globs); `calibration` (a name,
            a file, or `self`: text that the model writes), `samples`, `seqlen`, `batch_size`, `allow_short`; `seed`,
            `revision`; `formats` (what to write besides compressed-tensors).

    Raises:
        UsageError: a value that is out of range, an unknown method, preset, field or hyper-parameter, or a method and a
            preset.
    """
    names = {
        "wbits": "bits",
        "abits": "activation_bits",
        "symmetric_activations": "activation_symmetric",
        "calibration": "text",
    }
    changes = {
        names.get(name, name): str(value) if isinstance(value, Path) else value for name, value in fields.items()
    }
    for name in {"ignore", "formats"} & changes.keys():
        changes[name] = tuple(changes[name])
    return from_defaults(str(model), changes, method=method, preset=preset, options=options)


def quantize(
    model: str | Path | Recipe,
    *,
    output: str | Path,
    overwrite: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
    **fields: Any,  # noqa: ANN401  checked by make_recipe's own signature
) -> Quantized:
    """Quantize a model and write it, packed, to `output`.

    >>> quantkit.quantize("llama-7b", wbits=4, output="llama-7b-w4")

    Args:
        model: a directory, a Hub id, an alias of the model zoo, or a whole recipe.
        output: the directory to write; it appears whole or not at all.
        overwrite: replace an existing output, which is kept until the new one is whole.
        device: `cpu`, `cuda`, `cuda:1`; None: a GPU if there is one.
        progress: told what happens; None: nobody.
        fields: the keyword arguments of `make_recipe`, unless `model` is a recipe.

    Raises:
        QuantkitError: see `quantkit.errors`; nothing was written then.
    """
    recipe = model if isinstance(model, Recipe) else make_recipe(model, **fields)
    prepared = prepare(recipe, device)
    report = execute(prepared, Path(output), overwrite=overwrite, progress=progress)
    formats = {name: Path(output) / name for name in further(prepared.recipe.formats)}
    return Quantized(output=Path(output), report=report, formats=formats)


def export(
    output: str | Path,
    *,
    format: str,
    to: str | Path | None = None,
    overwrite: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Exported:
    """Write what `quantize` wrote in another format, exactly and without calibrating again.

    >>> quantkit.export("llama-7b-w4", format="gptq").output
    PosixPath('llama-7b-w4/gptq')

    Args:
        output: the directory that `quantize` wrote.
        format: `gptq`, `awq` or `gguf`.
        to: the directory to write, which appears whole or not at all; None: `output`/`format`.
        overwrite: replace an existing one.
        options: of the format, such as {"version": 1} of GPTQ.

    Raises:
        QuantkitError: see `quantkit.errors`; nothing was written then.
    """
    place = Path(output) / format if to is None else Path(to)
    return convert(Path(output), place, format, overwrite=overwrite, options=options)


def plan(model: str | Path | Recipe, *, device: str | None = None, **fields: Any) -> Plan:  # noqa: ANN401
    """Return what `quantize` with the same arguments would do: sites, sizes, memory, disk, time; computes nothing.

    Raises:
        QuantkitError: see `quantkit.errors`.
    """
    recipe = model if isinstance(model, Recipe) else make_recipe(model, **fields)
    return prepare(recipe, device).plan


def load(
    model: str | Path,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    revision: str | None = None,
) -> "PreTrainedModel":
    """Return a packed checkpoint as a transformers model whose linears compute from the packed codes.

    >>> model = quantkit.load("llama-7b-w4")
    >>> model.generate(**tokenizer("Once upon a time", return_tensors="pt"))

    It is an ordinary `PreTrainedModel`: `generate`, caches, batches and chat templates work as always; it is for
    inference, nothing in it is trained. No code that comes with a checkpoint is run.

    Args:
        model: a directory or Hub id of compressed-tensors (quantkit's and llm-compressor's), GPTQ or AWQ.
        device: `cpu`, `cuda`, `cuda:1`; None: a GPU if there is one.
        dtype: of activations and of what is not packed; None: float32 on a CPU, as stored on a GPU.
        device_map: `auto`, or module names and their devices, as accelerate has it; instead of `device`.
        revision: revision on the Hub.

    Raises:
        ModelError: not packed, in a way that cannot be run packed, incomplete or damaged.
        UsageError: a device or a map that cannot be used.
    """
    source = names.resolve(str(model), revision=revision)
    return packed_model.load(source.path, device=device, dtype=dtype, device_map=device_map)


def evaluate(  # noqa: PLR0913
    model: str | Path,
    *,
    text: str | Path = "wikitext2-test",
    seqlen: int = 1024,
    windows: int | None = None,
    bos: bool = False,
    device: str | None = None,
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Return the perplexity of a model on a text, by the field's protocol.

    Args:
        model: a directory, a Hub id or an alias; quantized or not.
        text: a calibration name, or a file: .jsonl and .parquet hold documents, any other is one stream.
        seqlen: tokens per window.
        windows: use only the first ones; None: all.
        bos: put the tokenizer's BOS before every window.
        device: as in `quantize`.
        revision: revision on the Hub.
        progress: told (windows done, windows in all).

    Raises:
        QuantkitError: see `quantkit.errors`.
    """
    if seqlen < 2:
        raise UsageError(f"seqlen must be at least 2, not {seqlen}")
    if windows is not None and windows < 1:
        raise UsageError(f"windows must be at least 1, not {windows}")
    corpora = read_text(str(text))  # before the model: a missing file should not cost a load
    loaded, tokenizer = load_model(model, revision=revision, device=device)
    context = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
    if context and seqlen > context:
        raise UsageError(f"--seqlen {seqlen} is longer than the model's context; pass --seqlen {context}")
    rows = evaluation_windows(corpora, tokenizer, seqlen=seqlen, windows=windows, bos=bos)
    return perplexity(loaded, rows, progress)


def generate(  # noqa: PLR0913
    model: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    device: str | None = None,
    revision: str | None = None,
) -> str:
    """Return how a model continues `prompt`; greedy at temperature 0.

    Raises:
        QuantkitError: see `quantkit.errors`.
    """
    loaded, tokenizer = load_model(model, revision=revision, device=device)
    return generation.generate(
        loaded, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
    )
