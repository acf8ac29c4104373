"""SparseGPT against its own definition: one column settled at a time, H inverted anew for those that are left."""

import pytest
import torch

from quantkit.core import masks
from quantkit.core.masks import Sparsity
from quantkit.core.scheme import QuantScheme
from quantkit.core.second_order import Curvature, gptq
from quantkit.core.sparsegpt import sparsegpt

OUT, IN = 6, 24


def problem(seed=0, out=OUT, width=IN, tokens=200):
    """Return a weight, and inputs whose channels are correlated and of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) * torch.linspace(0.2, 2, width)
    return torch.randn(out, width, generator=generator), torch.randn(tokens, width, generator=generator) @ mixing


def hessian(inputs):
    return 2 * inputs.T @ inputs / len(inputs)


def one_by_one(weight, second_moment, sparsity, *, damp=0.01, block=8):
    """Return mask and weight by the paper's updates, each from the inverse of H for the columns that are left."""
    H = second_moment.double()
    H = H + damp * H.diagonal().mean() * torch.eye(len(H))
    W, kept = weight.double().clone(), torch.ones(weight.shape, dtype=torch.bool)
    size, width = sparsity.group or block, weight.shape[1]
    for column in range(width):
        inverse = torch.linalg.inv(H[column:, column:])
        if column % size == 0:
            here = range(column, min(column + size, width))
            costs = torch.stack([W[:, j] ** 2 / torch.linalg.inv(H[j:, j:])[0, 0] for j in here], dim=1)
            if sparsity.group:
                kept[:, here] = masks.choose(costs, sparsity)
            else:
                dropped = sparsity.count(here.stop * len(W)) - sparsity.count(here.start * len(W))
                flat = costs.T.flatten().argsort(stable=True)[:dropped]
                part = torch.ones(costs.numel(), dtype=torch.bool)
                part[flat] = False
                kept[:, here] = part.view(-1, len(W)).T
        error = (W[:, column] * ~kept[:, column]) / inverse[0, 0]
        W[:, column:] -= error[:, None] * inverse[0]
        W[:, column] *= kept[:, column]
    return kept, W


@pytest.mark.parametrize("text", ["0.5", "0.7", "2:4", "4:8", "1:3"])
@pytest.mark.parametrize("transposed", [False, True], ids=["out-in", "in-out"])
def test_it_does_what_the_paper_does_column_by_column(text, transposed):
    weight, inputs = problem()
    sparsity = Sparsity.parse(text)
    curvature = Curvature.of(hessian(inputs), act_order=False)
    given = weight.T.contiguous() if transposed else weight
    mask, values = sparsegpt(given, curvature, sparsity, transposed=transposed, block=8)
    mask, values = (part.T if transposed else part for part in (mask, values))
    expected_mask, expected = one_by_one(weight, hessian(inputs), sparsity)
    assert mask.equal(expected_mask)
    torch.testing.assert_close(values.double(), expected, rtol=1e-3, atol=1e-4)
    assert (values[~mask] == 0).all()
    assert (~mask).sum() == (
        sparsity.count(weight.numel()) if not sparsity.group else round(sparsity.share * weight.numel())
    )


def test_dropping_one_column_is_the_least_squares_refit_of_the_others():
    weight, inputs = problem(out=1, width=6)
    inputs, weight = inputs.double(), weight.double()
    H = hessian(inputs)
    kept = torch.tensor([[False, True, True, True, True, True]])
    curvature = Curvature.of(H, damp=0.0, act_order=False)
    wanted = weight.clone()
    wanted[:, 0] = 0.01  # far the cheapest, so it goes
    mask, values = sparsegpt(wanted.float(), curvature, Sparsity(share=1 / 6))
    assert mask.equal(kept)
    target = inputs @ wanted.T
    refit = torch.linalg.lstsq(inputs[:, 1:], target).solution.T
    torch.testing.assert_close(values[:, 1:].double(), refit, rtol=1e-4, atol=1e-5)
    loss = (inputs @ wanted.T - inputs[:, 1:] @ refit.T).square().sum() / len(inputs)
    predicted = wanted[0, 0] ** 2 / (2 * torch.linalg.inv(H)[0, 0])
    torch.testing.assert_close(loss, predicted, rtol=1e-6, atol=0)


def test_its_pivots_are_what_a_column_costs():
    _, inputs = problem(width=6)
    H = hessian(inputs).double()
    curvature = Curvature.of(H, damp=0.0, act_order=False)
    costs = torch.tensor([1 / torch.linalg.inv(H[j:, j:])[0, 0] for j in range(6)])
    torch.testing.assert_close(curvature.pivots.double(), costs.double(), rtol=1e-5, atol=0)


def test_dead_inputs_go_first_and_a_singular_hessian_is_damped():
    weight, inputs = problem(tokens=10)  # fewer tokens than inputs
    inputs[:, [3, 17]] = 0
    curvature = Curvature.of(hessian(inputs), damp=0.0, act_order=False)
    assert curvature.damp > 0
    mask, values = sparsegpt(weight, curvature, Sparsity(share=0.5), block=24)
    assert not mask[:, [3, 17]].any()
    assert values.isfinite().all()


@pytest.mark.parametrize("text", ["0.5", "2:4"])
@pytest.mark.parametrize("seed", range(3))
def test_the_output_is_nearer_than_wandas_and_magnitudes(text, seed):
    weight, inputs = problem(seed)
    sparsity = Sparsity.parse(text)
    pruned = {
        "sparsegpt": sparsegpt(weight, Curvature.of(hessian(inputs), act_order=False), sparsity)[1],
        "wanda": masks.apply(weight, masks.choose(weight.abs() * inputs.norm(dim=0), sparsity, "row")),
        "magnitude": masks.apply(weight, masks.choose(weight.abs(), sparsity)),
    }
    error = {name: float((inputs @ (values - weight).T).square().mean()) for name, values in pruned.items()}
    assert error["sparsegpt"] < error["wanda"] < error["magnitude"]


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group", [8, None])
def test_gptq_gives_masked_weights_nothing_and_makes_up_for_them(act_order, group):
    """With a mask GPTQ rounds and prunes at once: the errors that it makes up for are those of the whole weights."""
    weight, inputs = problem()
    mask = masks.choose(weight.abs() * inputs.norm(dim=0), Sparsity.parse("2:4"))
    scheme = QuantScheme(bits=4, group_size=group)
    curvature = Curvature.of(hessian(inputs), act_order=act_order)
    after = gptq(masks.apply(weight, mask), curvature, scheme, torch.bfloat16, mask=mask)[0].dequantize().float()
    joint = gptq(weight, curvature, scheme, torch.bfloat16, mask=mask)[0].dequantize().float()
    assert (after[~mask] == 0).all()
    assert (joint[~mask] == 0).all()
    error = [float((inputs @ (w - weight).T).square().mean()) for w in (after, joint)]
    assert error[1] < error[0]
