"""M-FAC against the inverse of the Fisher matrix that it never writes down, in float64."""

import pytest
import torch

from quantkit.core.masks import Sparsity, keep_highest
from quantkit.core.mfac import BlockFisher, SlidingFisher, StaticFisher, densities, obs_prune, saliency, surgeon

M, SIZE, DAMP = 7, 12, 0.05


def gradients(m=M, size=SIZE, seed=0):
    return torch.randn(m, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(rows, damp=DAMP, block=None):
    """Return the inverse of λI + (1/m) Σ g g^T, entries between blocks left out."""
    matrix = damp * torch.eye(rows.shape[1], dtype=rows.dtype) + rows.T @ rows / len(rows)
    if block:
        place = torch.arange(rows.shape[1]) // block
        matrix = matrix * (place[:, None] == place)
    return torch.linalg.inv(matrix)


def products(inverse, size=SIZE):
    return torch.stack([inverse.product(column) for column in torch.eye(size, dtype=torch.float64)])


@pytest.mark.parametrize("block", [None, 12, 5, 4, 1, 100])
@pytest.mark.parametrize("m", [1, 7, 30])
def test_static_products_are_those_of_the_dense_inverse(m, block):
    rows = gradients(m)
    inverse = StaticFisher.of(rows, damp=DAMP, block=block)
    expected = dense(rows, block=block)
    torch.testing.assert_close(products(inverse), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(inverse.diagonal(), expected.diagonal(), rtol=0, atol=1e-10)


def test_one_block_of_everything_is_no_block():
    rows = gradients()
    full, blocked = StaticFisher.of(rows, damp=DAMP), StaticFisher.of(rows, damp=DAMP, block=SIZE)
    assert full.vectors.equal(blocked.vectors)


def test_the_last_gradient_counts():
    """The official code leaves its last row of gradients zero."""
    rows = gradients()
    without = torch.cat([rows[:-1], torch.zeros(1, SIZE, dtype=rows.dtype)])
    found = products(StaticFisher.of(rows, damp=DAMP))
    torch.testing.assert_close(found, dense(rows), rtol=0, atol=1e-10)
    assert (found - dense(without)).abs().max() > 1e-2
    sliding = SlidingFisher(M, SIZE, damp=DAMP, dtype=torch.float64)
    for row in rows:
        sliding.add(row)
    torch.testing.assert_close(products(sliding), dense(rows), rtol=0, atol=1e-10)


@pytest.mark.parametrize("count", [3, M, 2 * M + 4, 3 * M])
def test_a_sliding_window_is_that_of_its_gradients(count):
    rows = gradients(3 * M)
    sliding = SlidingFisher(M, SIZE, damp=DAMP, dtype=torch.float64)
    for row in rows[:count]:
        sliding.add(row)
    last = rows[max(0, count - M) : count]
    window = torch.cat([last, torch.zeros(M - len(last), SIZE, dtype=rows.dtype)])
    torch.testing.assert_close(products(sliding), dense(window), rtol=0, atol=1e-10)


def test_after_three_rounds_the_ring_is_a_fresh_build():
    rows = gradients(3 * M)
    sliding, fresh = (SlidingFisher(M, SIZE, damp=DAMP, dtype=torch.float64) for _ in range(2))
    for row in rows:
        sliding.add(row)
    for row in rows[2 * M :]:
        fresh.add(row)
    torch.testing.assert_close(products(sliding), products(fresh), rtol=0, atol=1e-12)
    static = StaticFisher.of(rows[2 * M :], damp=DAMP)
    torch.testing.assert_close(products(sliding), products(static), rtol=0, atol=1e-10)


def test_its_matrix_is_the_upper_factor_of_lu():
    rows = gradients()
    sliding = SlidingFisher(M, SIZE, damp=DAMP, dtype=torch.float64)
    for row in rows:
        sliding.add(row)
    root = torch.linalg.cholesky(rows @ rows.T / DAMP + M * torch.eye(M, dtype=rows.dtype))
    upper = root.diagonal()[:, None] * root.T  # of the factors without pivoting, whose lower one has ones
    torch.testing.assert_close(sliding.upper, upper - M * torch.eye(M, dtype=rows.dtype), rtol=0, atol=1e-9)


def test_dropping_one_weight_is_the_constrained_minimum():
    """Of ½ δ^T F δ with w_k + δ_k = 0, by its Lagrangian's linear system."""
    rows, weight, k = gradients(), gradients(1, seed=1)[0], 4
    matrix = torch.linalg.inv(dense(rows))
    system = torch.zeros(SIZE + 1, SIZE + 1, dtype=rows.dtype)
    system[:SIZE, :SIZE], system[k, SIZE], system[SIZE, k] = matrix, 1, 1
    right = torch.zeros(SIZE + 1, dtype=rows.dtype)
    right[SIZE] = -weight[k]
    move = torch.linalg.solve(system, right)[:SIZE]
    inverse = StaticFisher.of(rows, damp=DAMP)
    kept = torch.arange(SIZE) != k
    moved = surgeon(weight, kept, inverse, inverse.diagonal())
    torch.testing.assert_close(moved, weight + move, rtol=0, atol=1e-11)
    loss = 0.5 * move @ matrix @ move
    torch.testing.assert_close(saliency(weight, inverse.diagonal())[k], loss, rtol=0, atol=1e-11)


def test_densities_shrink_by_the_same_factor():
    found = densities(1.0, 0.25, 4)
    assert found[-1] == pytest.approx(0.25)
    assert [b / a for a, b in zip([1.0, *found], found, strict=False)] == pytest.approx([0.25**0.25] * 4)


@pytest.mark.parametrize("damp", [0.0, -1.0])
def test_damp_must_be_positive(damp):
    with pytest.raises(ValueError, match="damp must be positive"):
        StaticFisher.of(gradients(), damp=damp)
    with pytest.raises(ValueError, match="damp must be positive"):
        SlidingFisher(M, SIZE, damp=damp)


def test_gradients_that_are_zero_leave_the_damping_alone():
    inverse = StaticFisher.of(torch.zeros(3, 5), damp=0.5)
    assert inverse.diagonal().eq(2).all()


@pytest.mark.parametrize("block", [12, 5, 4, 1])
def test_blocks_that_are_inverted_give_what_their_gradients_do(block):
    rows, kept = gradients(30), torch.arange(SIZE) % 3 != 1
    direct = BlockFisher.of(rows, damp=DAMP, block=block).inverse(kept)
    static = StaticFisher.of(rows * kept, damp=DAMP, block=block)
    probe = gradients(1, seed=2)[0] * kept
    torch.testing.assert_close(direct.product(probe), static.product(probe), rtol=0, atol=1e-10)
    torch.testing.assert_close(direct.diagonal()[kept], static.diagonal()[kept], rtol=0, atol=1e-10)


@pytest.mark.parametrize("text", ["0.5", "0.9", "2:4", "1:4"])
@pytest.mark.parametrize("by_row", [False, True], ids=["matrix", "row"])
@pytest.mark.parametrize("m", [7, 40], ids=["few", "many"])
def test_counts_are_exact_after_all_steps(text, by_row, m):
    weight, sparsity = gradients(6, 24, seed=3), Sparsity.parse(text)
    settings = {"damp": DAMP, "block": 12, "recomputations": 5, "by_row": by_row}
    mask, values = obs_prune(weight, gradients(m, weight.numel()), sparsity, **settings)
    assert (values[~mask] == 0).all()
    if sparsity.group:
        assert (mask.view(6, -1, sparsity.group).sum(-1) == sparsity.kept).all()
    elif by_row:
        assert ((~mask).sum(1) == sparsity.count(24)).all()
    else:
        assert (~mask).sum() == sparsity.count(144)


def test_small_steps_cost_less_than_one_large_one():
    """On the quadratic loss whose matrix is F itself, where the best refit of the kept weights is known."""
    weight, rows = gradients(1, 40, seed=4), gradients(60, 40) @ gradients(40, 40, seed=5)
    F = rows.T @ rows / len(rows) + 1e-3 * torch.eye(40, dtype=rows.dtype)
    costs = {}
    for steps in (1, 4, 20):
        settings = {"damp": 1e-3, "block": 40, "recomputations": steps, "by_row": False}
        values = obs_prune(weight, rows, Sparsity(share=0.5), **settings)[1]
        costs[steps] = float((values - weight) @ F @ (values - weight).T)
    kept = keep_highest(weight.abs().flatten(), 20)
    assert costs[20] < costs[4] < costs[1]
    by_magnitude = (weight * ~kept) @ F @ (weight * ~kept).T
    assert costs[20] < float(by_magnitude)
