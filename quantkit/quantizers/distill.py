"""End-to-end distillation of scales: the whole quantized model learns the original's logits, its codes as they are.

Chen et al., EfficientQAT, arXiv 2407.11062, section 3.3 (E2E-QP), with the original model's distribution in the place
of the text's tokens: minimise KL(original || quantized) over the scale of every group and the weights of the norms.

Codes, zero points and format do not change. A block is computed again in the backward pass (Chen et al., arXiv
1604.06174), so besides the codes only one block and the hidden states between blocks are in memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from quantkit.calibrate.memory import release_freed
from quantkit.calibrate.passes import Phase, Window
from quantkit.core.affine import stored
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import QuantScheme
from quantkit.errors import UsageError
from quantkit.model.block import Block, Site
from quantkit.model.device import native_bfloat16
from quantkit.train.fit import SCHEDULES, ParameterGroup, Schedule, fit

MEASURED = 4  # batches on which the divergence is measured before and after


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Distillation of scales and norms over the whole model; learning rates grow with the square root of the batch.

    What is learned is kept unless it is farther from the original than what was there.

    Attributes:
        updates: updates, over one batch each; 0 leaves everything as it is.
        lr: learning rate of the scales, as a share of each.
        norms_lr: learning rate of the norms' weights, as a share of each; 0 leaves them as they are.
        schedule: what becomes of the learning rates; batches come in random order.
        amp: compute matrix products in bfloat16 while training, where the CPU has instructions for it; GPUs always do.
    """

    phase: ClassVar[Phase] = Phase.COMPENSATE
    learns: ClassVar[bool] = True

    updates: int = 64
    lr: float = 1e-3
    norms_lr: float = 1e-3
    schedule: Schedule = "cosine"
    amp: bool = False

    def __post_init__(self) -> None:
        if self.updates < 0:
            raise UsageError(f"updates must not be negative, not {self.updates}")
        if not self.lr > 0 or not self.norms_lr >= 0:
            raise UsageError(f"lr must be positive and norms_lr at least 0, not {self.lr} and {self.norms_lr}")
        if self.schedule not in SCHEDULES:
            raise UsageError(f"schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule!r}")

    @classmethod
    def for_scheme(cls, scheme: QuantScheme) -> "Distill":
        """Return the setting for `scheme`: the fewer bits, the farther the scales have to go."""
        lr = {2: 3e-3, 3: 1e-3}.get(scheme.bits, 3e-4)
        return cls(lr=lr, norms_lr=lr)

    @property
    def blocks_at_once(self) -> int:
        """0: the whole model."""
        return 0

    @property
    def updates_per_window(self) -> int:
        """Updates of the whole model."""
        return self.updates

    @torch.enable_grad()
    def apply(self, window: Window) -> None:
        """Learn the scales of every site of the model."""
        if not self.updates:
            return
        scales = {site.parameter: _Scale(site) for site in window.sites}
        norms = {name: _Norm(block, local) for block in window.blocks for name, local in self._norm_names(block)}

        def run(place: int, batch: int, hidden: Tensor) -> Tensor:
            release_freed()  # what the block before freed lies in pieces, and all blocks' pieces together are much
            own = f"{window.blocks[place].name}."
            parameters = {name: made() for name, made in {**scales, **norms}.items() if name.startswith(own)}
            return window.step(place, batch, hidden, parameters, student=True)

        def loss(batch: int) -> Tensor:
            hidden = window.inputs[batch].to(window.device).requires_grad_()
            for place in range(len(window.blocks)):
                hidden = checkpoint(run, place, batch, hidden, use_reentrant=False)
            return divergence(window, batch, hidden)

        root = window.batch_size**0.5
        groups = [ParameterGroup(parameters=[scale.factor for scale in scales.values()], lr=self.lr * root)]
        if norms:
            groups.append(ParameterGroup(parameters=[n.factor for n in norms.values()], lr=self.norms_lr * root))
        before = window.notes["divergence_before"] = measured_divergence(window, run)
        window.amp = self.amp and native_bfloat16(window.device)
        result = fit(
            groups,
            loss,
            batches=len(window.inputs),
            updates=self.updates,
            tick=window.tick,
            schedule=self.schedule,
            generator=torch.Generator().manual_seed(window.seed),
            team=window.team,
        )
        window.amp = False
        window.notes["divergence"] = result.losses
        if result.diverged:
            window.notes["diverged"] = _where(len(result.losses))
        learned = window.notes["divergence_after"] = measured_divergence(window, run)
        if not learned <= before:
            window.notes["fallback"] = (
                f"scales and norms stay, because their divergence {before:.3g} is below {learned:.3g}"
            )
            window.notes["divergence_after"] = before
            return
        for site in window.sites:
            site.quantized = scales[site.parameter].finished()
        for norm in norms.values():
            norm.finish()

    def _norm_names(self, block: Block) -> Iterator[tuple[str, str]]:
        """Yield the full and the local name of the weights of a block's norms: its only vectors besides biases."""
        quantized = {id(site.weight) for site in block.sites}
        for name, parameter in block.module.named_parameters() if self.norms_lr else ():
            if parameter.ndim == 1 and name.endswith("weight") and id(parameter) not in quantized:
                yield f"{block.name}.{name}", name


def _where(passes: int) -> str:
    if not passes:
        return "in the first pass over the batches, so nothing was learned"
    return f"after {passes} passes over the batches, the best of which is kept"


class _Scale(nn.Module):
    """The scales of one site, s (1 + factor), and the weight that its codes make with them."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        assert site.quantized is not None, f"{site.name} was not rounded"
        self.quantized: QuantizedTensor = site.quantized
        self.scale = site.quantized.scale.float()
        self.factor = nn.Parameter(torch.zeros_like(self.scale))

    def value(self) -> Tensor:
        """Return the scales as they are stored, (out, groups) float32."""
        return stored(self.scale * (1 + self.factor), self.quantized.scale.dtype)

    def forward(self) -> Tensor:
        """Return the weight, (out, in) float32."""
        steps = self.quantized.codes.float().unflatten(1, (self.scale.shape[1], -1))
        if self.quantized.zero_point is not None:
            steps -= self.quantized.zero_point.float().unsqueeze(-1)
        weight: Tensor = steps * self.value().unsqueeze(-1)
        return weight.flatten(1)

    def finished(self) -> QuantizedTensor:
        """Return the same codes with the learned scales."""
        return replace(self.quantized, scale=self.value().detach().to(self.quantized.scale.dtype))


class _Norm(nn.Module):
    """The weight of one norm, w (1 + factor)."""

    def __init__(self, block: Block, name: str) -> None:
        super().__init__()
        self.block, self.name, self.weight = block, name, block.module.get_parameter(name).detach()
        self.factor = nn.Parameter(torch.zeros_like(self.weight))

    def forward(self) -> Tensor:
        """Return the weight as it is stored."""
        return stored(self.weight * (1 + self.factor), self.block.dtypes[self.name])

    def finish(self) -> None:
        """Write the weight into the block."""
        self.block.module.get_parameter(self.name).data = self().detach()
        self.block.changed.add(self.name)


def measured_divergence(window: Window, run: Callable[[int, int, Tensor], Tensor]) -> float:
    """Return KL(original || quantized) in nats per token over the first batches, in float32.

    `run(place, batch, hidden)` is what one block of the quantized model computes.
    """
    batches = range(min(len(window.inputs), MEASURED))
    total = 0.0
    for batch in batches:
        with torch.no_grad():
            hidden = window.inputs[batch].to(window.device)
            for place in range(len(window.blocks)):
                hidden = run(place, batch, hidden)
        total += float(divergence(window, batch, hidden))
    return window.team.total(total)[0] / (len(batches) * window.team.size)


def divergence(window: Window, batch: int, hidden: Tensor) -> Tensor:
    """Return KL(original || quantized) in nats per token for the quantized model's last hidden states.

    The vocabulary makes logits the largest tensors of all: they are made and differentiated one sequence at a time, and
    what is returned passes their gradient on to `hidden`, (batch, tokens, width).
    """
    assert window.head is not None, "the pass needs a window of the whole model"
    count, device = hidden.shape[:2].numel(), hidden.device.type
    total, gradients = 0.0, []
    for row in range(len(hidden)):
        leaf = hidden[row : row + 1].detach().requires_grad_()
        with torch.autocast(device, torch.bfloat16, enabled=window.amp or device == "cuda"):
            with torch.no_grad():
                target = window.head(batch, row, window.targets[batch][row : row + 1].to(hidden)).log_softmax(-1)
            logits = window.head(batch, row, leaf)
        guess, share = logits.detach().log_softmax(-1), target.exp()
        total += float((share * target.sub_(guess)).sum()) / count
        # the gradient of the divergence in the logits is the difference of the two distributions
        (gradient,) = torch.autograd.grad(logits, leaf, guess.exp_().sub_(share).div_(count))
        gradients.append(gradient)
    surrogate = (hidden * torch.cat(gradients)).sum()
    return surrogate - surrogate.detach() + total


METHOD = Distill
