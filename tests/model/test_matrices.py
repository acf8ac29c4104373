"""Which parameters of a module are weight matrices, by what names, and how they are turned into rows."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from quantkit.errors import UsageError
from quantkit.model.matrices import find_matrices


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.norm = nn.LayerNorm(8)
        self.rnn = nn.LSTM(8, 5, 2, bidirectional=True, proj_size=3)
        self.cell = nn.GRUCell(8, 5)
        self.attention = nn.MultiheadAttention(8, 2)
        self.gpt = Conv1D(7, 8)
        self.head = nn.Linear(8, 16)
        self.head.weight = self.embedding.weight  # tied


INTEGERS = nn.Linear(4, 4)
INTEGERS.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)


def names(model, **options):
    return [matrix.name for matrix in find_matrices(model, **options)]


def test_every_matrix_and_nothing_else_is_found():
    model = Net()
    found = names(model)
    multiplying = {name for name, value in model.named_parameters() if value.ndim > 1} - {"embedding.weight"}
    assert set(found) == multiplying | {"head.weight"}
    assert len(found) == len(set(found)) == 1 + 12 + 2 + 2 + 1 + 1


def test_a_shared_weight_is_one_matrix():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert names(model) == ["0.weight"]


def test_targets_are_recurrent_matrices_alone():
    inputs, hidden = names(Net(), target="ih"), names(Net(), target="hh")
    assert all("weight_ih" in name for name in inputs)
    assert all("weight_hh" in name or "weight_hr" in name for name in hidden)
    assert (len(inputs), len(hidden)) == (4 + 1, 8 + 1)
    assert sorted(names(Net(), target="both")) == sorted(inputs + hidden)


def test_globs_name_parameters_or_modules():
    assert names(Net(), include=["gpt", "*.weight_ih_l1"]) == ["rnn.weight_ih_l1", "gpt.weight"]
    assert "conv.weight" not in names(Net(), exclude=["conv"])


def test_gates_are_stacked():
    found = {matrix.name: matrix for matrix in find_matrices(Net())}
    stacked = {name: matrix.stacked for name, matrix in found.items() if matrix.stacked > 1}
    assert set(stacked) == {name for name in found if "weight_ih" in name or "weight_hh" in name or "in_proj" in name}
    assert (stacked["rnn.weight_hh_l0"], stacked["cell.weight_hh"], stacked["attention.in_proj_weight"]) == (4, 3, 3)


@pytest.mark.parametrize(
    "module", [nn.Linear(6, 4), nn.Conv3d(2, 4, 2), Conv1D(4, 6)], ids=["linear", "conv", "Conv1D"]
)
def test_a_row_is_what_one_output_is_made_of(module):
    (matrix,) = find_matrices(module)
    rows = matrix.rows(matrix.weight)
    assert rows.shape[0] == 4
    assert torch.equal(matrix.unrows(rows), matrix.weight)
    with torch.no_grad():
        inputs = torch.randn(1, 6) if rows.shape[1] == 6 else torch.randn(1, 2, 2, 2, 2)
        expected = inputs.flatten() @ rows.T + module.bias
        assert torch.allclose(module(inputs).flatten(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Sequential(nn.ReLU()), {}, "Sequential has no weight matrix; give a module"),
        (Net(), {"include": ["haed"]}, r"'haed' names no weight matrix"),
        (Net(), {"exclude": ["rnn.weight_hh_l7"]}, r"'rnn.weight_hh_l7' names no .* \(did you mean rnn.weight_"),
        (Net(), {"exclude": ["*"]}, "no weight matrix is left of 19"),
        (nn.Linear(2, 2), {"target": "hh"}, "no weight matrix is left of 1 .* target hh"),
        (Net(), {"target": "hidden"}, "there is no target 'hidden'"),
        (nn.LazyLinear(4), {}, "weight has no values yet"),
        (nn.Linear(4, 4, device="meta"), {}, "weight has no values yet"),
        (parametrizations.weight_norm(nn.Linear(4, 4)), {}, "weight is computed from other parameters"),
        (INTEGERS, {}, "weight holds int8"),
    ],
)
def test_what_cannot_be_found_is_refused_in_one_line(model, options, message):
    with pytest.raises(UsageError, match=message) as refused:
        find_matrices(model, **options)
    assert "\n" not in str(refused.value)
