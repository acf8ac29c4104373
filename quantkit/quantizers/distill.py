"""End-to-end distillation of scales: the whole quantized model learns the original's logits, its codes stay as they are.

Chen et al., EfficientQAT, arXiv 2407.11062, section 3.3 (E2E-QP), with the original model's distribution in the place of
the text's tokens: minimise KL(original || quantized) over the scales of every group, and the norms' weights.

Codes, zero points and format do not change. Blocks are computed again in the backward pass (Chen et al., arXiv 1604.06174),
so beside the codes only one block and the hidden states between blocks are in memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from quantkit.calibrate.passes import Phase, Window
from quantkit.core.affine import stored
from quantkit.core.scheme import QuantScheme
from quantkit.errors import UsageError
from quantkit.model.block import Block, Site
from quantkit.train.fit import ADAM, SIGN, ParameterGroup, Schedule, fit


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Distillation of scales and norms over the whole model.

    Attributes:
        updates: updates, over one batch each.
        lr: learning rate of the scales, as a share of each, times the square root of the batch.
        norms_lr: learning rate of the norms' weights, as a share of each, times the square root of the batch; 0 leaves
            them alone.
        schedule: what becomes of the learning rates.
    """

    phase: ClassVar[Phase] = Phase.COMPENSATE
    learns: ClassVar[bool] = True

    updates: int = 160
    lr: float = 1e-3
    norms_lr: float = 1e-3
    codes_lr: float = 0.0
    sign: bool = False
    amp: bool = False
    schedule: Schedule = "cosine"

    @classmethod
    def for_scheme(cls, scheme: QuantScheme) -> "Distill":
        return cls()

    @property
    def blocks_at_once(self) -> int:
        """0: the whole model."""
        return 0

    @property
    def updates_per_window(self) -> int:
        """Updates of the whole model."""
        return self.updates

    def apply(self, window: Window) -> None:
        """Learn the scales of every site of the model."""
        root = len(window.inputs[0]) ** 0.5
        scales = {site.parameter: _Scale(site, self.codes_lr > 0) for site in window.sites}
        norms = dict(_norms(window)) if self.norms_lr else {}
        factors = {name: nn.Parameter(torch.zeros_like(value)) for name, value in norms.items()}

        def block(place: int, batch: int, hidden: Tensor) -> Tensor:
            own = window.blocks[place]
            parameters = {site.parameter: scales[site.parameter]() for site in own.sites}
            parameters |= {
                name: norms[name] * (1 + factor) for name, factor in factors.items() if name.startswith(own.name + ".")
            }
            return window.step(place, batch, hidden, parameters)

        def loss(batch: int) -> Tensor:
            hidden = window.inputs[batch].to(window.device).requires_grad_()
            for place in range(len(window.blocks)):
                hidden = checkpoint(block, place, batch, hidden, use_reentrant=False)
            return divergence(window, batch, hidden)

        groups = [ParameterGroup(parameters=[scale.factor for scale in scales.values()], lr=self.lr * root)]
        if factors:
            groups.append(ParameterGroup(parameters=list(factors.values()), lr=self.norms_lr * root))
        if self.codes_lr:
            latents = [scale.latent for scale in scales.values() if scale.latent is not None]
            groups.append(ParameterGroup(parameters=latents, lr=self.codes_lr if self.sign else self.codes_lr * root, betas=SIGN if self.sign else ADAM))
        window.amp = self.amp
        result = fit(
            groups,
            loss,
            batches=len(window.inputs),
            updates=self.updates,
            tick=window.tick,
            schedule=self.schedule,
            generator=torch.Generator().manual_seed(window.seed),
        )
        window.amp = False
        window.notes["divergence"] = result.losses
        for site in window.sites:
            assert site.quantized is not None
            made = scales[site.parameter]
            site.quantized = replace(site.quantized, scale=made.value().detach().to(site.scale_dtype), codes=made.codes().detach().to(torch.int8))
        for own in window.blocks:
            for name in list(factors):
                if name.startswith(own.name + "."):
                    local = name.removeprefix(own.name + ".")
                    value = norms[name] * (1 + factors[name].detach())
                    own.module.get_parameter(local).data = value.to(own.dtypes[local]).to(value.dtype)
                    own.changed.add(local)


class _Scale(nn.Module):
    """The scales of one site, s (1 + factor), and the weight that its codes make with them."""

    def __init__(self, site: Site, learn: bool) -> None:
        super().__init__()
        assert site.quantized is not None
        self.quantized = site.quantized
        self.scale = site.quantized.scale.float()
        self.factor = nn.Parameter(torch.zeros_like(self.scale))
        self.latent = nn.Parameter(site.latent) if learn and site.latent is not None else None

    def codes(self):
        if self.latent is None:
            return self.quantized.codes.float()
        q = self.latent.clamp(self.quantized.scheme.smallest_code, self.quantized.scheme.largest_code)
        return q + (q.round() - q).detach()

    def value(self) -> Tensor:
        """Return the scales as they are stored, (out, groups) float32."""
        return stored((self.scale * (1 + self.factor)), self.quantized.scale.dtype)

    def forward(self) -> Tensor:
        """Return the weight, (out, in) float32."""
        steps = self.codes().unflatten(1, (self.scale.shape[1], -1))
        if self.quantized.zero_point is not None:
            steps = steps - self.quantized.zero_point.float().unsqueeze(-1)
        return (steps * self.value().unsqueeze(-1)).flatten(1)


def _norms(window: Window) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of the norms, the only vectors of a block besides biases, by full name."""
    quantized = {id(site.weight) for site in window.sites}
    for block in window.blocks:
        for name, parameter in block.module.named_parameters():
            if parameter.ndim == 1 and name.endswith("weight") and id(parameter) not in quantized:
                yield f"{block.name}.{name}", parameter.detach()


def divergence(window: Window, batch: int, hidden: Tensor) -> Tensor:
    """Return KL(original || quantized) in nats per token for the quantized model's last hidden states.

    The vocabulary makes logits the largest tensors of all: they are made and differentiated one sequence at a time, and
    what is returned has their gradient.
    """
    assert window.head is not None
    total, gradients = 0.0, []
    for row in range(len(hidden)):
        with torch.no_grad(), torch.autocast(hidden.device.type, torch.bfloat16, enabled=window.amp):
            target = window.head(batch, row, window.targets[batch][row : row + 1].to(hidden)).log_softmax(-1)
        with torch.enable_grad(), torch.autocast(hidden.device.type, torch.bfloat16, enabled=window.amp):
            leaf = hidden[row : row + 1].detach().requires_grad_()
            guess = window.head(batch, row, leaf).log_softmax(-1)
            value = (target.exp() * (target - guess)).sum() / (hidden.shape[0] * hidden.shape[1])
            (gradient,) = torch.autograd.grad(value, leaf)
        total += float(value.detach())
        gradients.append(gradient)
    surrogate = (hidden * torch.cat(gradients)).sum()
    return surrogate - surrogate.detach() + total


METHOD = Distill
