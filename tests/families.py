"""Tiny models of many families, with random weights, to stand in for the real ones."""

import string
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY, WIDTH, INNER, HEADS, WINDOW = 128, 64, 128, 4, 8
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_MODERN = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    **_SPECIAL,
}
_HEAD_DIM = {"head_dim": 16}
_SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_GEMMA = {**_MODERN, **_HEAD_DIM, "tie_word_embeddings": True}
_OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "ffn_dim": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    **_SPECIAL,
}
_FALCON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "ffn_hidden_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "bias": False,
    **_SPECIAL,
}
_SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def _config(model_type: str, *parts: dict, **values) -> PreTrainedConfig:
    merged = {key: value for part in (*parts, values) for key, value in part.items()}
    return AutoConfig.for_model(model_type, **merged)


FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": _config("llama", _MODERN),
    "mistral": _config("mistral", _MODERN, _HEAD_DIM, sliding_window=WINDOW),
    "qwen2": _config("qwen2", _MODERN, _SLIDING, use_sliding_window=True, tie_word_embeddings=True),
    "qwen3": _config("qwen3", _MODERN, head_dim=32, tie_word_embeddings=True),
    "smollm3": _config("smollm3", _MODERN, no_rope_layers=[1, 0], tie_word_embeddings=True),
    "granite": _config("granite", _MODERN, residual_multiplier=0.5, embedding_multiplier=2.0, logits_scaling=2.0),
    "gemma": _config("gemma", _GEMMA),
    "gemma2": _config("gemma2", _GEMMA, _SLIDING, query_pre_attn_scalar=16),
    "gemma3": _config(
        "gemma3",
        text_config={**_GEMMA, **_SLIDING, "query_pre_attn_scalar": 16},
        vision_config=_SIGLIP,
        mm_tokens_per_image=4,
        tie_word_embeddings=True,
    ),
    "gemma3_text": _config("gemma3_text", _GEMMA, _SLIDING, query_pre_attn_scalar=16),
    "olmo": _config("olmo", _MODERN, clip_qkv=0.5),
    "olmo2": _config("olmo2", _MODERN),
    "olmo3": _config("olmo3", _MODERN, _SLIDING),
    "phi": _config("phi", _MODERN, num_key_value_heads=HEADS, partial_rotary_factor=0.5),
    "phi3": _config("phi3", _MODERN, sliding_window=WINDOW),
    "cohere": _config("cohere", _MODERN, tie_word_embeddings=True),
    "starcoder2": _config("starcoder2", _MODERN, sliding_window=WINDOW, tie_word_embeddings=True),
    "stablelm": _config("stablelm", _MODERN),
    "opt": _config("opt", _OPT, word_embed_proj_dim=WIDTH),
    "opt-350m": _config("opt", _OPT, word_embed_proj_dim=32, do_layer_norm_before=False),
    "gpt2": _config(
        "gpt2",
        _SPECIAL,
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_inner=INNER,
        n_layer=2,
        n_head=HEADS,
        n_positions=64,
    ),
    "bloom": _config("bloom", _SPECIAL, vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=2, n_head=HEADS),
    "falcon": _config("falcon", _FALCON),
    "falcon-rw": _config("falcon", _FALCON, parallel_attn=False, multi_query=False, alibi=True, bias=True),
    "falcon-40b": _config("falcon", _FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "falcon-11b": _config("falcon", _FALCON, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1),
    "gpt_neox": _config("gpt_neox", _MODERN, rotary_pct=0.25),
}

WITHOUT_FILE = "stablelm"

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_experts": 4}
FUSED_EXPERTS: dict[str, PreTrainedConfig] = {
    "mixtral": _config("mixtral", _MODERN, num_local_experts=4),
    "qwen3_moe": _config("qwen3_moe", _MODERN, _EXPERTS, _HEAD_DIM),
    "gpt_oss": _config("gpt_oss", _MODERN, _HEAD_DIM, num_local_experts=4, rope_parameters=_ROPE),
}


def save_tiny(family: str, directory: Path, seed: int = 0, config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """Write a model of `family` (or of `config`) with random weights, norms and biases included, and return it."""
    config = config or (FAMILIES | FUSED_EXPERTS)[family]
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for value in model.parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim == 1:
                value.add_(0.3 * noise)
            else:
                value.copy_(noise / value.shape[-1] ** 0.5)
    model.save_pretrained(directory)
    return model


def save_tokenizer(directory: Path) -> None:
    """Write a tokenizer whose tokens are the printable ASCII characters, for the tiny models' vocabulary."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate([*special, *string.printable])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(directory)


def edit_tensors(directory: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Rewrite the checkpoint in `directory` with what `change` makes of its tensors."""
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
