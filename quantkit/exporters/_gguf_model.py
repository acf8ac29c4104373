"""A config.json as llama.cpp has to be told of it, for the families whose computation GGUF's keys can describe."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.untrusted import parse_json, read_document

INSTEAD = "use the format compressed-tensors"
# model type → name of gguf.MODEL_ARCH. Mistral is a LLaMA there, but for its window, see `Model.context`
FAMILIES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """What a GGUF file says of a model's computation.

    Attributes:
        kind: the `model_type` of transformers, a key of `FAMILIES`.
        width: features between blocks.
        inner: features inside of the feed-forward part.
        blocks: number of decoder layers.
        heads, kv_heads: of queries; of keys and values.
        head_dim: features of a head, all of them rotated.
        context: how many tokens see each other. llama.cpp gives these no sliding window, so it ends where
            a window would begin to slide.
        epsilon: of RMS norms.
        rope: `rope_theta`, `rope_type` and what the type needs.
    """

    kind: str
    width: int
    inner: int
    blocks: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    epsilon: float
    rope: Mapping[str, Any]

    @property
    def architecture(self) -> str:
        """Name of the architecture in gguf.MODEL_ARCH."""
        return FAMILIES[self.kind]

    @property
    def neighbours(self) -> bool:
        """Whether llama.cpp rotates neighbouring features, where transformers rotates features half a head apart."""
        return self.architecture == "LLAMA"


def read_config(directory: Path) -> dict[str, Any]:
    """Return the config.json of a model.

    Raises:
        ModelError: there is none.
    """
    path = directory / "config.json"
    try:
        return dict(parse_json(read_document(path)))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path} is no configuration of a model ({error}); choose the output of a run") from error


def read_model(config: Mapping[str, Any]) -> Model:
    """Return what GGUF says of a model with this configuration.

    Raises:
        ModelError: llama.cpp would compute it otherwise or not at all, or an entry is missing.
    """
    if reason := _obstacle(config):
        raise ModelError(f"{reason}; {INSTEAD}")
    slides = config.get("use_sliding_window", True) and config.get("sliding_window")
    positions = config.get("max_position_embeddings", math.inf)
    try:
        heads = int(config["num_attention_heads"])
        return Model(
            kind=config["model_type"],
            width=int(config["hidden_size"]),
            inner=int(config["intermediate_size"]),
            blocks=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            context=int(min(positions, slides or math.inf)),
            epsilon=float(config["rms_norm_eps"]),
            rope=_rope(config),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ModelError(f"config.json lacks or misstates an entry of a {config['model_type']}: {error}") from error


def _obstacle(config: Mapping[str, Any]) -> str | None:
    """Return why llama.cpp would compute a model otherwise or not at all, in a clause, or None if it computes it."""
    kind, rope = config.get("model_type"), _rope(config)
    if kind not in FAMILIES:
        return f"GGUF files are written for {', '.join(FAMILIES)}, not for {kind}"
    ropes = ("default", "linear", "llama3") if FAMILIES[kind] == "LLAMA" else ("default", "linear")
    if rope["rope_type"] not in ropes or rope.get("partial_rotary_factor", 1) != 1:
        return f"the {rope['rope_type']!r} rotary embedding of this {kind} cannot be described in GGUF"
    if (activation := config.get("hidden_act", "silu")) != "silu":
        return f"llama.cpp computes silu in a {kind}, not {activation}"
    if kind == "qwen3" and config.get("attention_bias"):
        return "llama.cpp's qwen3 has no biases, but this one has"
    return None


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary embedding as transformers 5 writes it, from where older versions wrote it too."""
    old = {"rope_theta": config.get("rope_theta", 10000.0), **(config.get("rope_scaling") or {})}
    rope = dict(config.get("rope_parameters") or old)
    return {**rope, "rope_type": rope.get("rope_type", rope.get("type", "default"))}


def neighbouring(heads: int, rows: int) -> Tensor:
    """Return the order of `rows` in which features that are rotated together, half a head apart, are neighbours."""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def rope_factors(model: Model) -> Tensor:
    """Return by what Llama 3.1 divides each rotary frequency, float32 (head_dim / 2,).

    From one wavelength to another the divisor goes from 1 to `factor` (transformers, `modeling_rope_utils`, `llama3`).
    """
    low, high, factor = (float(model.rope[key]) for key in ("low_freq_factor", "high_freq_factor", "factor"))
    exponents = torch.arange(0, model.head_dim, 2, dtype=torch.float64) / model.head_dim
    wavelengths = 2 * math.pi * float(model.rope["rope_theta"]) ** exponents
    turns = float(model.rope["original_max_position_embeddings"]) / wavelengths
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - kept) / factor + kept)).float()
