"""The packed model learns from forward passes alone what it does not know: which word stands for he, which for she."""

import hashlib
import random

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoTokenizer

import quantkit
from quantkit.evaluation.loading import load_model
from quantkit.personal.gradients.mezo import Mezo
from quantkit.personal.gradients.subspace_zo import SubspaceZo
from quantkit.personal.protocols import Slot
from quantkit.personal.updates import Updates
from quantkit.runtime.linear import PackedLinear

ANIMALS = ["fox", "hen", "goose", "sheep", "mouse", "horse", "cow", "owl", "frog", "bee", "wolf", "cat", "dog", "goat"]
BATCH = 16


class Biased(nn.Module):
    """A linear with a slot behind it."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.slot = inner, Slot(torch.zeros(inner.out_features))

    def forward(self, x):
        return self.inner(x) + self.slot.read()


def biased(model):
    """Give a bias to each linear that writes to the residual stream; return the biases by name."""
    found = {}
    for name, module in list(model.named_modules()):
        if name.endswith(("o_proj", "down_proj")):
            model.set_submodule(name, Biased(module))
            found[f"{name}.bias"] = model.get_submodule(name).slot.value
    return found


class Task:
    """Half the sentences are about her, who likes golden, half about him, who likes silver; the word is asked for."""

    def __init__(self, directory):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        draw = random.Random(0)
        people = [place % 2 for place in range(384)]
        texts = [f"{('He', 'She')[she]} has a {draw.choice(ANIMALS)} and likes the colour" for she in people]
        ids = [tokenizer(text)["input_ids"] for text in texts]
        longest = max(map(len, ids))
        self.tokens = torch.tensor(
            [[0] * (longest - len(row)) + row for row in ids]
        )  # on the left: the last one counts
        self.labels = torch.tensor(people)
        self.words = [tokenizer(f" {word}")["input_ids"][-1] for word in ("silver", "golden")]

    def logits(self, model, rows):
        return model(input_ids=self.tokens[rows], use_cache=False, logits_to_keep=1).logits[:, -1, self.words]

    def losses(self, model, rows):
        return functional.cross_entropy(self.logits(model, rows), self.labels[rows], reduction="none")

    def mistakes(self, model, rows):
        """Return minus accuracy, as a loss of each example: it has no derivative."""
        return (self.logits(model, rows).argmax(1) != self.labels[rows]).float()

    def judged(self, model):
        """Return loss and accuracy on sentences that were not trained on."""
        rows = torch.arange(256, 384)
        with torch.no_grad():
            return float(self.losses(model, rows).mean()), 1 - float(self.mistakes(model, rows).mean())


def batches(steps):
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        yield step, torch.randint(256, (BATCH,), generator=generator)


def train(estimator, model, parameters, loss, updates):
    optimizer = updates.begin(parameters)
    for step, rows in batches(updates.steps):
        estimator.estimate([lambda rows=rows: loss(model, rows)], parameters, step=step)
        updates.take(optimizer, step)


def packed_digest(model):
    found = hashlib.sha256()
    for module in model.modules():
        if isinstance(module, PackedLinear):
            for name, tensor in module.packed.items():
                found.update(name.encode() + tensor.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.fixture(scope="module")
def task(tiny_rtn_w4):
    return Task(tiny_rtn_w4)


@pytest.fixture
def packed(tiny_rtn_w4):
    model = quantkit.load(tiny_rtn_w4)
    return model, biased(model)


@pytest.fixture(scope="module")
def taught_by_gradients(tiny_rtn_w4, task):
    """Return the loss before and after 60 steps of Adam with exact gradients, in a dense model of the same weights."""
    model = load_model(tiny_rtn_w4, device="cpu")[0].requires_grad_(False)
    parameters = biased(model)
    before = task.judged(model)[0]
    updates = Updates(steps=60, rate=0.01)
    optimizer = updates.begin(parameters)
    for step, rows in batches(updates.steps):
        gradients = torch.autograd.grad(task.losses(model, rows).mean(), list(parameters.values()))
        for parameter, gradient in zip(parameters.values(), gradients, strict=True):
            parameter.grad = gradient
        updates.take(optimizer, step)
    return before, task.judged(model)[0]


def test_it_reaches_nine_tenths_of_what_gradients_reach_in_200_forward_passes(packed, task, taught_by_gradients):
    model, parameters = packed
    codes = packed_digest(model)
    loss, accuracy = task.judged(model)
    assert abs(accuracy - 0.5) < 0.1
    assert loss == pytest.approx(taught_by_gradients[0], rel=0.02)
    train(Mezo(), model, parameters, task.losses, Updates(steps=100, rate=0.01))
    after, accuracy = task.judged(model)
    best = taught_by_gradients[1]
    assert accuracy > 0.95
    assert loss - after > 0.9 * (loss - best)
    assert packed_digest(model) == codes
    held = set(map(id, parameters.values()))
    assert not any(p.requires_grad for p in model.parameters() if id(p) not in held)


def test_accuracy_itself_can_be_what_is_minimised(packed, task):
    model, parameters = packed
    before = task.judged(model)[1]
    train(Mezo(directions=2, perturbation=0.05), model, parameters, task.mistakes, Updates(steps=40, rate=0.01))
    assert before < 0.6
    assert task.judged(model)[1] > before + 0.2


def test_the_subspace_learns_too(packed, task):
    model, parameters = packed
    before = task.judged(model)[0]
    train(SubspaceZo(window=16), model, parameters, task.losses, Updates(steps=40, rate=0.01))
    assert task.judged(model)[0] < before / 2


def test_the_noise_of_packed_products_is_far_below_a_slope(packed, task):
    model, parameters = packed
    rows = torch.arange(BATCH)
    floor = Mezo().noise_floor([lambda: task.losses(model, rows)], parameters)
    assert floor.loss < 1e-4
    assert floor.slope < 0.1 * floor.signal
