"""GPTQ against the update it stands for: one column removed at a time, H inverted anew for those that are left."""

import itertools

import pytest
import torch

from quantkit.core.affine import group_bounds, quantize, round_to_nearest
from quantkit.core.scheme import QuantScheme
from quantkit.core.second_order import Curvature, gptq

OUT, IN, SIZE = 6, 24, 8
SCHEMES = [
    QuantScheme(bits=bits, group_size=size, symmetric=symmetric)
    for bits, size, symmetric in itertools.product((2, 4), (SIZE, None), (False, True))
]
EVERY_SCHEME = pytest.mark.parametrize("scheme", SCHEMES, ids=str)
SCHEME = QuantScheme(bits=3, group_size=SIZE)
BF16 = torch.bfloat16


def problem(seed=0, out=OUT, width=IN, tokens=200):
    """Return a weight, and inputs whose channels are correlated and of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) * torch.linspace(0.2, 2, width)
    inputs = torch.randn(tokens, width, generator=generator) @ mixing
    return torch.randn(out, width, generator=generator), inputs


def hessian(inputs):
    return 2 * inputs.T @ inputs / len(inputs)


def grid(weight, scheme, dtype=BF16):
    """Return step and zero (signed codes) of each row of `weight` as a single group, in float64."""
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    top, bottom = 2 ** (scheme.bits - 1) - 1, -(2 ** (scheme.bits - 1))
    step = torch.maximum(-low, high) / top if scheme.symmetric else (high - low) / (top - bottom)
    step = step.clamp(min=1e-5).to(dtype).double()
    return step, torch.zeros_like(step) if scheme.symmetric else (-low / step).round() + bottom


def remove_one_by_one(weight, inputs, scheme, *, order, damp=0.01, grids=None, dtype=BF16):
    """Return the codes by Optimal Brain Surgeon's updates (GPTQ's eq. 2 and 3), in float64.

    `grids` gives (step, zero) of a column; without it a group's are found from its weights as they are when its first
    column's turn comes.
    """
    H = hessian(inputs).double()
    H += damp * H.diagonal().mean() * torch.eye(len(H))
    W, codes, size = weight.double(), torch.empty(weight.shape), scheme.group_size or weight.shape[1]
    left = list(order)
    while left:
        column = left[0]
        if grids is not None:
            step, zero = grids(column)
        elif column % size == 0:
            step, zero = grid(W[:, column : column + size].float(), scheme, dtype)
        code = ((W[:, column] / step).round() + zero).clamp(-(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1)
        codes[:, column] = code
        inverse = torch.linalg.inv(H[left][:, left])
        error = (W[:, column] - ((code - zero) * step).to(dtype).double()) / inverse[0, 0]
        W[:, left] -= error[:, None] * inverse[0]
        left.pop(0)
    return codes.to(torch.int8)


def by_size(inputs):
    return sorted(range(inputs.shape[1]), key=lambda column: -float(hessian(inputs)[column, column]))


@EVERY_SCHEME
def test_columns_in_order_are_those_of_the_updates_one_by_one(scheme):
    weight, inputs = problem()
    curvature = Curvature.of(hessian(inputs), act_order=False)
    expected = remove_one_by_one(weight, inputs, scheme, order=range(IN))
    assert torch.equal(gptq(weight, curvature, scheme, BF16)[0].codes, expected)


@EVERY_SCHEME
@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
def test_columns_by_size_are_those_of_the_updates_one_by_one(scheme, dtype):
    weight, inputs = problem(seed=1)
    size = scheme.group_size or IN

    def original(column):
        start = column // size * size
        return grid(weight[:, start : start + size], scheme, dtype)

    expected = remove_one_by_one(weight, inputs, scheme, order=by_size(inputs), grids=original, dtype=dtype)
    found, _ = gptq(weight, Curvature.of(hessian(inputs)), scheme, dtype)
    assert torch.equal(found.codes, expected)
    assert found.scale.dtype == dtype


@EVERY_SCHEME
def test_a_transposed_weight_has_groups_across_its_columns(scheme):
    weight, inputs = problem(seed=2, out=2 * SIZE)
    size = scheme.group_size or len(weight)

    def original(column):
        step, zero = grid(weight[:, column].reshape(-1, size), scheme)
        return step.repeat_interleave(size), zero.repeat_interleave(size)

    for act_order, order in ((True, by_size(inputs)), (False, range(IN))):
        expected = remove_one_by_one(weight, inputs, scheme, order=order, grids=original)
        curvature = Curvature.of(hessian(inputs), act_order=act_order)
        found, _ = gptq(weight.T.contiguous(), curvature, scheme, BF16, transposed=True)
        assert torch.equal(found.codes, expected.T)


def test_the_second_of_two_columns_moves_as_far_as_pays():
    """The minimum of (e1, e2) H (e1, e2)^T over e2 lies at e2 = -e1 H12 / H22."""
    weight = torch.tensor([[0.3, -1.0], [0.7, 0.45]])
    H = torch.tensor([[2.0, 0.8], [0.8, 1.0]])
    found, moved = gptq(weight, Curvature.of(H, damp=0.0), QuantScheme(bits=2), BF16)
    first = weight[:, 0] - found.dequantize().float()[:, 0]
    assert torch.equal(moved[:, 0], weight[:, 0])
    assert torch.allclose(moved[:, 1], weight[:, 1] + first * 0.8 / 1.0)


@pytest.mark.parametrize("act_order", [True, False])
def test_the_moved_weight_rounds_to_the_codes(act_order):
    weight, inputs = problem(seed=3)
    found, moved = gptq(weight, Curvature.of(hessian(inputs), act_order=act_order), SCHEME, BF16)
    step, zero = (values.float().repeat_interleave(SIZE, 1) for values in (found.scale, found.zero_point))
    assert torch.equal(((moved / step).round() + zero).clamp(-4, 3).to(torch.int8), found.codes)
    if act_order:
        assert torch.equal(quantize(moved, *group_bounds(weight, SCHEME), SCHEME, BF16).codes, found.codes)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("block", [1, 5, 7, 1000])
def test_the_block_decides_nothing(block, act_order):
    weight, inputs = problem(seed=4)
    curvature = Curvature.of(hessian(inputs), act_order=act_order)
    whole, part = (gptq(weight, curvature, SCHEME, BF16, block=size)[0] for size in (IN, block))
    assert torch.equal(whole.codes, part.codes)


def test_uncorrelated_inputs_leave_rounding_to_nearest():
    weight, _ = problem(seed=5)
    found, moved = gptq(weight, Curvature.of(torch.eye(IN) * torch.arange(1.0, IN + 1)), SCHEME, BF16)
    assert torch.equal(found.codes, round_to_nearest(weight, SCHEME, BF16).codes)
    assert torch.equal(moved, weight)


@pytest.mark.parametrize("act_order", [True, False])
def test_a_column_without_input_is_rounded_to_nearest_and_moves_no_other(act_order):
    weight, inputs = problem(seed=6)
    inputs[:, 10] = 0
    curvature = Curvature.of(hessian(inputs), act_order=act_order)
    bounds = group_bounds(weight, SCHEME)
    found, moved = gptq(weight, curvature, SCHEME, BF16, bounds=bounds)
    assert torch.equal(found.codes[:, 10], round_to_nearest(weight, SCHEME, BF16).codes[:, 10])
    far = weight.clone()
    far[:, 10] += 1  # its error is another one now
    assert torch.equal(gptq(far, curvature, SCHEME, BF16, bounds=bounds)[1][:, :10], moved[:, :10])
    assert torch.equal(gptq(far, curvature, SCHEME, BF16, bounds=bounds)[1][:, 11:], moved[:, 11:])


def test_no_input_at_all_leaves_rounding_to_nearest():
    weight, _ = problem()
    found, _ = gptq(weight, Curvature.of(torch.zeros(IN, IN)), SCHEME, BF16)
    assert torch.equal(found.codes, round_to_nearest(weight, SCHEME, BF16).codes)


def test_a_hessian_without_a_factor_is_damped_until_it_has_one():
    _, inputs = problem(seed=7, tokens=5)  # rank 5
    curvature = Curvature.of(hessian(inputs) - 1e-3 * torch.eye(IN), damp=0.0)
    assert 0 < curvature.damp < 0.1
    assert curvature.feedback.isfinite().all()
    assert Curvature.of(hessian(inputs), damp=0.01).damp == 0.01


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("act_order", [True, False])
@EVERY_SCHEME
def test_the_output_error_is_below_that_of_rounding(scheme, act_order, seed):
    weight, inputs = problem(seed, out=32, width=64)
    curvature = Curvature.of(hessian(inputs), act_order=act_order)

    def error(tensor):
        return (inputs @ (weight - tensor.dequantize().float()).T).square().sum()

    found, _ = gptq(weight, curvature, scheme, BF16)
    assert error(found) < error(round_to_nearest(weight, scheme, BF16))
