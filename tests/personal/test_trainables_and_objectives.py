"""Every kind of trainable with every objective, on a tiny packed model: found by themselves, all must do this."""

import pytest
import torch
from tinies import batch, packed, twin

import quantkit
from quantkit.personal import choices
from quantkit.personal.gradients.backprop import Backprop
from quantkit.personal.objectives.language_model import LanguageModel
from quantkit.personal.parameters._places import take_out
from quantkit.personal.protocols import Losses, per_example
from quantkit.runtime import packed_model
from quantkit.runtime.kernels import reference
from quantkit.runtime.linear import PackedLinear

TRAINABLES, OBJECTIVES = choices.names("parameters"), choices.names("objectives")
WORDS = {"words": (5, 9)}
FAMILIES = ["llama", "gpt2", "opt"]
CHANGES_AT_ONCE = ("soft-prompt",)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return {family: packed(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@torch.no_grad()
def logits(model, of):
    return model(of.tokens, attention_mask=of.attention.long(), use_cache=False).logits


def labelled():
    """Return examples of which the last token alone is scored."""
    made = batch()
    made.scored[:] = False
    for row, length in enumerate(made.attention.sum(1).tolist()):
        made.scored[row, length - 1] = True
    return made


def moved(parameters, seed=3):
    """Move parameters a little, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters.values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.05 * noise * (parameter.abs().mean() + 0.1 * (parameter == 0).all()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", TRAINABLES)
def test_nothing_changes_when_it_is_attached_or_taken_out(checkpoints, family, name):
    model, of = quantkit.load(checkpoints[family], device="cpu"), batch()
    before, state = logits(model, of), list(model.state_dict())
    parameters = choices.build("parameters", name).attach(model)
    assert parameters
    assert all(p.dtype == torch.float32 for p in parameters.values())
    inside = {id(parameter) for parameter in model.parameters()}
    assert all(id(parameter) in inside for parameter in parameters.values())
    after = logits(model, of)
    assert after.shape == before.shape
    if name == "scales":  # which are multiplied by other operations from now on
        torch.testing.assert_close(after, before, rtol=0, atol=1e-3 * float(before.std()))
    elif name not in CHANGES_AT_ONCE:
        assert torch.equal(after, before)
    moved(parameters)
    assert not torch.equal(logits(model, of), after)
    take_out(model)
    assert torch.equal(logits(model, of), before)
    assert list(model.state_dict()) == state


@pytest.mark.parametrize("name", TRAINABLES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_gives_one_loss_per_example_and_a_gradient(checkpoints, name, objective):
    model, of = quantkit.load(checkpoints["llama"], device="cpu"), labelled()
    parameters = choices.build("parameters", name).attach(model)
    measure = choices.build("objectives", objective, {} if objective == "language-model" else WORDS)
    losses = measure(model, of)
    assert (losses.shape, losses.dtype) == ((3,), torch.float32)
    assert losses.isfinite().all()
    assert losses.requires_grad == measure.differentiable
    alone = [measure(model, type(of)(**{n: t[i : i + 1] for n, t in vars(of).items()})) for i in range(3)]
    torch.testing.assert_close(losses.detach(), torch.cat(alone).detach(), rtol=1e-3, atol=1e-4)
    if measure.differentiable:
        loss = Backprop().estimate([Losses(measure, model, of)], parameters, step=0)
        assert loss == pytest.approx(float(losses.detach().mean()))
        assert any(bool(p.grad.abs().max() > 0) for p in parameters.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [name for name in TRAINABLES if choices.find("parameters", name).per_example])
def test_gradients_of_examples_are_those_of_a_loop(checkpoints, family, name):
    model = packed_model.load(checkpoints[family], device="cpu", kernel=reference.KERNEL)
    parameters, of = choices.build("parameters", name).attach(model), batch()
    moved(parameters)
    losses = LanguageModel()(model, of)
    rows = [torch.autograd.grad(loss, list(parameters.values()), retain_graph=True) for loss in losses]
    with per_example(model, 3) as copies:
        read = [copies[id(parameter)] for parameter in parameters.values()]
        again = LanguageModel()(model, of)
        found = torch.autograd.grad(again.sum(), read)
    torch.testing.assert_close(again, losses, rtol=1e-5, atol=1e-6)
    for i, gradient in enumerate(found):
        expected = torch.stack([row[i] for row in rows])
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()) + 1e-7)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [name for name in TRAINABLES if name != "scales"])  # those: runtime/test_gradients.py
def test_gradients_are_slopes_of_a_dense_twin(checkpoints, family, name):
    """Along the gradient itself the float64 twin's loss rises as the gradient says."""
    model = packed_model.load(checkpoints[family], device="cpu", kernel=reference.KERNEL)
    kind, of = choices.build("parameters", name), batch()
    parameters = kind.attach(model)
    moved(parameters)
    Backprop().estimate([Losses(LanguageModel(), model, of)], parameters, step=0)
    values = {n: p.detach().double() for n, p in parameters.items()}
    gradient = {n: p.grad.double() for n, p in parameters.items()}
    norm = sum(float((g**2).sum()) for g in gradient.values()) ** 0.5
    reached = []
    for sign in (1, -1):
        dense = twin(checkpoints[family])
        put_into_twin(name, kind, dense, {n: values[n] + sign * 1e-3 * g / norm for n, g in gradient.items()}, model)
        with torch.no_grad():
            reached.append(float(in_double(dense, of)))
    slope = (reached[0] - reached[1]) / 2e-3
    assert slope == pytest.approx(norm, rel=3e-4)


def in_double(model, of):
    """Return the mean over examples of their mean loss, float64."""
    scores = model(of.tokens, attention_mask=of.attention.long(), use_cache=False).logits.log_softmax(-1)
    total = 0.0
    for row in range(len(of.tokens)):
        places = of.scored[row, 1:].nonzero().flatten()
        total -= scores[row, places, of.tokens[row, places + 1]].mean()
    return total / len(of.tokens)


def put_into_twin(name, kind, dense, values, model):
    """Make `values` a part of a dense model in float64, by other means than those of the package."""
    if name == "soft-prompt":
        prompt, forward = values["soft_prompt"], dense.forward

        def with_prompt(tokens, attention_mask, use_cache):
            text = dense.get_input_embeddings()(tokens)
            whole = torch.cat([prompt.expand(len(tokens), *prompt.shape), text], 1)
            mask = torch.cat([attention_mask.new_ones(len(tokens), len(prompt)), attention_mask], 1)
            result = forward(inputs_embeds=whole, attention_mask=mask, use_cache=use_cache)
            result.logits = result.logits[:, len(prompt) :]
            return result

        dense.forward = with_prompt
        return
    for key, value in values.items():
        owner, _, part = key.rpartition(".")
        module = dense.get_submodule(owner)
        if part == "lora_A":
            thick = values[f"{owner}.lora_B"] @ value * (kind.alpha / kind.rank)
            module.weight = torch.nn.Parameter(module.weight + thick, requires_grad=False)
        elif part in ("weight", "bias"):
            setattr(module, part, torch.nn.Parameter(value, requires_grad=False))


def test_scales_that_are_trained_are_those_that_could_be_stored(checkpoints):
    model, of = quantkit.load(checkpoints["llama"], device="cpu"), batch()
    kind = choices.build("parameters", "scales")
    parameters = kind.attach(model)
    moved(parameters)
    trained = logits(model, of)
    values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    take_out(model)
    kind.settle(model, values)
    for name, value in values.items():
        linear = model.get_submodule(name.removesuffix(".scale"))
        assert isinstance(linear, PackedLinear)
        assert torch.equal(linear.unpack().scale, value.to(linear.unpack().scale.dtype))
    settled = logits(model, of)
    torch.testing.assert_close(settled, trained, rtol=0, atol=1e-3 * float(trained.std()))
