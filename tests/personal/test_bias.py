"""Biases in packed models: nothing changes at first, gradients are those of dense twins, and they leave again."""

import pytest
import torch
from tinies import batch, packed, twin

import quantkit
from quantkit.errors import UsageError
from quantkit.personal.gradients.backprop import Backprop
from quantkit.personal.objectives.language_model import LanguageModel
from quantkit.personal.parameters._places import take_out
from quantkit.personal.parameters.bias import Bias
from quantkit.personal.protocols import Losses, per_example
from quantkit.runtime import packed_model
from quantkit.runtime.kernels import reference
from quantkit.runtime.linear import PackedLinear

# the compiled kernel rounds activations to fixed point on the way there, not on the way back
KERNELS = {"native": (None, 3e-4), "reference": (reference.KERNEL, 1e-5)}
FAMILIES = ["llama", "gpt2", "opt", "qwen2"]


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    return request.param, packed(request.param, tmp_path_factory.mktemp(request.param))


@torch.no_grad()
def logits(model, of=None):
    of = of or batch()
    return model(of.tokens, attention_mask=of.attention.long(), use_cache=False).logits


def dense_gradients(directory, names):
    """Return the gradients of biases in float64, by name, of each example: (examples, out)."""
    model = twin(directory)
    added = {}
    for name in names:
        linear = model.get_submodule(name.removesuffix(".bias"))
        added[name] = torch.zeros(linear.out_features, dtype=torch.float64, requires_grad=True)
        linear.register_forward_hook(lambda _, __, output, extra=added[name]: output + extra)
    losses = LanguageModel()(model, batch())
    rows = [torch.autograd.grad(loss, list(added.values()), retain_graph=True) for loss in losses]
    return {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(added)}


def test_nothing_changes_when_they_are_put_in_or_taken_out(checkpoint):
    _, directory = checkpoint
    model = quantkit.load(directory, device="cpu")
    before, state = logits(model), set(model.state_dict())
    parameters = Bias().attach(model)
    assert torch.equal(logits(model), before)
    with pytest.raises(UsageError, match="has a personalization already"):
        Bias().attach(model)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.1)
    assert not torch.equal(logits(model), before)
    take_out(model)
    assert torch.equal(logits(model), before)
    assert set(model.state_dict()) == state


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_are_those_of_a_dense_twin(checkpoint, kernel):
    (_, directory), (kernel, tolerance) = checkpoint, KERNELS[kernel]
    model = packed_model.load(directory, device="cpu", kernel=kernel)
    parameters = Bias().attach(model)
    expected = dense_gradients(directory, parameters)
    Backprop().estimate([Losses(LanguageModel(), model, batch())], parameters, step=0)
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad.double(), expected[name].mean(0), rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_of_examples_are_those_of_a_loop_over_them(checkpoint, kernel):
    (_, directory), (kernel, tolerance) = checkpoint, KERNELS[kernel]
    model = packed_model.load(directory, device="cpu", kernel=kernel)
    parameters = Bias().attach(model)
    expected = dense_gradients(directory, parameters)
    with per_example(model, 3) as copies:
        read = [copies[id(parameter)] for parameter in parameters.values()]
        found = torch.autograd.grad(LanguageModel()(model, batch()).sum(), read)
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, gradient in zip(parameters, found, strict=True):
        torch.testing.assert_close(gradient.double(), expected[name], rtol=0, atol=tolerance * largest)


def test_the_key_bias_of_gpt2_has_no_gradient(tmp_path):
    model = quantkit.load(packed("gpt2", tmp_path), device="cpu")
    parameters = Bias(include=("*.c_attn",)).attach(model)
    Backprop().estimate([Losses(LanguageModel(), model, batch())], parameters, step=0)
    for parameter in parameters.values():
        query, key, value = (part.abs().max() for part in parameter.grad.chunk(3))
        assert key < 1e-4 * query
        assert key < 1e-4 * value


def test_globs_choose(checkpoint):
    _, directory = checkpoint
    model = quantkit.load(directory, device="cpu")
    first = next(name for name, module in model.named_modules() if isinstance(module, PackedLinear))
    assert list(Bias(include=(first,)).attach(model)) == [f"{first}.bias"]
    with pytest.raises(UsageError, match="no packed linear matches 'nothing'"):
        Bias(include=("nothing",)).attach(quantkit.load(directory, device="cpu"))


def test_no_input_of_a_linear_is_kept_for_biases(tmp_path):
    model = quantkit.load(packed("llama", tmp_path), device="cpu")
    Bias().attach(model)
    inputs, kept = {}, set()

    def note(module, args):
        inputs[module] = args[0]  # which is held, so that no other tensor takes its place in memory

    names = ("q_proj", "gate_proj", "down_proj")  # attention itself keeps what it returns, the input of o_proj
    linears = [module for name, module in model.named_modules() if name.endswith(names)]
    for linear in linears:
        linear.register_forward_pre_hook(note)

    def pack(tensor):
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = LanguageModel()(model, batch())
    assert len(kept) > len(linears)
    assert not kept & {tensor.untyped_storage().data_ptr() for tensor in inputs.values()}
    losses.sum().backward()
