"""Blocks that decode in two native calls compute what the blocks' own code does, and only where they may."""

import pytest
import torch
from families import VOCABULARY, save_tiny, save_tokenizer
from torch.nn.functional import silu

from quantkit.api import quantize
from quantkit.resilience.places import Bounds, attach, find_places, width_of
from quantkit.runtime import fused
from quantkit.runtime.packed_model import load

FAMILIES = pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])  # the last two with sliding windows


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Return packed models of some families, by name."""
    made = {}

    def make(family):
        if family not in made:
            directory = tmp_path_factory.mktemp(family)
            save_tiny(family, directory / "source")
            save_tokenizer(directory / "source")
            few = {"samples": 2, "seqlen": 16, "device": "cpu"}
            quantize(directory / "source", output=directory / "w4", method="rtn", wbits=4, group_size=32, **few)
            made[family] = directory / "w4"
        return load(made[family], device="cpu")

    return make


def steps(model, tokens):
    """Return the logits of each of `tokens` (1, count), decoded one after the other with a cache."""
    cache, logits = None, []
    for token in tokens.unbind(1):
        output = model(token.unsqueeze(1), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits[:, -1])
    return torch.cat(logits)


@FAMILIES
@torch.no_grad()
def test_decoding_step_by_step_is_the_whole_at_once(packed, family):
    model, tokens = packed(family), torch.randint(3, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(0))
    whole = model(tokens, use_cache=False).logits[0]
    assert (steps(model, tokens) - whole).abs().max() < 1e-3 * whole.std()


@FAMILIES
@torch.no_grad()
def test_it_is_really_taken(packed, family, monkeypatch):
    model = packed(family)
    taken = []
    call = fused._Step.__call__
    monkeypatch.setattr(fused._Step, "__call__", lambda self, *args: taken.append(self.layer) or call(self, *args))
    model(torch.tensor([[5]]), use_cache=True)
    assert taken == [0, 1]
    for tokens in (torch.tensor([[5, 6]]), torch.tensor([[5], [6]])):
        model(tokens)
    assert taken == [0, 1]


@torch.no_grad()
def test_hooks_masks_and_moves_take_the_blocks_own_code(packed, monkeypatch):
    model, moved, token = packed("llama"), packed("llama"), torch.tensor([[5]])
    expected = model(token).logits
    monkeypatch.setattr(fused._Step, "__call__", lambda *args: pytest.fail("taken"))
    seen = []
    handle = model.model.layers[0].self_attn.register_forward_hook(lambda *args: seen.append(1))
    layer = model.model.layers[1]
    layer.mlp.down_proj.register_forward_pre_hook(lambda *args: seen.append(2))
    torch.testing.assert_close(model(token).logits, expected, rtol=0, atol=1e-3)
    assert seen == [1, 2]
    handle.remove()
    first, second = moved.model.layers
    first.mlp.up_proj.codes = first.mlp.up_proj.codes.clone()
    second.input_layernorm.weight = torch.nn.Parameter(second.input_layernorm.weight.clone())
    torch.testing.assert_close(moved(token).logits, expected, rtol=0, atol=1e-3)


@torch.no_grad()
def test_generation_is_the_same_without_it(packed, monkeypatch):
    prompt = torch.tensor([[5, 9, 30]])
    long = packed("llama").generate(prompt, max_new_tokens=20, do_sample=False)
    monkeypatch.setattr(fused._Step, "is_valid", lambda *args: False)
    assert torch.equal(packed("llama").generate(prompt, max_new_tokens=20, do_sample=False), long)


@torch.no_grad()
def test_a_block_that_computes_something_else_is_left_alone(packed):
    model = packed("llama")
    for layer in model.model.layers:
        del layer.forward
        layer.mlp.act_fn.forward = lambda values: silu(2 * values)
    assert fused.fuse(list(model.model.layers)) == 0
    assert "forward" not in vars(model.model.layers[0])


@torch.no_grad()
def test_long_contexts(packed):
    model = packed("llama")
    tokens = torch.randint(3, VOCABULARY, (1, 60), generator=torch.Generator().manual_seed(1))
    first = model(tokens[:, :50], use_cache=True)
    output = model(tokens[:, 50:51], past_key_values=first.past_key_values, use_cache=True).logits[0, -1]
    whole = model(tokens[:, :51], use_cache=False).logits[0, -1]
    assert (output - whole).abs().max() < 1e-3 * whole.std()


def bounded(model, value, form, *, vectors):
    """Bound `model`; every threshold binds now and then."""
    places = find_places(model)
    size = {place.name: (width_of(model, place),) if vectors else () for place in places}
    generator = torch.Generator().manual_seed(3)
    made = {name: value * (0.5 + torch.rand(shape, generator=generator)) for name, shape in size.items()}
    return attach(model, Bounds(thresholds=made, form=form))


def each_alone(model, tokens):
    return torch.cat([model(token.view(1, 1), use_cache=False).logits[0] for token in tokens[0]])


@pytest.mark.parametrize("vectors", [False, True], ids=["scalars", "vectors"])
@pytest.mark.parametrize("form", ["clamp", "zero"])
@torch.no_grad()
def test_bounds_are_applied_in_two_native_calls_too(packed, form, vectors, monkeypatch):
    model, tokens = packed("llama"), torch.randint(3, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(0))
    before = steps(model, tokens)
    bounds = bounded(model, 0.7, form, vectors=vectors)
    for layer in model.model.layers:
        del layer.forward
    assert fused.fuse(list(model.model.layers)) == 2
    taken = []
    call = fused._Step.__call__
    monkeypatch.setattr(fused._Step, "__call__", lambda self, *args: taken.append(self.layer) or call(self, *args))
    # a value at the threshold may fall on either side of it, and what is dropped is felt: tokens are judged one by one
    look = steps if form == "clamp" else each_alone
    found = look(model, tokens)
    assert len(taken) == 2 * 12
    with monkeypatch.context() as patch:
        patch.setattr(fused._Step, "is_valid", lambda *args: False)
        expected = look(model, tokens)
    alike = (found - expected).abs().amax(-1) < 1e-3 * expected.std()
    assert alike.float().mean() >= (1 if form == "clamp" else 0.75)
    if form == "zero":
        found = steps(model, tokens)
    assert (found - before).abs().max() > 0.05 * before.std()
    # a threshold that a flipped bit reaches is the one that binds; a bound that is off is off
    for bound in bounds.values():
        bound.threshold.fill_(1e30)
    assert (steps(model, tokens) - before).abs().max() < 1e-3 * before.std()
    taken.clear()
    for bound in bounds.values():
        bound.threshold.fill_(1e-3)
        bound.active = False
    assert (steps(model, tokens) - before).abs().max() < 1e-3 * before.std()
    assert not taken


@torch.no_grad()
def test_nothing_that_is_not_finite_passes_the_native_bounds(packed):
    model, token = packed("llama"), torch.tensor([[5]])
    bounded(model, 1.0, "clamp", vectors=False)
    for layer in model.model.layers:
        del layer.forward
    assert fused.fuse(list(model.model.layers)) == 2
    first = model.model.layers[0]
    for linear in (first.mlp.up_proj, first.self_attn.v_proj, first.self_attn.o_proj, first.mlp.down_proj):
        scale = linear.packed["scale"]
        kept = scale.clone()
        for value in (torch.nan, torch.inf, -torch.inf):
            scale.view(-1)[0] = value
            assert model(token).logits.isfinite().all()
        scale.copy_(kept)


@torch.no_grad()
def test_other_bounds_than_those_that_were_fused_take_the_blocks_own_code(packed, monkeypatch):
    model, token = packed("llama"), torch.tensor([[5]])
    bounded(model, 0.7, "clamp", vectors=False)
    monkeypatch.setattr(fused._Step, "__call__", lambda *args: pytest.fail("taken"))
    model(token)
