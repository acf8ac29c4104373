"""Gradients of single examples, against opacus, vmap(grad) and a loop; and what a backward pass keeps for them."""

import warnings

import pytest
import torch
from slotted import batch, losses_of, one_by_one, slotted, tiny
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from quantkit.errors import UsageError
from quantkit.personal.gradients._examples import example_gradients
from quantkit.personal.protocols import Losses

FAMILIES = ("gpt2", "llama")


def found_of(model, given):
    with_slots, parameters = slotted(model)
    return example_gradients(losses_of(with_slots, given)[0], parameters)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_they_equal_those_of_opacus(family):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus import GradSampleModule

        model, given = tiny(family), batch(4)
        wrapped = GradSampleModule(tiny(family).train(), loss_reduction="sum")
        logits = wrapped(input_ids=given.tokens).logits
        functional.cross_entropy(logits[:, :-1].transpose(1, 2), given.tokens[:, 1:], reduction="sum").backward()
    theirs = {name.removeprefix("_module."): p.grad_sample for name, p in wrapped.named_parameters() if p.requires_grad}
    ours = found_of(model, given)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("family", FAMILIES)
def test_they_equal_vmap_of_grad(family):
    model, given = tiny(family), batch(3)
    model.set_attn_implementation("eager")  # vmap warns about the fused one
    biases = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(values, tokens):
        logits = functional_call(model, values, kwargs={"input_ids": tokens[None]}).logits
        return functional.cross_entropy(logits[0, :-1], tokens[1:], reduction="sum")

    theirs = vmap(grad(loss), in_dims=(None, 0))(biases, given.tokens)
    for name, value in found_of(model, given).items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("family", FAMILIES)
def test_they_equal_a_loop_over_examples(family):
    model, given = tiny(family), batch(3)
    theirs = one_by_one(model, {n: p for n, p in model.named_parameters() if p.requires_grad}, given)
    for name, value in found_of(model, given).items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-11, atol=1e-13)


def test_gpt2_has_no_gradient_in_the_biases_of_keys_and_llama_has():
    gpt2 = found_of(tiny("gpt2"), batch(3))["transformer.h.0.attn.c_attn.bias"]
    query, key, value = gpt2.split(16, dim=1)
    assert key.abs().max() < 1e-15
    assert query.abs().max() > 1e-6
    assert value.abs().max() > 1e-3
    llama = found_of(tiny("llama"), batch(3))["model.layers.0.self_attn.k_proj.bias"]
    assert llama.abs().max() > 1e-6


def test_slots_leave_outputs_as_they_are():
    model = tiny("llama")
    with_slots, _ = slotted(model)
    tokens = batch(2).tokens
    torch.testing.assert_close(with_slots(tokens).logits, model(tokens).logits, rtol=0, atol=1e-14)


def test_a_bias_that_no_loss_depends_on_has_a_gradient_of_zero():
    model, parameters = slotted(tiny("llama"))

    def of_first_layer(model, given):
        first = model.model.layers[0].mlp
        return first(model.get_input_embeddings()(given.tokens)).square().sum((1, 2))

    gradients, _ = example_gradients(Losses(of_first_layer, model, batch(2)), parameters)
    for name, value in gradients.items():
        assert bool(value.any()) == name.startswith("model.layers.0.mlp"), name
        assert len(value) == 2


def test_a_parameter_without_a_slot_is_refused():
    model, parameters = slotted(tiny("llama"))
    stranger = {"model.norm.weight": model.model.norm.weight}
    with pytest.raises(UsageError, match=r"model\.norm\.weight has no gradient of single examples"):
        example_gradients(losses_of(model, batch(2))[0], stranger | parameters)


def audited(model, run):
    """Return the inputs of all linears in a run, and how many bytes autograd keeps, by the storage that is kept."""
    held, stored = [], {}

    def keep(tensor):
        stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        held.append(tensor)  # nothing is freed, so no address is used twice
        return tensor

    linears = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    given = []
    hooks = [linear.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0])) for linear in linears]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    for hook in hooks:
        hook.remove()
    assert len(given) == len(linears)
    return {tensor.untyped_storage().data_ptr() for tensor in given}, stored


def eager(family):
    model, parameters = slotted(tiny(family))
    model.set_attn_implementation("eager")  # fused attention keeps its output, which is the input of a linear
    return model, parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_no_input_of_a_linear_is_kept(family):
    model, parameters = eager(family)
    losses = losses_of(model, batch(3))[0]
    inputs, stored = audited(model, lambda: example_gradients(losses, parameters))
    assert stored
    assert not inputs & stored.keys()


def test_the_audit_sees_inputs_that_trained_weights_keep():
    model, parameters = eager("llama")
    model.model.layers[1].mlp.down_proj.inner.weight.requires_grad_(True)
    inputs, stored = audited(model, lambda: example_gradients(losses_of(model, batch(3))[0], parameters))
    assert len(inputs & stored.keys()) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_beyond_ordinary_training_does_not_grow_with_length(family):
    model, parameters = eager(family)

    def beyond(length):
        losses = losses_of(model, batch(3, length))[0]
        _, private = audited(model, lambda: example_gradients(losses, parameters))
        _, ordinary = audited(model, lambda: losses().mean().backward())
        assert sum(ordinary.values()) > 1000 * length
        return sum(private.values()) - sum(ordinary.values())

    assert beyond(8) == beyond(32)
    assert beyond(8) <= 8 * 3 * sum(parameter.numel() for parameter in parameters.values())
