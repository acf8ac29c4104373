"""What share of each linear goes, where that is not the same for all: by one threshold, or by what it costs.

The share of all weights together stays what was asked for, to the weight. By `magnitude` one threshold decides over the
model: the shares below it are counted, so that pruning each matrix alone does the same. By `loss` and `mfac` a few
shares of each linear are given a cost, relative to its block's output: measured, with the weights dropped that have
the smallest products with their inputs' norms, or the sum of M-FAC's smallest saliencies; the choice with the least
total cost is then made exactly (`core/allocate.py`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quantkit.calibrate.engine import Engine
from quantkit.calibrate.gradients import gradient_samples, model_samples
from quantkit.calibrate.memory import release_freed
from quantkit.calibrate.passes import Window
from quantkit.calibrate.record import record
from quantkit.calibrate.sensitivity import SEQUENCES, TOKENS
from quantkit.calibrate.statistics import input_statistics
from quantkit.core import masks
from quantkit.core.allocate import Option, allocate
from quantkit.core.masks import Sparsity
from quantkit.core.mfac import BlockFisher, saliency
from quantkit.errors import UsageError
from quantkit.evaluation.loading import load_model
from quantkit.host import free_memory
from quantkit.model.block import Site
from quantkit.planning import Plan
from quantkit.pruners._pruner import Allocation
from quantkit.pruners.mfac import MFAC
from quantkit.pruners.wanda import InputNorms
from quantkit.recipe import Recipe
from quantkit.sparsities import pruner_of

AROUND = (-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3)  # shares that are tried, beside what is asked for
MOST = 0.95
_HALF = 1 << 16

Costs = Mapping[str, Mapping[float, float]]


def allocated(
    how: Allocation, engine: Engine, tokens: Tensor, progress: Callable[[float, int], None]
) -> dict[str, Sparsity]:
    """Return the share of each linear of `engine.sparsity`, which says what all together are to lose.

    Args:
        how: by what.
        engine: loads the blocks.
        tokens: calibration tokens, (sequences, tokens) int64; the first few are used.
        progress: told (blocks done, blocks in all).
    """
    (asked,) = set(engine.sparsity.values())
    if how == "magnitude":
        sizes, dropped = _below_one_threshold(engine, asked, progress)
    else:
        sizes, costs = _costs(how, engine, tokens, asked, progress)
        dropped = cheapest(costs, sizes, asked.count(sum(sizes.values())))
    return {name: Sparsity(share=dropped[name] / sizes[name]) for name in sizes}


def with_samples(engine: Engine, recipe: Recipe, tokens: Tensor) -> Engine:
    """Return the engine, with what gradients of the whole model's loss are made of if its pruner asks for them."""
    step = pruner_of(recipe.build_passes())
    if not isinstance(step, MFAC) or step.loss != "model":
        return engine
    batches = tokens.split(recipe.calibration.batch_size)  # all of them, in every process
    model, _ = load_model(recipe.model, revision=recipe.revision, device="cpu")
    found = model_samples(model, [*engine.sparsity], batches, gradients=step.gradients, tokens=step.tokens)
    return replace(engine, samples=found)


def refuse_too_large(plan: Plan, recipe: Recipe) -> None:
    """Refuse gradients of the whole model's loss if it does not fit into memory, with what reaches its linears.

    Raises:
        UsageError: it does not.
    """
    step = pruner_of(recipe.build_passes())
    if not isinstance(step, MFAC) or step.loss != "model":
        return
    tokens = min(step.tokens, plan.samples * plan.seqlen)
    needed = 4 * (plan.parameters + tokens * sum(sum(plan.shapes[name]) for name in plan.sparsity))
    free = free_memory()
    if needed > free:
        raise UsageError(
            f"loss=model needs the whole model and what reaches its linears, {needed / 1e9:.1f} GB of memory where "
            f"{free / 1e9:.1f} GB are free; use loss=block, or fewer tokens"
        )


def cheapest(costs: Costs, sizes: Mapping[str, int], dropped: int) -> dict[str, int]:
    """Return how many weights each linear loses, `dropped` in all, at the least total cost.

    Args:
        costs: linear → share → what losing it costs.
        sizes: linear → weights.
        dropped: how many go in all; more than the smallest shares together take, and less than the largest.
    """
    names, kept = list(costs), sum(sizes.values()) - dropped
    counts = {name: [round(share * sizes[name]) for share in costs[name]] for name in names}
    items = [
        [Option(sizes[name] - count, cost) for count, cost in zip(counts[name], costs[name].values(), strict=True)]
        for name in names
    ]
    found = {name: counts[name][i] for name, i in zip(names, allocate(items, kept), strict=True)}
    spare = sum(found.values()) - dropped  # steps are coarse; what may stay besides stays where steps are largest
    for name in sorted(names, key=lambda n: -sizes[n]):
        back = min(spare, found[name] - min(counts[name]))
        found[name], spare = found[name] - back, spare - back
    return found


def _below_one_threshold(
    engine: Engine, asked: Sparsity, progress: Callable[[float, int], None]
) -> tuple[dict[str, int], dict[str, int]]:
    """Return sizes, and how many weights of each linear are among the smallest of all; of equal ones the first go.

    The bits of a float are ordered as its magnitude is: two readings count their upper and lower halves.
    """
    upper, sizes = torch.zeros(_HALF, dtype=torch.int64), dict[str, int]()
    for name, bits in _bits(engine, progress, 0):
        upper += (bits >> 16).bincount(minlength=_HALF)
        sizes[name] = bits.numel()
    total = asked.count(sum(sizes.values()))
    place = int((upper.cumsum(0) < total).sum())  # where the threshold's upper half is
    lower, below = torch.zeros(_HALF, dtype=torch.int64), dict[str, int]()
    inside: dict[str, Tensor] = {}
    for name, bits in _bits(engine, progress, 1):
        half = bits >> 16
        below[name] = int((half < place).sum())
        inside[name] = (bits[half == place] & (_HALF - 1)).bincount(minlength=_HALF)
        lower += inside[name]
    missing = total - sum(below.values())
    limit = int((lower.cumsum(0) < missing).sum())
    missing -= int(lower[:limit].sum())
    for name, counted in inside.items():
        equal = min(missing, int(counted[limit])) if limit < _HALF else 0
        below[name], missing = below[name] + int(counted[:limit].sum()) + equal, missing - equal
    return sizes, below


def _bits(engine: Engine, progress: Callable[[float, int], None], turn: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the magnitudes of each linear's weights as the whole numbers that their bits are."""
    total = len(engine.skeleton.blocks)
    for index in range(total):
        for site in _sites(engine, index):
            yield site.name, site.weight.detach().abs().flatten().cpu().view(torch.int32).long()
        release_freed()
        progress((turn * total + index + 1) / 2, total)


def _sites(engine: Engine, index: int) -> Sequence[Site]:
    return [site for site in engine.load(index).sites if site.sparsity is not None]


def _costs(
    how: Allocation, engine: Engine, tokens: Tensor, asked: Sparsity, progress: Callable[[float, int], None]
) -> tuple[dict[str, int], dict[str, dict[float, float]]]:
    """Return the sizes of the linears, and what shares of each cost of its block's output, in the original model."""
    shares = sorted({min(max(asked.share + step, 0.0), MOST) for step in AROUND} | {asked.share})
    with engine.outer_weights():
        recording = record(engine.skeleton, [tokens[:SEQUENCES, :TOKENS]], engine.device)
    (hidden,), (arguments,) = recording.hidden, recording.arguments
    sizes: dict[str, int] = {}
    costs: dict[str, dict[float, float]] = {}
    for index in range(len(engine.skeleton.blocks)):
        block = engine.load(index)
        window = Window(
            blocks=[block], inputs=[hidden], references=[[]], arguments=[[arguments[index]]], device=engine.device
        )
        with torch.no_grad():
            target = window.forward(0).float()
        sites = [site for site in block.sites if site.sparsity is not None]
        sizes |= {site.name: site.weight.numel() for site in sites}
        costs |= (_measured if how == "loss" else _salient)(window, sites, target, shares)
        hidden = target
        release_freed()
        progress(index + 1, len(engine.skeleton.blocks))
    return sizes, costs


@torch.no_grad()
def _measured(
    window: Window, sites: Sequence[Site], target: Tensor, shares: Sequence[float]
) -> dict[str, dict[float, float]]:
    """Return the mean over tokens of the output's squared error over its squared norm, each linear pruned alone."""
    norms = input_statistics(window, InputNorms, sites=sites)
    scale = target.square().sum(-1).clamp(min=1e-30)
    costs: dict[str, dict[float, float]] = {}
    for site in sites:
        own = norms[site.name].value if norms[site.name].tokens else torch.ones(())
        scores = site.weight.detach().abs() * (own[:, None] if site.transposed and own.ndim else own)
        costs[site.name] = {}
        for share in shares:
            mask = masks.choose(scores, Sparsity(share=share))
            output = window.forward(0, {site.parameter: masks.apply(site.weight.detach(), mask)}).float()
            cost = float(((output - target).square().sum(-1) / scale).mean())
            costs[site.name][share] = min(cost, 1e6) if cost == cost else 1e6  # noqa: PLR0124  nan is not itself
    return costs


def _salient(
    window: Window, sites: Sequence[Site], target: Tensor, shares: Sequence[float]
) -> dict[str, dict[float, float]]:
    """Return the sums of M-FAC's smallest saliencies, of the loss whose error is relative to each token's norm."""
    method = MFAC()
    samples = gradient_samples(
        window, sites, gradients=method.gradients, tokens=method.tokens, scale=target.norm(dim=-1, keepdim=True)
    )
    costs: dict[str, dict[float, float]] = {}
    for site in sites:
        found = samples.get(site.name)
        scale = found.mean_square() if found else 0.0
        weight = site.weight.detach().T if site.transposed else site.weight.detach()
        if found is None or not 0 < scale < torch.inf:
            costs[site.name] = dict.fromkeys(shares, 0.0)
            continue
        block = min(method.block, len(found.inputs))
        parts = []
        at_once = max(1, (1 << 26) // (weight.shape[1] * max(len(found.inputs), block)))
        for first in range(0, len(weight), at_once):
            rows = weight[first : first + at_once].flatten()
            gradients = found.gradients(first, min(first + at_once, len(weight)))
            fisher = BlockFisher.of(gradients, damp=method.damp * scale, block=block)
            parts.append(saliency(rows, fisher.inverse(torch.ones_like(rows, dtype=torch.bool)).diagonal()))
        sums = torch.cat(parts).double().sort().values.cumsum(0)
        tokens = found.inputs.shape[1]
        costs[site.name] = {
            share: float(sums[count - 1]) * 2 / tokens if (count := round(share * len(sums))) else 0.0
            for share in shares
        }
    return costs
