"""What each group of linears costs at each width: the loss of its block's output when only that group is rounded.

The walk follows the original model alone: a block is loaded, run on a few sequences, run again once for every group and
scheme, and dropped. The loss is the squared error of a token's hidden state over its squared norm, averaged over
tokens; a ratio of sums instead would be ruled by the few tokens whose norm is a thousand times the others' (massive
activations, Sun et al., arXiv 2402.17762), and every block behind the one that makes them would seem free.

What rounds here stands in for the method that follows: with `shrink` every group of weights takes the clipping that
brings its own error down, as a method that learns would; without it the bounds are the extremes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from quantkit.calibrate.memory import release_freed
from quantkit.calibrate.record import record
from quantkit.core.affine import group_bounds, quantize
from quantkit.core.scheme import QuantScheme
from quantkit.model.block import Arguments, Block
from quantkit.model.checkpoint import Checkpoint
from quantkit.model.skeleton import Skeleton

SEQUENCES, TOKENS = 8, 256  # enough to rank: losses differ by factors, their sampling error is a few per cent
SHRINK = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
_RUINED = 1e6  # the loss of an output that is not finite


@dataclass(frozen=True, slots=True)
class TiedLinears:
    """Linears of a block that must become the same: runtimes fuse them.

    Attributes:
        block: index of the block.
        group: name of the architecture's group, or of the linear itself where no file describes the family.
        linears: full module names.
    """

    block: int
    group: str
    linears: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """Everything the measurement needs.

    Attributes:
        skeleton: the model without weights.
        checkpoint: its weights.
        ties: what is measured.
        schemes: what each of them may become.
        shrink: factors of the bounds that are tried.
        scale_dtype: dtype in which scales are stored.
        device: where blocks are computed, in float32.
    """

    skeleton: Skeleton
    checkpoint: Checkpoint
    ties: Sequence[TiedLinears]
    schemes: Sequence[QuantScheme]
    shrink: Sequence[float] = SHRINK
    scale_dtype: torch.dtype
    device: torch.device

    @torch.no_grad()
    def run(
        self, tokens: Tensor, progress: Callable[[float, int], None]
    ) -> dict[TiedLinears, dict[QuantScheme, float]]:
        """Return the loss of each group and scheme on the head of `tokens`, (sequences, tokens) int64.

        `progress` is told (blocks done, blocks in all), with fractions in between.
        """
        with self.skeleton.outer_weights(self.checkpoint, torch.float32, self.device):
            recording = record(self.skeleton, [tokens[:SEQUENCES, :TOKENS]], self.device)
        (hidden,), (arguments,) = recording.hidden, recording.arguments
        losses = {}
        total = len(self.skeleton.blocks)
        for index in range(total):
            module = self.skeleton.load_block(index, self.checkpoint, torch.float32, self.device)
            run = _Run(Block(index=index, name="block", module=module, sites=[]), hidden, arguments[index])
            hidden = run.target
            ties = [tie for tie in self.ties if tie.block == index]
            for number, tie in enumerate(ties):
                losses[tie] = {scheme: self._loss(run, tie, scheme) for scheme in self.schemes}
                progress(index + (number + 1) / len(ties), total)
            del run, module
            release_freed()
        return losses

    def _loss(self, run: "_Run", tie: TiedLinears, scheme: QuantScheme) -> float:
        prefix = self.skeleton.module_name(tie.block, "")
        weights = {}
        for name in (linear.removeprefix(prefix) for linear in tie.linears):
            weight = run.block.module.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            weights[f"{name}.weight"] = clipped_to_nearest(weight, scheme, self.shrink, self.scale_dtype)
        return run.loss(weights)


class _Run:
    """A block, what reaches it, and what it makes of that, (sequences, tokens, width)."""

    def __init__(self, block: Block, hidden: Tensor, arguments: Arguments) -> None:
        self.block, self.hidden, self.arguments = block, hidden, arguments
        self.target = block.forward(hidden, arguments)

    def loss(self, weights: dict[str, Tensor]) -> float:
        """Return the mean over tokens of the output's squared error over its squared norm, with `weights` replaced."""
        error = (self.block.forward(self.hidden, self.arguments, weights) - self.target).square().sum(-1)
        mean = float((error / self.target.square().sum(-1).clamp(min=1e-30)).double().mean())
        return min(mean, _RUINED) if isfinite(mean) else _RUINED


def clipped_to_nearest(
    weight: Tensor, scheme: QuantScheme, shrink: Sequence[float], scale_dtype: torch.dtype
) -> Tensor:
    """Return `weight` rounded to nearest, (out, in), between each group's extremes times the best of the factors."""
    low, high = group_bounds(weight, scheme)
    best, least = weight, torch.full_like(low, torch.inf).unsqueeze(-1)
    for factor in shrink:
        rounded = quantize(weight, low * factor, high * factor, scheme, scale_dtype).dequantize().to(weight.dtype)
        error = (rounded - weight).unflatten(1, (low.shape[1], -1)).square().sum(-1, keepdim=True)
        better = (error < least).expand(-1, -1, weight.shape[1] // low.shape[1]).flatten(1)
        best, least = torch.where(better, rounded, best), torch.minimum(least, error)
    return best
