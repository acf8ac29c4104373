"""The embedded model itself: a small Llama, how it starts and how it is trained."""

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the model is trained."""

    steps: int = 2000
    batch: int = 8
    warmup: int = 100
    peak_rate: float = 4e-3
    weight_decay: float = 0.1
    vocabulary: int = 1024
    spread: float = 0.5
    seed: int = 20
    threads: int = 2


def make_model(recipe: Recipe) -> LlamaForCausalLM:
    """A small Llama with grouped-query attention; all widths are multiples of 128."""
    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(config)
    spread_channels(model, recipe.spread)
    return model


@torch.no_grad()
def spread_channels(model: LlamaForCausalLM, spread: float) -> None:
    """Gives the norms' gains log-normal sizes and the linears behind them the inverse; the function stays.

    Training starts there, so some channels of the activations stand out, as they do in large models, and
    rounding the weights without regard to them costs what it costs there.
    """
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for norm, linears in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            gains = torch.exp(spread * torch.randn_like(norm.weight))
            norm.weight.mul_(gains)
            for linear in linears:
                linear.weight.div_(gains)


def next_token_loss(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in float32."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def train(model: LlamaForCausalLM, source: Iterator[Tensor], recipe: Recipe) -> None:
    """AdamW with warm-up and cosine decay to a fiftieth."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.peak_rate, betas=(0.9, 0.98))

    def rate(step: int) -> float:
        done = step / recipe.steps
        return min((step + 1) / recipe.warmup, 0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    begun = time.monotonic()
    for step, ids in enumerate(itertools.islice(source, recipe.steps)):
        loss = next_token_loss(model, ids)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == recipe.steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.monotonic() - begun:.0f} s", flush=True)
