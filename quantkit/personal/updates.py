"""How gradients move what may change: the optimizer, its rate over the steps, and what is pulled towards zero.

Optimizers are PyTorch's, one operation after the other for each tensor, so that the same gradients give the same bytes.
"""

import math
from dataclasses import dataclass

import torch

from quantkit.errors import UsageError, nearest
from quantkit.personal.protocols import Parameters

OPTIMIZERS = ("sgd", "momentum", "adam")
SCHEDULES = ("constant", "linear", "cosine")
UNDECAYED = ("bias", "norm", "ln_")  # parts of names; MeZO's program leaves out bias, layer_norm and layernorm


@dataclass(frozen=True, kw_only=True)
class Updates:
    """What is done with a gradient.

    Attributes:
        steps: how many there will be.
        rate: the learning rate at its highest; None: it is found from the loss before the first step, see `Loop`.
        optimizer: sgd, momentum (sgd with 0.9 of it) or adam (AdamW).
        decay: how strongly tensors are pulled towards zero; biases and norms never are.
        warmup: steps over which the rate rises from nothing.
        schedule: what the rate does then: constant, linear or cosine towards zero at the end.
    """

    steps: int
    rate: float | None
    optimizer: str = "adam"
    decay: float = 0.0
    warmup: int = 0
    schedule: str = "constant"

    def __post_init__(self) -> None:
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if (value := getattr(self, name)) not in known:
                raise UsageError(f"unknown {name} {value!r}{nearest(value, known)}")
        rate = 1.0 if self.rate is None else self.rate
        if not 0 < rate < math.inf or not 0 <= self.decay < math.inf:
            raise UsageError(f"rate {rate:g} or decay {self.decay:g} cannot be; use finite numbers above 0")
        if self.steps < 1 or not 0 <= self.warmup <= self.steps:
            raise UsageError(f"{self.warmup} of {self.steps} steps cannot be warmup; use at least 1 step, and fewer")

    def begin(self, parameters: Parameters) -> torch.optim.Optimizer:
        """Return the optimizer before the first step; its learning rate is set at every step."""
        groups = [
            {"params": [p for name, p in parameters.items() if self._decays(name) == decays], "weight_decay": amount}
            for decays, amount in ((True, self.decay), (False, 0.0))
        ]
        groups = [group for group in groups if group["params"]]
        if self.optimizer == "adam":
            return torch.optim.AdamW(groups, foreach=False)
        return torch.optim.SGD(groups, momentum=0.9 if self.optimizer == "momentum" else 0.0, foreach=False)

    def take(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Move the parameters by their gradients, at the rate of the step."""
        for group in optimizer.param_groups:
            group["lr"] = self.rate_at(step)
        optimizer.step()

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step, the first one being 0; `rate` must be known."""
        assert self.rate is not None
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        left = (self.steps - step) / max(1, self.steps - self.warmup)
        shares = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}
        return self.rate * shares[self.schedule]

    def _decays(self, name: str) -> bool:
        return not any(part in name.lower() for part in UNDECAYED)
