"""Tiny models in float64 whose biases are slots, the same models with ordinary biases, and batches for them."""

import copy

import torch
from torch import nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from quantkit.personal.protocols import Batch, Losses, Slot

VOCABULARY = 40


class Biased(nn.Module):
    """A linear whose bias is a slot."""

    def __init__(self, inner):
        super().__init__()
        self.slot = Slot(inner.bias)
        self.slot.value.data = inner.bias.detach().clone()  # float64 stays
        self.inner = inner
        inner.bias.data.zero_()

    def forward(self, x):
        return self.inner(x) + self.slot.read()


def tiny(family):
    """Return a model with random biases everywhere; nothing but biases has a gradient."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY}
    if family == "gpt2":
        config = GPT2Config(**sizes, n_embd=16, n_layer=2, n_head=2, n_positions=64)
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
        model = GPT2LMHeadModel(config)
    else:
        sizes |= {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, attention_bias=True, mlp_bias=True))
    model = model.double().eval()
    for name, parameter in model.named_parameters():
        of_linear = name.endswith("bias") and "ln" not in name
        parameter.requires_grad_(of_linear)
        if of_linear:
            parameter.data.normal_(std=0.05)
    return model


def slotted(model):
    """Return a copy with slots in the place of linears' biases, and the slots' values by the biases' names."""
    model = copy.deepcopy(model).requires_grad_(False)
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m.bias is not None}
    parameters = {}
    for name, module in found.items():
        biased = Biased(module)
        model.set_submodule(name, biased)
        parameters[f"{name}.bias"] = biased.slot.value
    return model, parameters


def batch(examples, length=7, seed=1):
    tokens = torch.randint(VOCABULARY, (examples, length), generator=torch.Generator().manual_seed(seed))
    everywhere = torch.ones_like(tokens, dtype=torch.bool)
    return Batch(tokens=tokens, attention=everywhere, scored=everywhere)


def part(whole, start, end):
    return Batch(tokens=whole.tokens[start:end], attention=whole.attention[start:end], scored=whole.scored[start:end])


def language_loss(model, given):
    """Return the sum over tokens of -log p, one per example."""
    logits = model(input_ids=given.tokens).logits
    return functional.cross_entropy(logits[:, :-1].transpose(1, 2), given.tokens[:, 1:], reduction="none").sum(1)


def losses_of(model, given, sizes=None):
    """Return the losses of a batch, in micro-batches of these sizes."""
    made, start = [], 0
    for size in sizes or [len(given.tokens)]:
        made.append(Losses(language_loss, model, part(given, start, start + size)))
        start += size
    return made


def one_by_one(model, parameters, given):
    """Return the gradient of each example, by a backward pass of its own: name to (examples, ...)."""
    rows = {name: [] for name in parameters}
    for place in range(len(given.tokens)):
        loss = language_loss(model, part(given, place, place + 1)).sum()
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for (name, parameter), gradient in zip(parameters.items(), found, strict=True):
            rows[name].append(torch.zeros_like(parameter) if gradient is None else gradient)
    return {name: torch.stack(values) for name, values in rows.items()}
