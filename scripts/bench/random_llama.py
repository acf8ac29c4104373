"""Write a Llama with random weights and the embedded model's tokenizer.

python scripts/bench/random_llama.py DIRECTORY LAYERS WIDTH
"""

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from quantkit.resources import data_dir


def write(  # noqa: PLR0913
    directory: Path,
    layers: int,
    width: int,
    *,
    inner: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    vocabulary: int | None = None,
) -> None:
    """Write it, in bfloat16 and in shards of at most 500 MB; what is None follows from the width."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(data_dir("model_zoo") / "tiny")
    config = LlamaConfig(
        vocab_size=vocabulary or len(tokenizer),
        hidden_size=width,
        intermediate_size=inner or width * 11 // 4 // 128 * 128,
        num_hidden_layers=layers,
        num_attention_heads=heads or width // 64,
        num_key_value_heads=kv_heads or heads or width // 128,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory, max_shard_size="500MB")
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
