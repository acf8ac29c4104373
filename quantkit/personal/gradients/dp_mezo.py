"""Private forward passes: one number per example and direction is clipped, noise is added to the sum.

DP-ZO (Tang et al., "Private Fine-tuning of Large Language Models with Zeroth-order Optimization", arXiv 2401.04343).
Directions do not depend on data, so all that a step gives away is the slopes. With rho_i, the slopes (n,) of example i,

    rho = (sum_i min(1, C / |rho_i|) rho_i + sigma C N(0, I_n)) / B,    B the expected size of a batch:

a Poisson-sampled Gaussian mechanism with sensitivity C like that of `dp.py`, and counted like it. With one direction
rho_i is clipped to [-C, C]. A journal of such a run may be shown to everybody who may see the result.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantkit.errors import UsageError
from quantkit.personal import chance
from quantkit.personal.gradients.mezo import Mezo


def clipped_sum(rho: Tensor, bound: float) -> Tensor:
    """Return the sum (directions,) over examples of slopes (directions, examples), each example at most `bound` long.

    An example whose slope is not finite adds nothing: to complain would tell of it.
    """
    size = torch.linalg.vector_norm(rho, dim=0)
    factor = torch.where(size > bound, bound / size, 1.0)
    return torch.where(size.isfinite(), rho * factor, 0.0).sum(1)


@dataclass(kw_only=True)
class DpMezo(Mezo):
    """Forward passes along random directions, with privacy.

    Attributes:
        noise: sigma, the standard deviation of the noise divided by `bound`; 0: no noise and no privacy.
        expected: B, how many examples a logical batch has on average.
        bound: C, the most that an example adds to the sum.
        key: of the noise; the default is a secret of this process, and the only one with which anything is private.
    """

    noise: float
    expected: float
    bound: float = 1.0
    key: bytes = field(default_factory=chance.secret_key, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("clipping bound", self.bound), ("expected batch", self.expected)):
            if not 0 < value < math.inf:
                raise UsageError(f"the {name} is {value:g}; use a finite number above 0")
        if not 0 <= self.noise < math.inf:
            raise UsageError(f"noise is {self.noise:g}; use a finite number, 0 for none")

    def summed_up(self, found: Tensor, step: int) -> Tensor:
        """Return the private slopes (directions,); of an empty batch they are noise alone."""
        drawn = chance.normal(self.key, f"noise {step}", (len(found),))
        noisy: Tensor = clipped_sum(found, self.bound) + self.noise * self.bound * drawn
        return noisy / self.expected


METHOD = DpMezo
