"""Pruning of any module: exact counts, what is compared with what, Wanda's norms, refusals."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import quantkit
from quantkit.errors import UsageError
from quantkit.model.matrices import find_matrices
from quantkit.modules import input_energies


def zeros(weight):
    return int((weight == 0).sum())


def dropped(mask):
    return int((~mask).sum())


MODULES = {
    "linear": lambda: nn.Linear(10, 7),
    "conv1d": lambda: nn.Conv1d(4, 6, 3),
    "conv2d": lambda: nn.Conv2d(4, 6, (3, 2), groups=2),
    "conv3d": lambda: nn.Conv3d(2, 8, 2),
    "Conv1D": lambda: Conv1D(7, 10),
    "rnn": lambda: nn.RNN(5, 6, 2),
    "lstm": lambda: nn.LSTM(5, 6, bidirectional=True),
    "gru": lambda: nn.GRU(5, 6, 2),
    "cell": lambda: nn.LSTMCell(5, 6),
    "attention": lambda: nn.MultiheadAttention(8, 2),
}


@pytest.mark.parametrize("sparsity", [0, 0.3, 0.9])
@pytest.mark.parametrize("name", MODULES)
def test_counts_are_exact_and_the_smallest_weights_go(name, sparsity):
    torch.manual_seed(0)
    model = MODULES[name]()
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    masks = quantkit.prune_module(model, sparsity=sparsity)
    assert set(masks) == {key for key, value in before.items() if value.ndim > 1}
    for key, value in model.named_parameters():
        if key in masks:
            assert dropped(masks[key]) == zeros(value) == round(sparsity * value.numel())
            assert torch.equal(value, before[key] * masks[key])
            if zeros(value):
                assert before[key][~masks[key]].abs().max() <= before[key][masks[key]].abs().min()
        else:
            assert torch.equal(value, before[key])


def test_the_percentile_of_the_study():
    """Weights above the p-th percentile stay, as numpy computes it."""
    model = nn.LSTM(12, 10)
    weight = model.weight_hh_l0.detach().clone()
    quantkit.prune_module(model, sparsity=0.7, target="hh")
    threshold = weight.abs().flatten().quantile(0.7)
    assert torch.equal(model.weight_hh_l0, weight * (weight.abs() > threshold))
    assert model.weight_ih_l0.all()


def test_scopes():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    with torch.no_grad():
        model[0].weight.mul_(100)
    rows = quantkit.prune_module(model, sparsity=0.5, scope="row")
    assert [(~mask).sum(dim=1).unique().tolist() for mask in rows.values()] == [[4], [3]]
    rows.restore()
    everywhere = quantkit.prune_module(model, sparsity=0.5, scope="global")
    assert [dropped(mask) for mask in everywhere.values()] == [(48 + 24) // 2 - 24, 24]


@pytest.mark.parametrize(("module", "gates"), [(nn.LSTM(6, 5), 4), (nn.GRU(6, 5), 3), (nn.RNN(6, 5), 1)])
def test_gates_can_be_compared_each_by_itself(module, gates):
    with torch.no_grad():
        module.weight_hh_l0[:5].mul_(0.01)  # the first gate is small: over the stack it would go first
    expected = torch.cat([gate.abs() > gate.abs().flatten().quantile(0.4) for gate in module.weight_hh_l0.chunk(gates)])
    masks = quantkit.prune_module(module, sparsity=0.4, target="hh", per_gate=True)
    assert torch.equal(masks["weight_hh_l0"], expected)
    masks.restore()
    stacked = quantkit.prune_module(module, sparsity=0.4, target="hh")["weight_hh_l0"]
    assert dropped(stacked) == dropped(expected)
    assert (dropped(stacked[:5]) > dropped(expected[:5])) == (gates > 1)


def test_n_of_m_inputs_stay_whichever_way_the_weight_lies():
    linear, conv1d = nn.Linear(8, 6), Conv1D(6, 8)
    with torch.no_grad():
        conv1d.weight.copy_(linear.weight.T)
    mask = quantkit.prune_module(linear, sparsity="2:4")["weight"]
    assert mask.unflatten(1, (2, 4)).sum(dim=-1).unique().tolist() == [2]
    assert torch.equal(quantkit.prune_module(conv1d, sparsity="2:4")["weight"], mask.T)


def test_pruning_further_keeps_what_is_pruned():
    model = nn.GRU(8, 8)
    first = quantkit.prune_module(model, sparsity=0.4)
    second = quantkit.prune_module(model, sparsity=0.8)
    assert not any((second[name] & ~first[name]).any() for name in first)


@pytest.mark.parametrize("graph", ["watts-strogatz", "barabasi-albert"])
@pytest.mark.parametrize("name", MODULES)
def test_random_graphs_have_exact_counts_and_seeds_and_one_structure_for_all_gates(name, graph):
    options = {"sparsity": 0.6, "method": "random-graph", "graph": graph}
    masks = dict(quantkit.prune_module(MODULES[name](), **options))
    for matrix in find_matrices(MODULES[name]()):
        gates = matrix.rows(masks[matrix.name]).chunk(matrix.stacked)
        assert dropped(gates[0]) == round(0.6 * gates[0].numel())
        assert all(torch.equal(gate, gates[0]) for gate in gates)
    again = quantkit.prune_module(MODULES[name](), **options)
    other = quantkit.prune_module(MODULES[name](), **options, seed=1)
    assert all(torch.equal(again[key], mask) for key, mask in masks.items())
    assert not all(torch.equal(other[key], mask) for key, mask in masks.items())


CONVOLUTIONS = [
    nn.Conv2d(4, 6, 3, stride=2, padding=1),
    nn.Conv2d(4, 6, (3, 2), dilation=2, groups=2, bias=False),
    nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", groups=4),
]


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=["stride", "groups", "circular"])
def test_energies_of_a_convolution_are_those_of_its_patches(conv):
    inputs = torch.randn(3, 4, 9, 8)
    padded = (
        F.pad(inputs, conv._reversed_padding_repeated_twice, mode="circular")
        if conv.padding_mode != "zeros"
        else inputs
    )
    padding = 0 if conv.padding_mode != "zeros" else conv.padding
    patches = F.unfold(
        padded, conv.kernel_size, conv.dilation, padding, conv.stride
    )  # (batch, channels·kernel, places)
    energy = patches.square().sum(dim=(0, 2)).view(conv.groups, 1, -1)
    expected = energy.expand(-1, conv.out_channels // conv.groups, -1).reshape(conv.weight.shape)
    found = input_energies(conv, find_matrices(conv), inputs)["weight"]
    assert torch.allclose(found, expected, rtol=1e-5)


def test_wanda_compares_weights_times_norms_within_rows():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Dropout(0.5), Conv1D(5, 6))
    model[0].weight.requires_grad_(False)
    inputs = torch.randn(20, 3, 8) * torch.logspace(-1, 1, 8)
    hidden = model[1](model[0](inputs)).flatten(0, 1)  # dropout is off while inputs are measured
    scores = {
        "0.weight": model[0].weight.abs() * inputs.flatten(0, 1).norm(dim=0),
        "3.weight": (model[3].weight.abs() * hidden.norm(dim=0)[:, None]).T,
    }
    masks = quantkit.prune_module(model, sparsity=0.5, method="wanda", inputs=inputs)
    for name, score in scores.items():
        expected = score > score.kthvalue(score.shape[1] // 2, dim=1, keepdim=True).values
        assert torch.equal(masks[name] if name == "0.weight" else masks[name].T, expected)
    assert model.training
    assert model[2].training
    assert not model[0].weight.requires_grad
    assert not any(module._forward_pre_hooks for module in model)


def test_wanda_loses_less_of_the_output_than_magnitude():
    torch.manual_seed(0)
    inputs = torch.randn(64, 4, 12, 12) * torch.tensor([0.1, 0.3, 1.0, 3.0]).view(1, 4, 1, 1)
    conv = nn.Conv2d(4, 8, 3)
    expected, losses = conv(inputs), {}
    for method, options in {"magnitude": {"scope": "row"}, "wanda": {"inputs": inputs}}.items():
        masks = quantkit.prune_module(conv, sparsity=0.5, method=method, **options)
        losses[method] = (conv(inputs) - expected).square().mean().item()
        masks.restore()
    assert losses["wanda"] < 0.5 * losses["magnitude"]


def test_inputs_may_be_arguments_or_names():
    model = nn.Bilinear(3, 4, 2)
    named = nn.Linear(3, 2)
    assert "weight" in quantkit.prune_module(named, method="wanda", inputs={"input": torch.randn(5, 3)})
    assert "weight" in quantkit.prune_module(named, method="wanda", inputs=(torch.randn(5, 3),))
    with pytest.raises(UsageError, match="Bilinear has no weight matrix"):
        quantkit.prune_module(model)


NOT_FINITE = nn.Linear(2, 2)
with torch.no_grad():
    NOT_FINITE.weight[0, 0] = math.nan


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Linear(4, 4), {"sparsity": 1.0}, "sparsity is the share .* not 1"),
        (nn.Linear(4, 4), {"sparsity": -0.1}, "sparsity is the share .* not -0.1"),
        (nn.Linear(4, 4), {"sparsity": "4:2"}, "4:2"),
        (nn.Linear(6, 4), {"sparsity": "2:4"}, "weight: 2:4 needs rows of a multiple of 4 inputs, not 6"),
        (nn.Linear(4, 4), {"method": "magnitud"}, r"no method 'magnitud' \(did you mean magnitude\?\)"),
        (nn.Linear(4, 4), {"scope": "column"}, "there is no scope 'column'"),
        (nn.LSTM(4, 4), {"scope": "global", "per_gate": True}, "choose one of them"),
        (nn.Linear(4, 4), {"method": "wanda"}, "wanda needs inputs"),
        (nn.Linear(4, 4), {"inputs": torch.ones(1, 4)}, "other methods take none"),
        (
            nn.Linear(4, 4),
            {"method": "wanda", "inputs": torch.ones(1, 4), "scope": "global"},
            "norms of different inputs",
        ),
        (nn.Linear(4, 4), {"method": "random-graph", "graph": "erdos"}, "there is no graph 'erdos'"),
        (nn.Linear(4, 4), {"method": "random-graph", "scope": "row"}, "a random graph compares no weights"),
        (nn.Linear(8, 2), {"method": "random-graph"}, "weight has 2 outputs of 8 inputs; a graph needs 3"),
        (nn.LSTM(4, 4), {"method": "wanda", "inputs": torch.ones(1, 1, 4)}, "what reaches weight_ih_l0 cannot be seen"),
        (NOT_FINITE, {}, "weight or what reaches it is not finite"),
        (nn.ReLU(), {}, "ReLU has no weight matrix"),
        (nn.Linear(4, 4), {"include": ["head"]}, "'head' names no weight matrix"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_changes_nothing(model, options, message):
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(UsageError, match=message) as refused:
        quantkit.prune_module(model, **options)
    assert "\n" not in str(refused.value)
    after = list(model.parameters())
    assert all(torch.equal(a, b) or b.isnan().any() for a, b in zip(after, before, strict=True))


def test_a_weight_that_no_input_reaches_is_refused():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(UsageError, match=r"the inputs never reach idle.weight; exclude it"):
        quantkit.prune_module(Half(), method="wanda", inputs=torch.ones(1, 4))
    masks = quantkit.prune_module(Half(), method="wanda", inputs=torch.ones(1, 4), exclude=["idle"])
    assert [*masks] == ["used.weight"]
