"""Masks stay while somebody trains: through momentum, weight decay, clipping; nothing is left behind."""

import copy

import pytest
import torch
from torch import nn

import quantkit
from quantkit.errors import UsageError


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 6, 8), nn.Tanh(), nn.Linear(8, 2))


def train(model, optimizer, steps=5):
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 3, 8)).square().mean().backward()
        optimizer.step()


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, weight_decay=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_dropped_weights_stay_zero_through_momentum_from_before(name):
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer)  # fills the averages of weights that will be dropped
    masks = quantkit.prune_module(model, sparsity=0.5)
    before = copy.deepcopy(model.state_dict())
    with masks.keep(optimizer):
        train(model, optimizer)
    for key, mask in masks.items():
        weight = model.get_parameter(key)
        assert not weight[~mask].any()
        assert (weight[mask] != before[key][mask]).all()
    train(
        model, optimizer
    )  # the same steps without masks bring dropped weights back: the hooks are gone and were needed
    assert all(model.get_parameter(key)[~mask].all() for key, mask in masks.items())


def test_a_clipped_norm_is_that_of_kept_gradients():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = quantkit.prune_module(model, sparsity=0.5)
    model(torch.ones(2, 3, 8)).sum().backward()
    everything = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    with masks.keep(optimizer):
        model(torch.ones(2, 3, 8)).sum().backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    kept = [gradient * masks[name] if name in masks else gradient for name, gradient in everything.items()]
    assert torch.isclose(norm, torch.cat([gradient.flatten() for gradient in kept]).norm())


def test_state_dict_and_optimizer_are_as_they_were():
    model = network()
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters())
    masks = quantkit.prune_module(model, sparsity=0.5).keep(optimizer)
    train(model, optimizer)
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes
    masks.finish()
    assert not optimizer._optimizer_step_post_hooks
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_the_context_lets_go_when_training_fails():
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(RuntimeError), quantkit.prune_module(model).keep(optimizer):
        raise RuntimeError
    assert not optimizer._optimizer_step_post_hooks


def test_restore_gives_back_what_was_dropped_and_no_more():
    model = network()
    before = copy.deepcopy(model.state_dict())
    masks = quantkit.prune_module(model, sparsity=0.5)
    masks.restore()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    masks.apply()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with masks.keep(optimizer):
        train(model, optimizer)
    trained = copy.deepcopy(model.state_dict())
    masks.restore()
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name), torch.where(mask, trained[name], before[name]))


def test_frozen_weights_are_masked_too():
    model = network()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters())
    masks = quantkit.prune_module(model, sparsity=0.5)
    with masks.keep(optimizer):
        train(model, optimizer)
    assert int((model[0].weight == 0).sum()) == model[0].weight.numel() // 2


def test_masks_outlive_a_saved_file(tmp_path):
    model = network()
    masks = quantkit.prune_module(model, sparsity=0.75)
    torch.save(dict(masks), tmp_path / "masks.pt")
    again = quantkit.apply_masks(network(), torch.load(tmp_path / "masks.pt"))
    assert {name: again[name].tolist() for name in again} == {name: masks[name].tolist() for name in masks}
    assert again.sparsity == masks.sparsity == 0.75
    assert repr(again) == "Masks(3 weights, sparsity 0.7500)"


def test_a_mask_is_a_copy():
    model, mask = nn.Linear(2, 2), torch.eye(2, dtype=torch.bool)
    masks = quantkit.apply_masks(model, {"weight": mask})
    mask.fill_(False)
    masks.apply()
    assert model.weight.diag().all()


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({}, "no mask to apply"),
        ({"wieght": torch.ones(2, 3, dtype=torch.bool)}, r"Linear has no parameter 'wieght' \(did you mean weight\?\)"),
        (
            {"weight": torch.ones(3, 2, dtype=torch.bool)},
            r"of weight must be bool and of shape \(2, 3\), not bool \(3, 2\)",
        ),
        ({"weight": torch.ones(2, 3)}, r"of weight must be bool .* not float32 \(2, 3\)"),
    ],
)
def test_other_masks_are_refused_before_a_weight_is_touched(masks, message):
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    with pytest.raises(UsageError, match=message):
        quantkit.apply_masks(model, {"weight": torch.zeros(2, 3, dtype=torch.bool)} | masks if masks else {})
    assert torch.equal(model.weight, before)


def test_an_optimizer_of_another_model_is_refused():
    masks = quantkit.prune_module(network())
    with pytest.raises(UsageError, match="the optimizer has none of the masked parameters"):
        masks.keep(torch.optim.Adam(network().parameters()))
