"""Which activations are quantized: against a llama block written out by hand, and in every family."""

import pytest
import torch
from families import FAMILIES, INNER, WIDTH
from torch.func import functional_call
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantkit.core.scheme import QuantScheme
from quantkit.model import activations as module
from quantkit.model.activations import Activations, attentions
from quantkit.model.skeleton import LINEARS

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
ALL = (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
OUT_OF_REACH = ("bloom", "falcon", "falcon-rw", "falcon-40b", "falcon-11b")
TOKENS, HEADS, KV_HEADS, HEAD_DIM = 6, 4, 2, 16
CAUSAL = torch.full((1, 1, TOKENS, TOKENS), -torch.inf, dtype=torch.float64).triu(1)
IDS = torch.randint(3, 100, (2, TOKENS), generator=torch.Generator().manual_seed(3))


def model_of(family, implementation=None, dtype=torch.float64):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation=implementation)
    return model.to(dtype).eval().requires_grad_(False)


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def llama(request):
    return model_of("llama", request.param)


def hidden_states():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, TOKENS, WIDTH, generator=generator, dtype=torch.float64)


def run(model, hidden, weights=None):
    """Return the first block's output."""
    positions = torch.arange(TOKENS)[None]
    arguments = {"position_embeddings": model.model.rotary_emb(hidden, positions), "attention_mask": CAUSAL}
    return functional_call(model.model.layers[0], weights or {}, (hidden,), arguments)


def quantize(values, bits, symmetric):
    """Round every row of the last dimension, gradients straight through; the formulas of the paper."""
    if bits == 16:
        return values
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    if symmetric:
        h, z, smallest = torch.maximum(-low, high) / (2 ** (bits - 1) - 1), 0, -(2 ** (bits - 1))
    else:
        h, smallest = (high - low) / (2**bits - 1), 0
        z = torch.round(-low / h).detach()
    ratio = values / h
    codes = (ratio + (ratio.round() - ratio).detach() + z).clamp(smallest, smallest + 2**bits - 1)
    return (codes - z) * h


def by_hand(block, hidden, scheme, linears=ALL, heads=True):
    """Return what a llama block computes with quantized activations, in plain tensor operations."""
    symmetric = scheme.activation_symmetric
    bits = (scheme.activation_bits, scheme.key_value_bits, scheme.key_value_bits) if heads else (16, 16, 16)

    def apply(name, values):
        if name in linears:
            values = quantize(values, scheme.activation_bits, symmetric)
        return values @ block.get_submodule(name).weight.T

    def norm(values, layer):
        return values / (values.square().mean(-1, keepdim=True) + layer.variance_epsilon).sqrt() * layer.weight

    def rotate(values):
        angles = torch.arange(TOKENS)[:, None] * 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        cos, sin = angles.cos(), angles.sin()
        first, second = values.split(HEAD_DIM // 2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def split(values, count):
        return values.unflatten(-1, (count, HEAD_DIM)).transpose(1, 2)

    x = norm(hidden, block.input_layernorm)
    q, k, v = (
        split(apply(name, x), count) for name, count in zip(ATTENTION, (HEADS, KV_HEADS, KV_HEADS), strict=False)
    )
    q, k, v = (quantize(part, n, symmetric) for part, n in zip((rotate(q), rotate(k), v), bits, strict=True))
    k, v = (part.repeat_interleave(HEADS // KV_HEADS, dim=1) for part in (k, v))
    scores = q @ k.transpose(-1, -2) / HEAD_DIM**0.5
    mixed = ((scores + CAUSAL).softmax(-1) @ v).transpose(1, 2).flatten(2)
    after = hidden + apply("self_attn.o_proj", mixed)
    x = norm(after, block.post_attention_layernorm)
    gated = torch.nn.functional.silu(apply("mlp.gate_proj", x)) * apply("mlp.up_proj", x)
    return after + apply("mlp.down_proj", gated)


def assert_as_by_hand(model, scheme, linears=ALL, heads=True):
    block, hidden = model.model.layers[0], hidden_states()
    expected = by_hand(block, hidden, scheme, linears, heads)
    with Activations(block, linears, scheme).quantized():
        found = run(model, hidden)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # the rotary table is float32
    plain = by_hand(block, hidden, QuantScheme())
    assert (expected - plain).abs().max() > 1e-3


@pytest.mark.parametrize("text", ["w4a4", "w4as4", "w4a8kv3", "w4kv4", "w4as16kv3", "w6a6"])
def test_linears_and_heads_after_rope_are_those_of_a_block_by_hand(llama, text):
    assert_as_by_hand(llama, QuantScheme.parse(text))


def test_linears_that_are_not_named_keep_their_inputs(llama):
    assert_as_by_hand(llama, QuantScheme.parse("w4a4"), linears=("self_attn.v_proj", "mlp.up_proj"))


def test_an_attention_whose_linears_all_stay_dense_is_left_alone(llama):
    assert_as_by_hand(llama, QuantScheme.parse("w4a4"), linears=("mlp.gate_proj", "mlp.up_proj"), heads=False)


def test_gradients_of_inputs_and_weights_are_those_by_hand(llama):
    block, scheme = llama.model.layers[0], QuantScheme.parse("w4a4")
    name = "self_attn.k_proj.weight"
    hidden, weight = hidden_states().requires_grad_(), block.get_parameter(name).clone().requires_grad_()
    with Activations(block, ALL, scheme).quantized():
        output = run(llama, hidden, {name: weight})
    found = torch.autograd.grad(output.square().sum(), (hidden, weight))
    twin = hidden_states().requires_grad_()
    own = block.get_parameter(name).requires_grad_()
    expected = torch.autograd.grad(by_hand(block, twin, scheme).square().sum(), (twin, own))
    own.requires_grad_(False)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert other.abs().max() > 0.01


def test_a_shared_input_is_quantized_once(llama, monkeypatch):
    widths = []

    def count(values, bits, *, symmetric):
        widths.append(values.shape[-1])
        return values

    monkeypatch.setattr(module, "fake_quantize_tokens", count)
    with Activations(llama.model.layers[0], ALL, QuantScheme.parse("w4a4")).quantized():
        run(llama, hidden_states())
    assert widths == [WIDTH, HEAD_DIM, HEAD_DIM, HEAD_DIM, WIDTH, WIDTH, INNER]


def test_an_input_that_changed_in_place_is_quantized_again():
    linears = torch.nn.ModuleDict({name: torch.nn.Linear(8, 8) for name in "ab"})
    values = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), Activations(linears, "ab", QuantScheme.parse("w4a4")).quantized():
        linears["a"](values)
        found = linears["b"](values.mul_(2))
    assert torch.equal(found, linears["b"](module.fake_quantize_tokens(values, 4, symmetric=False)))


def traces(model):
    """Return whatever the context could leave behind."""
    hooks = [name for name, part in model.named_modules() if part._forward_pre_hooks or part._forward_hooks]
    own = [name for name, part in model.named_modules() if "forward" in vars(part)]
    return hooks, own, vars(ALL_ATTENTION_FUNCTIONS).get("get_interface"), dict(ALL_ATTENTION_FUNCTIONS._local_mapping)


def test_nothing_stays_after_the_context_or_an_exception(llama):
    hidden, activations = hidden_states(), Activations(llama.model.layers[0], ALL, QuantScheme.parse("w4a4"))
    before, plain = traces(llama), run(llama, hidden)
    with activations.quantized():
        assert not torch.equal(run(llama, hidden), plain)
    assert traces(llama) == before
    with pytest.raises(RuntimeError, match="must match"), activations.quantized():
        run(llama, hidden[..., :7])
    assert traces(llama) == before
    assert torch.equal(run(llama, hidden), plain)


def test_contexts_may_be_nested_and_reach_their_own_blocks_alone(llama):
    first, second = (Activations(block, ALL, QuantScheme.parse("w4a4")) for block in llama.model.layers)
    before, hidden = traces(llama), hidden_states()
    plain = run(llama, hidden)
    with first.quantized():
        expected = run(llama, hidden)
    with second.quantized():
        assert torch.equal(run(llama, hidden), plain)
        with first.quantized():
            assert torch.equal(run(llama, hidden), expected)
        assert torch.equal(run(llama, hidden), plain)
    assert traces(llama) == before


def test_a_scheme_without_activations_does_nothing(llama):
    with Activations(llama.model.layers[0], ALL, QuantScheme(bits=2)).quantized():
        assert torch.equal(run(llama, hidden_states()), run(llama, hidden_states()))
        assert traces(llama)[0] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_quantized_as_far_as_it_says(family, monkeypatch):
    model = model_of(family, dtype=torch.float32)
    names = [
        name
        for name, part in model.named_modules()
        if isinstance(part, LINEARS) and "vision" not in name and "projector" not in name and name != "lm_head"
    ]
    heads = []
    activations = Activations(model, names, QuantScheme.parse("w4a4"))
    original = Activations._quantize_heads

    def spy(self, query, key, value):
        heads.append((query.shape[:2], query.shape[2], key.shape[2], value.shape[2]))
        return original(self, query, key, value)

    monkeypatch.setattr(Activations, "_quantize_heads", spy)
    before = traces(model)
    plain = model(IDS).logits
    with activations.quantized():
        quantized = model(IDS).logits
    assert traces(model) == before
    assert torch.equal(model(IDS).logits, plain)
    assert 0 < (quantized - plain).norm() < plain.norm()
    expected = 0 if family in OUT_OF_REACH else model.config.get_text_config().num_hidden_layers
    assert len(activations.attentions) == len(heads) == expected
    assert set(heads) <= {((2, HEADS), TOKENS, TOKENS, TOKENS)}


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_modules_are_found_without_weights(family):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(FAMILIES[family])
    assert bool(attentions(model)) == (family not in OUT_OF_REACH)
