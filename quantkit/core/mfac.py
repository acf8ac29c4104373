"""M-FAC: products with the inverse of a Fisher matrix made of m gradients, never written down (arXiv 2107.03356).

Frantar, Kurtic and Alistarh. F = λ I + (1 / m) Σ g_i g_i^T, and with v_i = F_(i-1)^-1 g_i and c_i = m + g_i^T v_i, by
Sherman and Morrison,

    v_i = g_i / λ - Σ_(j<i) v_j (v_j^T g_i) / c_j
    F^-1 x = x / λ - Σ_i v_i (v_i^T x) / c_i            [F^-1]_kk = 1 / λ - Σ_i v_ik^2 / c_i

`StaticFisher` has all gradients at once, and may be block-diagonal: consecutive numbers of a vector are correlated with
each other within blocks alone. `SlidingFisher` keeps the last m gradients of an endless row of them; what it computes
of a gradient is its products with the others (section 3.2):

    S = G G^T    D_ij = S_ij / λ - Σ_(k<i) D_ki D_kj / (m + D_kk)    v = B G

A weight w_k that is dropped while the others make up for it costs w_k^2 / (2 [F^-1]_kk), and moves the others by
-F^-1 e_k w_k / [F^-1]_kk (Optimal Brain Surgeon).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from quantkit.core.masks import Sparsity, choose


@dataclass(frozen=True, kw_only=True, slots=True)
class StaticFisher:
    """The inverse of F, blocks of the vectors apart.

    Attributes:
        damp: λ.
        vectors: v_i of each block; the last is filled up with zeros.
        divisors: c_i of each block.
        size: numbers in a vector.
    """

    damp: float
    vectors: Float[Tensor, "blocks m width"]
    divisors: Float[Tensor, "blocks m"]
    size: int

    @classmethod
    @torch.no_grad()
    def of(cls, gradients: Float[Tensor, "m size"], *, damp: float, block: int | None = None) -> "StaticFisher":
        """Return it for all of the gradients; O(m^2 size).

        Args:
            gradients: one a row.
            damp: λ > 0.
            block: numbers that are correlated with each other; None: all of them.

        Raises:
            ValueError: λ is not positive, or a gradient is not finite.
        """
        if not damp > 0 or not gradients.isfinite().all():
            raise ValueError(f"damp must be positive and gradients finite; damp is {damp}")
        count, size = gradients.shape
        parts = _blocks(gradients, block or size)
        vectors, divisors = torch.zeros_like(parts), parts.new_zeros(parts.shape[:2])
        for i in range(count):
            gradient = parts[:, i]
            earlier, scale = vectors[:, :i], divisors[:, :i]
            shares = (earlier @ gradient.unsqueeze(-1)).squeeze(-1) / scale
            vectors[:, i] = gradient / damp - (shares.unsqueeze(1) @ earlier).squeeze(1)
            divisors[:, i] = count + (gradient * vectors[:, i]).sum(dim=-1)
        return cls(damp=damp, vectors=vectors, divisors=divisors, size=size)

    def product(self, vector: Float[Tensor, " size"]) -> Float[Tensor, " size"]:
        """Return F^-1 times a vector."""
        parts = _blocks(vector.unsqueeze(0), self.vectors.shape[2])[:, 0]
        shares = (self.vectors @ parts.unsqueeze(-1)).squeeze(-1) / self.divisors
        result = parts / self.damp - (shares.unsqueeze(1) @ self.vectors).squeeze(1)
        return result.flatten()[: self.size]

    def diagonal(self) -> Float[Tensor, " size"]:
        """Return the diagonal of F^-1."""
        taken = torch.einsum("bmw,bm->bw", self.vectors.square(), self.divisors.reciprocal())
        return (1 / self.damp - taken).flatten()[: self.size]


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockFisher:
    """F itself, blocks of the vectors apart: less work than `StaticFisher` where gradients outnumber a block's numbers.

    Attributes:
        blocks: λ I + (1 / m) Σ g g^T of each block; with ones where the vectors are filled up.
        size: numbers in a vector.
    """

    blocks: Float[Tensor, "blocks width width"]
    size: int

    @classmethod
    @torch.no_grad()
    def of(cls, gradients: Float[Tensor, "m size"], *, damp: float, block: int) -> "BlockFisher":
        """Return F of all of the gradients."""
        count, size = gradients.shape
        parts = _blocks(gradients, block)
        matrix = parts.transpose(1, 2) @ parts / count
        matrix.diagonal(dim1=1, dim2=2).add_(damp)
        return cls(blocks=matrix, size=size)

    @torch.no_grad()
    def inverse(self, kept: Bool[Tensor, " size"]) -> "BlockInverse":
        """Return the inverse of F on what is kept; elsewhere that of the identity."""
        here = _blocks(kept.to(self.blocks.dtype).unsqueeze(0), self.blocks.shape[1])[:, 0]
        matrix = self.blocks * here.unsqueeze(1) * here.unsqueeze(2)
        matrix.diagonal(dim1=1, dim2=2).add_(1 - here)
        means, more = matrix.diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True), 1e-6
        factor, failed = torch.linalg.cholesky_ex(matrix)
        while failed.any():  # as far apart as float32 cannot tell: more of λ there
            matrix.diagonal(dim1=1, dim2=2).add_(means * more * (failed > 0).unsqueeze(1))
            (factor, failed), more = torch.linalg.cholesky_ex(matrix), 10 * more
        return BlockInverse(blocks=torch.cholesky_inverse(factor), size=self.size)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockInverse:
    """A symmetric matrix of blocks, with what `StaticFisher` has."""

    blocks: Float[Tensor, "blocks width width"]
    size: int

    def product(self, vector: Float[Tensor, " size"]) -> Float[Tensor, " size"]:
        """Return it times a vector."""
        parts = _blocks(vector.unsqueeze(0), self.blocks.shape[1])[:, 0]
        result: Tensor = (self.blocks @ parts.unsqueeze(-1)).flatten()
        return result[: self.size]

    def diagonal(self) -> Float[Tensor, " size"]:
        """Return its diagonal."""
        return self.blocks.diagonal(dim1=1, dim2=2).flatten()[: self.size]


class SlidingFisher:
    """The inverse of F of the last m gradients, one replaced at a time: O(dm + m^3) for it, O(dm + m^2) for a product.

    Until m gradients came the missing ones are zero.
    """

    def __init__(self, count: int, size: int, *, damp: float, dtype: torch.dtype = torch.float32) -> None:
        """Begin with no gradients; `count` is m, `size` the numbers in each, `damp` λ.

        Raises:
            ValueError: λ is not positive.
        """
        if not damp > 0:
            raise ValueError(f"damp must be positive, not {damp}")
        self.damp, self.place = damp, 0
        self.gradients = torch.zeros(count, size, dtype=dtype)
        self.products = torch.zeros(count, count, dtype=dtype)  # S
        self._factor()

    @torch.no_grad()
    def add(self, gradient: Float[Tensor, " size"]) -> None:
        """Put a gradient into the place of the oldest."""
        self.gradients[self.place] = gradient
        row = self.gradients @ gradient
        self.products[self.place], self.products[:, self.place] = row, row
        self.place = (self.place + 1) % len(self.gradients)
        self._factor()

    def _factor(self) -> None:
        """Compute D and B anew."""
        count = len(self.products)
        d, b = self.products / self.damp, torch.eye(count, dtype=self.products.dtype) / self.damp
        for i in range(count):
            scale = d[:i, i] / (count + d.diagonal()[:i])
            d[i, i:] -= scale @ d[:i, i:]
            b[i] -= scale @ b[:i]
        self.upper, self.mixing = d.triu(), b
        self.divisors = count + d.diagonal()

    def product(self, vector: Float[Tensor, " size"]) -> Float[Tensor, " size"]:
        """Return F^-1 times a vector."""
        wanted = self.gradients @ vector / self.damp
        found = torch.zeros_like(wanted)
        for i in range(len(wanted)):
            found[i] = wanted[i] - self.upper[:i, i] @ (found[:i] / self.divisors[:i])
        return vector / self.damp - ((found / self.divisors) @ self.mixing) @ self.gradients


def saliency(weight: Float[Tensor, " size"], diagonal: Float[Tensor, " size"]) -> Float[Tensor, " size"]:
    """Return w_k^2 / (2 [F^-1]_kk), what dropping each weight alone costs."""
    return weight.square() / (2 * diagonal)


def surgeon(
    weight: Float[Tensor, " size"],
    kept: Bool[Tensor, " size"],
    inverse: StaticFisher | BlockInverse,
    diagonal: Float[Tensor, " size"],
) -> Float[Tensor, " size"]:
    """Return the weight with zeros where it is not kept and what is kept moved to make up for that.

    It is the sum of the moves of every dropped weight alone, which leaves out what they would owe each other; few at a
    time and F anew between them make up for it.
    """
    dropped = torch.where(kept, 0, weight / diagonal)
    return torch.where(kept, weight - inverse.product(dropped), 0)


@torch.no_grad()
def obs_prune(  # noqa: PLR0913  the problem, F and how often it is computed
    weight: Float[Tensor, "rows in"],
    gradients: Float[Tensor, "m size"],
    sparsity: Sparsity,
    *,
    damp: float,
    block: int,
    recomputations: int,
    by_row: bool,
) -> tuple[Bool[Tensor, "rows in"], Float[Tensor, "rows in"]]:
    """Return the mask, and the weight with zeros and what the kept weights became.

    What is kept shrinks geometrically; between two steps F is computed anew for the weights that are left.

    Args:
        weight: rows of a linear's weight.
        gradients: of some loss in these weights, one a row, flattened.
        sparsity: how much goes.
        damp: λ.
        block: weights that are correlated with each other, of the flattened rows.
        recomputations: steps.
        by_row: compare the weights of each row with each other, otherwise all.
    """
    flat, kept = weight.flatten(), torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    shared = BlockFisher.of(gradients, damp=damp, block=block) if len(gradients) >= block else None
    steps = [1 - density for density in densities(1.0, 1 - sparsity.share, recomputations)]
    for share in [*steps[:-1], sparsity.share]:  # the last one without the rounding of a power
        if shared is not None:
            inverse: StaticFisher | BlockInverse = shared.inverse(kept)
        else:
            inverse = StaticFisher.of(gradients * kept, damp=damp, block=block)
        diagonal = inverse.diagonal()
        costs = saliency(flat, diagonal).masked_fill(~kept, -torch.inf).view_as(weight)
        kept = _cheapest(costs, sparsity, share, by_row=by_row).flatten()
        flat = surgeon(flat, kept, inverse, diagonal)
    kept = kept.view_as(weight)
    return kept, flat.view_as(weight)


def _cheapest(
    costs: Float[Tensor, "rows in"], sparsity: Sparsity, share: float, *, by_row: bool
) -> Bool[Tensor, "rows in"]:
    """Return the mask that drops the cheapest `share`; with N:M, of those that it lets go."""
    if sparsity.group is not None:
        costs = costs.masked_fill(choose(costs, sparsity), torch.inf)
        share = min(share, sparsity.share)
    return choose(costs, Sparsity(share=share), "row" if by_row else "matrix")


def densities(start: float, end: float, steps: int) -> list[float]:
    """Return the share that is kept after each of some steps, a geometric row that ends with `end`."""
    return [start * (end / start) ** (step / steps) for step in range(1, steps + 1)]


def _blocks(vectors: Float[Tensor, "m size"], width: int) -> Float[Tensor, "blocks m width"]:
    """Return the vectors cut into blocks, the last one filled up with zeros."""
    width = min(width, vectors.shape[1])
    filled = torch.nn.functional.pad(vectors, (0, -vectors.shape[1] % width))
    parts: Tensor = filled.view(len(vectors), -1, width).transpose(0, 1).contiguous()
    return parts
