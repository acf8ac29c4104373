"""AWQ: columns that meet large activations are scaled up before rounding, and the clipping is searched, untrained.

Lin et al., arXiv 2306.00978, section 3.2. A scale moves from what makes a linear's input into the linear's columns:

    s = m^a / sqrt(max(m^a) min(m^a))    a* = argmin || Q(W diag(s)) diag(s)^-1 X - W X ||^2    a in 0, 1/20 ... 19/20

where m is the mean magnitude of each input channel. Then each group's bounds shrink to the share of 1, 0.95 ... 0.55 of
its largest magnitude that gives the smallest error of the group's own part of the output. Queries and keys are not
clipped, because their errors add up in a product.

Two deviations: errors are computed from the mean of x x^T, so that all calibration tokens count instead of a sample;
and the error that decides about a scale is that of the linears' outputs instead of the attention's or MLP's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from quantkit.calibrate.passes import Phase, Window
from quantkit.calibrate.statistics import Hessian, Range, input_statistics
from quantkit.calibrate.team import Team
from quantkit.core.affine import fake_quantize, group_bounds, quantize, round_to_nearest
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import QuantScheme
from quantkit.errors import UsageError
from quantkit.model.block import Block, Site
from quantkit.model.equivalence import Pair, fold, pairs_of

SMALLEST_MAGNITUDE = 1e-4  # theirs
SMALLEST_SHARE, SHARE_STEP = 0.5, 0.05


def output_error(difference: Float[Tensor, "out in"], gram: Float[Tensor, "in in"]) -> Float[Tensor, ""]:
    """Return the mean over tokens of |D x|^2 for a weight that is off by D, from the mean of x x^T."""
    return ((difference @ gram) * difference).sum()


def salience_scale(magnitude: Float[Tensor, " size"], alpha: float) -> Float[Tensor, " size"]:
    """Return m^alpha, normalised so that the largest and the smallest are each other's inverse."""
    scale = magnitude.clamp(min=SMALLEST_MAGNITUDE).pow(alpha)
    return scale / (scale.max() * scale.min()).sqrt()


@torch.no_grad()
def searched_scale(
    pair: Pair,
    sites: Sequence[Site],
    gram: Float[Tensor, "in in"],
    magnitude: Float[Tensor, " in"],
    *,
    trials: int = 20,
) -> tuple[float, Float[Tensor, " size"]]:
    """Return the best power and the scale that it gives, by the error of the outputs of `sites` rounded to nearest.

    Args:
        pair: where the scale moves; of a norm, of values or of up.
        sites: the pair's targets.
        gram: mean of x x^T of their input.
        magnitude: mean of |x|.
        trials: powers 0, 1 / trials, ... that are tried.
    """
    free = magnitude if pair.of_target is None else _mean_by(pair.of_target, magnitude, pair.size)
    best, chosen = torch.inf, (0.0, torch.ones_like(free))
    for alpha in (trial / trials for trial in range(trials)):
        scale = salience_scale(free, alpha)
        columns = scale if pair.of_target is None else scale[pair.of_target]
        error = 0.0
        for site in sites:
            scaled = site.weight * columns
            rounded = fake_quantize(
                scaled, *group_bounds(scaled, site.scheme), site.scheme, scale_dtype=site.scale_dtype
            )
            error += float(output_error(rounded / columns - site.weight, gram))
        if error < best:
            best, chosen = error, (alpha, scale)
    return chosen


@torch.no_grad()
def clipped_bounds(
    weight: Float[Tensor, "out in"], gram: Float[Tensor, "in in"], scheme: QuantScheme, scale_dtype: torch.dtype
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """Return the bounds of each group that make the error of its own part of the output smallest."""
    low, high = group_bounds(weight, scheme)
    groups, largest = low.shape[1], torch.maximum(-low, high)
    size = weight.shape[1] // groups
    blocks = gram.unflatten(0, (groups, size)).unflatten(2, (groups, size)).diagonal(dim1=0, dim2=2)  # (i, j, groups)
    best, share = torch.full_like(low, torch.inf), torch.ones_like(low)
    for trial in range(round((1 - SMALLEST_SHARE) / SHARE_STEP)):
        limit = largest * (1 - SHARE_STEP * trial)
        bounds = low.maximum(-limit), high.minimum(limit)
        difference = fake_quantize(weight, *bounds, scheme, scale_dtype=scale_dtype) - weight
        parts = difference.unflatten(1, (groups, size)).movedim(1, 0)  # (groups, out, i)
        error = ((parts @ blocks.movedim(2, 0)) * parts).sum(dim=-1).T
        better = error < best
        best, share = torch.where(better, error, best), share.masked_fill(better, 1 - SHARE_STEP * trial)
    return low.maximum(-share * largest), high.minimum(share * largest)


def _mean_by(index: Tensor, values: Tensor, size: int) -> Tensor:
    """Return (size,): the mean of the values with one index."""
    total = torch.zeros(size, dtype=values.dtype, device=values.device).index_add_(0, index, values)
    return total / index.bincount(minlength=size)


class Moments:
    """Mean of x x^T and mean of |x| of an input."""

    def __init__(self) -> None:
        self.hessian, self.range = Hessian(), Range()

    def add(self, inputs: Tensor) -> None:
        """Take in `inputs`, (tokens, in) float32."""
        self.hessian.add(inputs)
        self.range.add(inputs)

    def merge(self, team: Team, inputs: Tensor) -> None:
        """Add what the other processes took in."""
        self.hessian.merge(team, inputs)
        self.range.merge(team, inputs)

    @property
    def gram(self) -> Tensor:
        """Mean of x x^T, (in, in)."""
        return self.hessian.value / 2

    @property
    def magnitude(self) -> Tensor:
        """Mean of |x|, (in,)."""
        return self.range.mean_magnitude


@dataclass(frozen=True, kw_only=True)
class AWQ:
    """AWQ with the settings of the paper.

    Attributes:
        trials: powers of the mean magnitude that are tried for each scale; 0: no scales.
        clip: search the bounds too.
    """

    phase: ClassVar[Phase] = Phase.ROUND
    learns: ClassVar[bool] = True
    second_order: ClassVar[bool] = True

    trials: int = 20
    clip: bool = True

    def __post_init__(self) -> None:
        if self.trials < 0:
            raise UsageError(f"trials must not be negative, not {self.trials}")

    @classmethod
    def for_scheme(cls, scheme: QuantScheme) -> "AWQ":  # noqa: ARG003  nothing depends on it
        """Return the paper's setting, the same for every scheme."""
        return cls()

    @property
    def blocks_at_once(self) -> int:
        """One: every block alone."""
        return 1

    @property
    def updates_per_window(self) -> int:
        """It makes no updates."""
        return 0

    @property
    def let(self) -> bool:
        """Whether scales move between modules, which is not possible everywhere in every family."""
        return self.trials > 0

    @property
    def forwards_per_window(self) -> int:
        """For the moments before and after scaling, as much for the products x x^T, and one for the error."""
        return 2 * (1 + (self.trials > 0)) + 1

    @property
    def roundings_per_window(self) -> int:
        """One for each power and for each share of the bounds that is tried."""
        return self.trials + self.clip * round((1 - SMALLEST_SHARE) / SHARE_STEP)

    def apply(self, window: Window) -> None:
        """Scale, clip and round every site; what is worse than plain rounding is undone."""
        (block,) = window.blocks
        before = {name: value.clone() for name, value in block.module.named_parameters()}
        changed = set(block.changed)
        alphas = self._scale(window, block) if self.trials else {}
        window.tick(0.5)
        moments = input_statistics(window, Moments)

        def clipped(site: Site) -> dict[str, Tensor]:
            bounds = group_bounds(site.weight, site.scheme)
            if self.clip and isinstance(site.linear, nn.Linear) and not _makes_queries(site, block):
                bounds = clipped_bounds(site.weight, moments[site.name].gram, site.scheme, site.scale_dtype)
            return quantize(site.weight, *bounds, site.scheme, site.scale_dtype).tensors()

        for site, found in zip(block.sites, window.team.divide(block.sites, clipped), strict=True):
            site.quantized = QuantizedTensor.of(found, site.scheme)
        error = window.error({site.parameter: _dense(site) for site in block.sites})
        if not error <= window.error_rtn:
            window.notes["fallback"] = f"rtn, because its error {window.error_rtn:.3g} is below AWQ's {error:.3g}"
            _undo(block, before, changed)
        else:
            window.notes["alpha"] = alphas
        window.tick(1.0)

    def _scale(self, window: Window, block: Block) -> Mapping[str, float]:
        """Fold the best scale of every pair into the block; return the powers by the pairs' names."""
        sites = {site.local_name: site for site in block.sites}
        pairs = [pair for pair in pairs_of(block, let_down=True)[0] if _can_be_scaled(pair, sites)]
        moments = input_statistics(window, Moments)

        def search(pair: Pair) -> dict[str, Tensor]:
            targets = [sites[name] for name in pair.targets]
            of_input = moments[targets[0].name]
            alpha, scale = searched_scale(pair, targets, of_input.gram, of_input.magnitude, trials=self.trials)
            return {"alpha": torch.tensor(alpha, dtype=torch.float64), "scale": scale}

        found = dict(zip((pair.name for pair in pairs), window.team.divide(pairs, search), strict=True))
        fold(pairs, block, {name: parts["scale"] for name, parts in found.items()})
        return {name: float(parts["alpha"]) for name, parts in found.items()}


def _can_be_scaled(pair: Pair, sites: Mapping[str, Site]) -> bool:
    """Return whether a scale can gain something: all linears are quantized, in groups along their input."""
    linears = pair.targets if pair.kind == "norm" else (pair.source, *pair.targets)
    return pair.kind != "query-key" and not pair.transposed and all(name in sites for name in linears)


def _makes_queries(site: Site, block: Block) -> bool:
    attention = block.architecture.attention if block.architecture else None
    if attention is None:
        return any(part in site.local_name for part in ("query", "qkv", "q_proj", "k_proj"))
    return site.local_name in (attention.query, attention.key)


def _dense(site: Site) -> Tensor:
    assert site.quantized is not None
    return site.quantized.dequantize().to(site.weight.dtype)


def _undo(block: Block, before: Mapping[str, Tensor], changed: set[str]) -> None:
    """Give the block its parameters back and round it to nearest."""
    for name, parameter in block.module.named_parameters():
        parameter.data = before[name]
    block.changed = changed
    for site in block.sites:
        site.quantized = round_to_nearest(site.weight, site.scheme, site.scale_dtype)


METHOD = AWQ
