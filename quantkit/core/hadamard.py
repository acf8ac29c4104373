"""Hadamard matrices: square, entries +1 and -1, rows orthogonal; and random rotations made of them.

A matrix of order n is made from a small one by Sylvester's doubling, [[H, H], [H, -H]]. The small one is Paley's
(R. E. A. C. Paley, On orthogonal matrices, J. Math. Phys. 12, 1933). Let q be a power of an odd prime and Q the matrix
with Q[a, b] = +1, -1 or 0 as a - b is a square of the field of q elements, is none, or is zero. With 1 a column of ones

    q = 3 mod 4:  order q + 1,     I + [[0, 1'], [-1, Q]]
    q = 1 mod 4:  order 2(q + 1),  [[0, 1'], [1, Q]] (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]]

so no table of matrices is needed for the widths of today's models.
"""

from itertools import product

import torch
from jaxtyping import Float64
from torch import Tensor

from quantkit.errors import UsageError


def hadamard(order: int) -> Float64[Tensor, "order order"]:
    """Return H with entries +1 and -1 and H H' = order I, always the same one.

    Raises:
        UsageError: there is none of this order, or none that Sylvester's and Paley's constructions give.
    """
    if order < 1 or (order > 2 and order % 4):
        raise UsageError(f"there is no Hadamard matrix of order {order}; orders are 1, 2 and multiples of 4")
    divisors = [order >> doublings for doublings in range(order.bit_length()) if order % (1 << doublings) == 0]
    matrix = next((found for small in reversed(divisors) if (found := _smallest(small)) is not None), None)
    if matrix is None:
        raise UsageError(
            f"no Hadamard matrix of order {order} can be built here: none of its halvings is one more than a prime "
            "power, or two more than twice one"
        )
    while len(matrix) < order:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix


def random_hadamard(order: int, seed: int) -> Float64[Tensor, "order order"]:
    """Return the orthogonal matrix D H / sqrt(order) with random signs D, for rows that are multiplied from the left.

    The signs come first (x D H): behind H they would change no magnitude (QuaRot, arXiv 2404.00456, section 3).

    Raises:
        UsageError: see `hadamard`.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = 2.0 * torch.randint(2, (order, 1), generator=generator, dtype=torch.float64) - 1.0
    return hadamard(order).mul_(signs).div_(order**0.5)


def _smallest(order: int) -> Float64[Tensor, "order order"] | None:
    """Return a matrix that is no doubled one, None if Paley's constructions do not give this order."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order % 4:
        return None
    if power := _prime_power(order - 1):
        return _conference(*power, lower=-1.0) + torch.eye(order, dtype=torch.float64)
    half = order // 2
    if (half - 1) % 4 == 1 and (power := _prime_power(half - 1)):
        doubled = torch.kron(_conference(*power, lower=1.0), _signs("++", "+-"))
        return doubled + torch.kron(torch.eye(half, dtype=torch.float64), _signs("+-", "--"))
    return None


def _signs(*rows: str) -> Float64[Tensor, "order order"]:
    return torch.tensor([[1.0 if sign == "+" else -1.0 for sign in row] for row in rows], dtype=torch.float64)


def _conference(prime: int, degree: int, *, lower: float) -> Float64[Tensor, "order order"]:
    """Return [[0, 1'], [lower, Q]] for the field of prime^degree elements, written as numbers in base `prime`."""
    size = prime**degree
    places = prime ** torch.arange(degree)
    digits = torch.arange(size)[:, None] // places % prime
    character = torch.full((size,), -1.0, dtype=torch.float64)
    character[[sum(d * prime**i for i, d in enumerate(square)) for square in _squares(prime, degree)]] = 1.0
    character[0] = 0.0
    difference = ((digits[:, None] - digits[None]) % prime * places).sum(-1)
    matrix = torch.zeros(size + 1, size + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0], matrix[1:, 1:] = 1.0, lower, character[difference]
    return matrix


def _squares(prime: int, degree: int) -> list[tuple[int, ...]]:
    """Return the squares other than 0 of the field, as coefficients of polynomials in x: the even powers of a root.

    x^degree = taps(x) defines the field with x as a root of all elements if x has prime^degree - 1 different powers.
    """
    one = (1,) + (0,) * (degree - 1)
    for taps in product(range(prime), repeat=degree):
        powers = [one]
        while len(powers) < prime**degree:
            *rest, top = powers[-1]
            following = tuple((a + top * b) % prime for a, b in zip((0, *rest), taps, strict=True))
            if following == one:
                break
            powers.append(following)
        if len(powers) == prime**degree - 1:
            return powers[::2]
    raise AssertionError(f"the field of {prime}^{degree} elements has a primitive root")


def _prime_power(number: int) -> tuple[int, int] | None:
    """Return the prime and the exponent if `number` is a power of an odd prime, else None."""
    prime = next((d for d in range(3, int(number**0.5) + 1, 2) if number % d == 0), number)
    degree = 0
    while number % prime == 0 and number > 1:
        number //= prime
        degree += 1
    return (prime, degree) if number == 1 and degree and prime % 2 else None
