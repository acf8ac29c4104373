"""A short recovery: the weights that stay are trained to bring the window's output back to the original's."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quantkit.calibrate.passes import Window
from quantkit.model.block import Site
from quantkit.train.fit import ParameterGroup, fit

LEARNING_RATE = 2e-3  # of each weight, in root mean squares of its matrix, for one sequence in a batch


class _Kept(nn.Module):
    """The weight of a pruned site, w + mask * rms(w) * moved."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        assert site.mask is not None
        self.weight = site.weight.detach()
        rms = self.weight.square().sum().div(site.mask.sum().clamp(min=1)).sqrt()
        self.step = site.mask * rms
        self.moved = nn.Parameter(torch.zeros_like(self.weight))

    def forward(self) -> Tensor:
        """Return the weight; zero where the mask drops."""
        return self.weight + self.step * self.moved


@torch.enable_grad()
def recover(window: Window, sites: Sequence[Site], updates: int) -> None:
    """Train the kept weights of pruned sites for some updates, over one batch each; keep them if the error falls."""
    kept = {site.parameter: _Kept(site) for site in sites if site.mask is not None}
    before = window.error()

    def loss(batch: int) -> Tensor:
        output = window.forward(batch, {name: made() for name, made in kept.items()})
        return (output.float() - window.targets[batch].to(output.device, torch.float32)).square().mean()

    rate = LEARNING_RATE * math.sqrt(len(window.inputs[0]))
    result = fit(
        [ParameterGroup(parameters=[made.moved for made in kept.values()], lr=rate)],
        loss,
        batches=len(window.inputs),
        updates=updates,
        tick=window.tick,
        schedule="linear",
        generator=torch.Generator().manual_seed(window.seed),
        team=window.team,
    )
    with torch.no_grad():
        learned = {name: made() for name, made in kept.items()}
    after = window.error(learned)
    window.notes["recovery"] = {"error_before": before, "error_after": min(before, after)}
    if result.diverged:
        window.notes["recovery diverged"] = f"after {len(result.losses)} passes over the batches"
    if not after < before:
        window.notes["recovery undone"] = f"its error {after:.3g} is not below {before:.3g}"
        return
    for site in sites:
        site.weight.data = learned[site.parameter]
