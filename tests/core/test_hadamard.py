"""Hadamard matrices of the orders that models have, and what a rotation by one does."""

import pytest
import torch

from quantkit.core.hadamard import hadamard, random_hadamard
from quantkit.errors import UsageError

PALEY_I = (12, 20, 28, 44, 60, 84, 108, 140, 344)  # q = 27 and 343 are powers of primes
PALEY_II = (36, 52, 76, 100, 148)  # q = 25 and 49 are powers of primes
OF_MODELS = (4, 24, 64, 288, 576, 640, 896, 960, 1152, 1536, 2304, 3072)


def is_hadamard(matrix):
    order = len(matrix)
    identity = order * torch.eye(order, dtype=torch.float64)
    return bool((matrix.abs() == 1).all()) and torch.equal(matrix @ matrix.T, identity)


@pytest.mark.parametrize("order", [1, 2, *PALEY_I, *PALEY_II, *OF_MODELS])
def test_rows_are_orthogonal(order):
    matrix = hadamard(order)
    assert matrix.shape == (order, order)
    assert matrix.dtype == torch.float64
    assert is_hadamard(matrix)


def test_the_powers_of_two_are_sylvesters():
    index = torch.arange(64)
    overlap = sum(((index[:, None] & index) >> bit) & 1 for bit in range(6))
    assert torch.equal(hadamard(64), 1.0 - 2.0 * (overlap.double() % 2))


def test_paleys_matrix_of_order_12_is_that_of_the_squares_modulo_11():
    squares = {i * i % 11 for i in range(1, 11)}
    character = [[0 if a == b else 1 if (a - b) % 11 in squares else -1 for b in range(11)] for a in range(11)]
    core = torch.tensor(character, dtype=torch.float64) + torch.eye(11, dtype=torch.float64)
    assert torch.equal(hadamard(12)[1:, 1:], core)


def test_every_order_to_200_is_built_or_refused_for_its_reason():
    for order in range(4, 201, 4):
        smallest = order
        while smallest % 8 == 0:
            smallest //= 2
        if smallest in (92, 116, 156, 172, 188):  # the orders that no prime power leads to
            with pytest.raises(UsageError, match=f"no Hadamard matrix of order {order} can be built here: none of"):
                hadamard(order)
        else:
            assert is_hadamard(hadamard(order)), order


@pytest.mark.parametrize("order", [-4, 0, 3, 6, 10, 50, 4098])
def test_an_order_that_no_hadamard_matrix_has(order):
    with pytest.raises(UsageError, match=f"no Hadamard matrix of order {order}; orders are 1, 2 and multiples of 4"):
        hadamard(order)


@pytest.mark.parametrize("order", [12, 64, 576])
def test_a_random_one_is_orthogonal_and_has_one_magnitude(order):
    matrix = random_hadamard(order, seed=3)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(order, dtype=torch.float64), rtol=0, atol=1e-13)
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, order**-0.5))


def test_a_random_one_depends_on_the_seed_alone():
    state = torch.random.get_rng_state()
    assert torch.equal(random_hadamard(64, seed=1), random_hadamard(64, seed=1))
    assert not torch.equal(random_hadamard(64, seed=1), random_hadamard(64, seed=2))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_signs_matter_for_the_magnitudes():
    # a row of H itself would be gathered into one channel; behind random signs it is spread like any other vector
    row = hadamard(256)[5] / 16
    assert (row @ hadamard(256) / 16).abs().max() == pytest.approx(1.0)
    assert (row @ random_hadamard(256, seed=0)).abs().max() < 0.3
