"""Gradients of OmniQuant's loss over a whole block against a naive twin that plain autograd differentiates, in float64.

The twin is a llama block (grouped queries, rotary positions, biases in the attention) written out here, with the
formulas of arXiv 2308.13137 line by line: transforms of the weights (eq. 3 to 5), clipping relative to the transformed
weight's extremes (eq. 2), and one range per token, for queries, keys and values per token and head. Rounding passes
gradients straight through, clamps stop them, zero points are constants.
"""

import copy
import dataclasses

import pytest
import torch
from families import FAMILIES, INNER, WIDTH, save_tiny

from quantkit.calibrate.passes import Window
from quantkit.core.scheme import QuantScheme
from quantkit.model.activations import Activations
from quantkit.model.block import Arguments, Block, Site
from quantkit.model.checkpoint import Checkpoint
from quantkit.model.skeleton import Skeleton
from quantkit.quantizers import omniquant
from quantkit.quantizers.omniquant import OmniQuant
from quantkit.train.fit import FitResult

CPU = torch.device("cpu")
HEADS, KV_HEADS, HEAD_DIM, TOKENS, EPSILON = 4, 2, 16, 7, 1e-6
LINEARS = [*(f"self_attn.{n}_proj" for n in "qkvo"), *(f"mlp.{n}_proj" for n in ("gate", "up", "down"))]
SIZES = {"attention": WIDTH, "mlp": WIDTH, "output": KV_HEADS * HEAD_DIM, "query-key": KV_HEADS * HEAD_DIM // 2}
STORED = torch.float16
CASES = ["w3a16g16", "w2a16", "w4a4", "w3a8g16", "w4as4g16s", "w3a16kv4"]


def straight_through_round(value):
    return value + (value.round() - value).detach()


def quantize_weight(weight, gamma, beta, scheme):
    grouped = weight.reshape(weight.shape[0], -1, scheme.group_size or weight.shape[1])
    high = gamma.sigmoid() * grouped.amax(-1).clamp(min=0)
    low = beta.sigmoid() * grouped.amin(-1).clamp(max=0)
    largest = 2**scheme.bits - 1
    h = torch.maximum(-low, high) / (2 ** (scheme.bits - 1) - 1) if scheme.symmetric else (high - low) / largest
    h = h + (h.to(STORED).double() - h).detach()
    z = torch.full_like(h, 2.0 ** (scheme.bits - 1)) if scheme.symmetric else (-low / h).round().clamp(0, largest)
    h, z = h[..., None], z[..., None].detach()
    return ((torch.clamp(straight_through_round(grouped / h) + z, 0, largest) - z) * h).reshape(weight.shape)


def quantize_tokens(values, bits, symmetric):
    if bits == 16:
        return values
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    largest = 2**bits - 1
    if symmetric:
        h, z = torch.maximum(-low, high) / (2 ** (bits - 1) - 1), 2.0 ** (bits - 1)
    else:
        h = (high - low) / largest
        z = (-low / h).round().detach()
    return (torch.clamp(straight_through_round(values / h) + z, 0, largest) - z) * h


def rotary():
    angles = torch.arange(TOKENS).double()[:, None] * 10000.0 ** (-torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos()[None], angles.sin()[None]


def turned(heads):
    cos, sin = rotary()
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin


def to_query_heads(values):
    """Return values by channel of key-value heads, by channel of the query heads that read them."""
    return values.reshape(KV_HEADS, HEAD_DIM).repeat_interleave(HEADS // KV_HEADS, dim=0).flatten()


def transformed(p, scales, shift):
    """Return the parameters after all four transforms; a fifth, `down`, if there is a scale of that name."""
    p, s = dict(p), scales
    for name in LINEARS[:3]:
        p[f"{name}.weight"] = p[f"{name}.weight"] * s["attention"]
    for name in LINEARS[4:6]:
        p[f"{name}.weight"] = p[f"{name}.weight"] * s["mlp"]
    p["input_layernorm.weight"] = p["input_layernorm.weight"] / s["attention"]
    p["post_attention_layernorm.weight"] = p["post_attention_layernorm.weight"] / s["mlp"]
    query, key, value, output = LINEARS[:4]
    delta = torch.zeros_like(s["output"]) if shift is None else shift
    p[f"{output}.bias"] = p[f"{output}.bias"] + p[f"{output}.weight"] @ to_query_heads(delta)
    p[f"{output}.weight"] = p[f"{output}.weight"] * to_query_heads(s["output"])
    p[f"{value}.weight"] = p[f"{value}.weight"] / s["output"][:, None]
    p[f"{value}.bias"] = (p[f"{value}.bias"] - delta) / s["output"]
    pairs = s["query-key"].reshape(KV_HEADS, HEAD_DIM // 2)
    by_key = torch.cat([pairs, pairs], dim=1).flatten()
    p[f"{key}.weight"], p[f"{key}.bias"] = p[f"{key}.weight"] * by_key[:, None], p[f"{key}.bias"] * by_key
    by_query = to_query_heads(by_key)
    p[f"{query}.weight"], p[f"{query}.bias"] = p[f"{query}.weight"] / by_query[:, None], p[f"{query}.bias"] / by_query
    if "down" in s:
        p["mlp.up_proj.weight"] = p["mlp.up_proj.weight"] / s["down"][:, None]
        p["mlp.down_proj.weight"] = p["mlp.down_proj.weight"] * s["down"]
    return p


def block_output(p, hidden, scheme):
    """Return the block's output (1, tokens, width) with activations quantized; no scheme: as they are."""
    bits, symmetric = (scheme.activation_bits, scheme.activation_symmetric) if scheme else (16, False)
    cache_bits = scheme.key_value_bits if scheme else 16

    def norm(values, name):
        return p[f"{name}.weight"] * values * (values.square().mean(-1, keepdim=True) + EPSILON).rsqrt()

    def linear(name, values):
        bias = p.get(f"{name}.bias", torch.zeros(()).double())
        return quantize_tokens(values, bits, symmetric) @ p[f"{name}.weight"].T + bias

    def heads(values):
        return values.reshape(1, TOKENS, -1, HEAD_DIM).transpose(1, 2)

    seen = norm(hidden, "input_layernorm")
    query, key, value = (heads(linear(name, seen)) for name in LINEARS[:3])
    query = quantize_tokens(turned(query), bits, symmetric)
    key, value = quantize_tokens(turned(key), cache_bits, symmetric), quantize_tokens(value, cache_bits, symmetric)
    key, value = (part.repeat_interleave(HEADS // KV_HEADS, dim=1) for part in (key, value))
    scores = query @ key.transpose(-1, -2) / HEAD_DIM**0.5
    scores = scores.masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), -torch.inf)
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(1, TOKENS, -1)
    hidden = hidden + linear("self_attn.o_proj", mixed)
    seen = norm(hidden, "post_attention_layernorm")
    gate, up = linear("mlp.gate_proj", seen), linear("mlp.up_proj", seen)
    return hidden + linear("mlp.down_proj", gate * gate.sigmoid() * up)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A llama model with biases in its attention, its first block in float64."""
    directory = tmp_path_factory.mktemp("llama")
    config = copy.deepcopy(FAMILIES["llama"])
    config.attention_bias = True
    save_tiny("llama", directory, config=config)
    skeleton = Skeleton(directory)
    return skeleton, skeleton.load_block(0, Checkpoint(directory), torch.float64, CPU)


@pytest.fixture(params=CASES)
def window(opened, request):
    skeleton, module = opened
    scheme = QuantScheme.parse(request.param)
    sites = [
        Site(
            name=f"block.{name}",
            local_name=name,
            linear=module.get_submodule(name),
            group=skeleton.architecture.group_of(name),
            scheme=scheme,
            scale_dtype=STORED,
        )
        for name in LINEARS
    ]
    block = Block(
        index=0,
        name="block",
        module=module,
        sites=sites,
        architecture=skeleton.architecture,
        config=skeleton.config,
        activations=Activations(module, LINEARS, scheme),
    )
    generator = torch.Generator().manual_seed(0)
    hidden, target = (torch.randn(1, TOKENS, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.full((1, 1, TOKENS, TOKENS), -torch.inf, dtype=torch.float64).triu(1)
    arguments = Arguments(kwargs={"position_embeddings": rotary(), "attention_mask": mask})
    return Window(blocks=[block], inputs=[hidden], references=[[target]], arguments=[[arguments]], device=CPU)


def moved_from_the_start(parameters):
    """Move what is learned so far that many weights are clipped and all scales differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in parameters.items():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            start = 1.0 if name[1] in ("gamma", "beta") else value
            value.copy_(start * (0.3 * noise).exp() if name[0] == "scale" else start + noise)


def library(method, window, monkeypatch):
    """Return the loss, everything that is learned by its name, and its gradients.

    Norms and softmaxes that insist on float32 compute in float64 meanwhile.
    """
    made = {}

    class Transform(omniquant.BlockTransform):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made["transform"] = self

    def look(groups, loss, **_):
        learned = {("scale", name): value for name, value in made["transform"].scales.items()}
        learned |= {("shift", name): value for name, value in made["transform"].shifts.items()}
        flat = [value for group in groups for value in group.parameters]
        clips = [value for value in flat if not any(value is known for known in learned.values())]
        names = [(site.local_name, kind) for site in window.sites for kind in ("gamma", "beta")]
        learned |= dict(zip(names, clips, strict=True))
        assert len(learned) == len(flat)
        moved_from_the_start(learned)
        made["learned"] = {name: value.detach().clone() for name, value in learned.items()}
        value = loss(0)
        made["loss"], gradients = value.detach(), torch.autograd.grad(value, list(learned.values()))
        made["gradients"] = dict(zip(learned, gradients, strict=True))
        return FitResult()

    with monkeypatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(omniquant, "fit", look)
        patch.setattr(omniquant, "BlockTransform", Transform)
        method._train(window, method._quantizers(window), method._transforms(window))
    return made


def twin(window, learned, *, augmented):
    scheme, hidden = window.sites[0].scheme, window.inputs[0]
    original = {name: value.detach() for name, value in window.blocks[0].module.named_parameters()}
    values = {name: value.clone().requires_grad_() for name, value in learned.items()}
    scales = {name: value for (kind, name), value in values.items() if kind == "scale"}
    p = transformed(original, scales, values.get(("shift", "output")))
    for name in LINEARS:
        p[f"{name}.weight"] = quantize_weight(p[f"{name}.weight"], values[name, "gamma"], values[name, "beta"], scheme)
    output = block_output(p, hidden, scheme)
    loss = (output - window.targets[0]).square().mean()
    if augmented:
        loss = loss + (output - block_output(original, hidden, None)).square().mean()
    return loss.detach(), dict(zip(values, torch.autograd.grad(loss, list(values.values())), strict=True))


@pytest.mark.parametrize(
    "method", [OmniQuant(let=True), OmniQuant(let=True, let_down=True, aug_loss=True)], ids=["paper", "let_down+aug"]
)
def test_loss_and_gradients_are_the_twins(window, monkeypatch, method):
    made = library(method, window, monkeypatch)
    sizes = {name: value.numel() for (kind, name), value in made["learned"].items() if kind == "scale"}
    assert sizes == SIZES | ({"down": INNER} if method.let_down else {})
    quantized = window.sites[0].scheme.activation_bits < 16
    shifts = {name: value.numel() for (kind, name), value in made["learned"].items() if kind == "shift"}
    assert shifts == ({"output": SIZES["output"]} if quantized else {})
    loss, gradients = twin(window, made["learned"], augmented=method.aug_loss)
    torch.testing.assert_close(made["loss"], loss, rtol=1e-10, atol=0)
    for name, expected in gradients.items():
        assert expected.abs().max() > 1e-7, name
        torch.testing.assert_close(
            made["gradients"][name], expected, rtol=1e-7, atol=1e-9 * expected.abs().max().item(), msg=str(name)
        )


def test_gradients_reach_the_scales_through_the_extremes_of_the_weights_too(window, monkeypatch):
    """With bounds held fixed the gradients of the scales are others."""
    made = library(OmniQuant(let=True), window, monkeypatch)
    original = dataclasses.replace(window)
    amax, amin = torch.Tensor.amax, torch.Tensor.amin
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "amax", lambda value, *args, **kwargs: amax(value.detach(), *args, **kwargs))
        patch.setattr(torch.Tensor, "amin", lambda value, *args, **kwargs: amin(value.detach(), *args, **kwargs))
        _, fixed = twin(original, made["learned"], augmented=False)
    found, other = made["gradients"]["scale", "mlp"], fixed["scale", "mlp"]
    assert (found - other).norm() > 0.01 * found.norm()
