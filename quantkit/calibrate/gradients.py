"""Gradients of a loss in each linear's weight, as the products that they are made of.

By default the loss is that of a window's reconstruction: the squared distance of the window's output to a target, half
of it summed over everything. At the original weights its gradients are zero, and at others they say more of the error
that is there than of what a change would cost.
What second-order methods want is their Fisher matrix, whose gradients are those of targets drawn around the output
itself, y = f(x) + ε with ε standard normal (Kunstner et al., arXiv 1905.12558): E[g g^T] is then the Gauss-Newton
matrix of the loss. The gradient of a token is an outer product δ x^T of two vectors that one backward pass gives for
all tokens; the sum over some tokens is one gradient, so as many are had as are wanted.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from quantkit.calibrate.passes import Window
from quantkit.calibrate.team import Team
from quantkit.model.block import Site


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """What the gradients of one linear are made of.

    Attributes:
        inputs: (gradients, tokens, in) float32.
        slopes: (gradients, tokens, out) float32, of the loss in the linear's outputs.
    """

    inputs: Tensor
    slopes: Tensor

    def to(self, device: torch.device) -> "Samples":
        """Return them on a device."""
        return Samples(inputs=self.inputs.to(device), slopes=self.slopes.to(device))

    def gradients(self, first: int, last: int) -> Tensor:
        """Return the gradients of some rows of the weight, (gradients, (last - first) * in)."""
        return (self.slopes[:, :, first:last].transpose(1, 2) @ self.inputs).flatten(1)

    def mean_square(self) -> float:
        """Return the mean square of all numbers of all gradients."""
        products = (self.slopes @ self.slopes.transpose(1, 2)) * (self.inputs @ self.inputs.transpose(1, 2))
        size = self.slopes.shape[2] * self.inputs.shape[2]
        return float(products.sum(dtype=torch.float64)) / (len(self.inputs) * size)


def gradient_samples(
    window: Window, sites: Sequence[Site], *, gradients: int, tokens: int, scale: Tensor | None = None
) -> dict[str, Samples]:
    """Return samples of each site that an input reaches, by full module name; fewer gradients if there are few tokens.

    Args:
        window: the blocks and their inputs.
        sites: which linears.
        gradients: how many.
        tokens: the most tokens that are looked at.
        scale: what the errors of each token are divided by in the loss, (batch, tokens, 1) for every batch; None: 1.
    """
    team = window.team
    generator = torch.Generator().manual_seed(window.seed + team.rank)
    gradients, tokens = max(1, gradients // team.size), max(1, tokens // team.size)
    found: dict[str, list[tuple[Tensor, Tensor]]] = {site.name: [] for site in sites}
    seen = 0
    for batch, hidden in enumerate(window.inputs):
        if seen >= tokens:
            break
        seen += hidden.shape[:2].numel()
        for name, pair in _of_batch(window, batch, sites, generator, scale).items():
            found[name].append(pair)
    own = {name: _grouped(pairs, gradients, tokens) for name, pairs in found.items() if pairs}
    return own if team.alone else _of_all(own, team)


def _of_all(own: Mapping[str, Samples], team: Team) -> dict[str, Samples]:
    """Return the gradients of all processes, of the linears and in the sizes that all of them have."""
    parts: dict[str, list[Samples]] = {}
    for rank in range(team.size):
        tensors = {f"{kind}/{name}": getattr(s, kind) for name, s in own.items() for kind in ("inputs", "slopes")}
        given = team.give(tensors if rank == team.rank else None, source=rank)
        for key in given:
            kind, _, name = key.partition("/")
            if kind == "inputs":
                parts.setdefault(name, []).append(Samples(inputs=given[key], slopes=given[f"slopes/{name}"]))
    return {
        name: Samples(inputs=torch.cat([p.inputs for p in found]), slopes=torch.cat([p.slopes for p in found]))
        for name, found in parts.items()
        if len({p.inputs.shape for p in found}) == 1
    }


@torch.enable_grad()
def _of_batch(
    window: Window, batch: int, sites: Sequence[Site], generator: torch.Generator, scale: Tensor | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return inputs and slopes, (tokens, in) and (tokens, out), of the sites that the batch reaches."""
    with _watched({site.linear: site.name for site in sites}) as heard:
        output = window.forward(batch, hidden=window.inputs[batch].float().requires_grad_())
    names = list(heard)
    noise = torch.randn(output.shape, generator=generator).to(output)
    noise = noise if scale is None else noise / scale.clamp(min=1e-15)
    slopes = torch.autograd.grad(output, [heard[name][1] for name in names], noise, allow_unused=True)
    pairs = {}
    for name, slope in zip(names, slopes, strict=True):
        if slope is not None:
            pairs[name] = heard[name][0].flatten(0, -2).float(), slope.flatten(0, -2).float()
    return pairs


@torch.enable_grad()
def model_samples(
    model: nn.Module, names: Sequence[str], batches: Sequence[Tensor], *, gradients: int, tokens: int
) -> dict[str, Samples]:
    """Return samples of the language-model loss, the sum of each token's negative log-likelihood, in the whole model.

    Args:
        model: tokens (batch, tokens) → an object with `logits`; on a CPU.
        names: full names of the linears.
        batches: (batch, tokens) int64 each.
        gradients: how many.
        tokens: the most tokens that are looked at.
    """
    linears = {model.get_submodule(name): name for name in names}
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    first = cast(Any, model).get_input_embeddings()  # as all models of transformers have
    # a gradient has to begin somewhere, and the weights want none
    handle = first.register_forward_hook(lambda *call: call[2].detach().requires_grad_())
    seen = 0
    try:
        for batch in batches:
            if seen >= tokens:
                break
            seen += batch.numel()
            with _watched(linears) as heard:
                logits = model(batch, use_cache=False).logits[:, :-1]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum")
            slopes = torch.autograd.grad(loss, [heard[name][1] for name in heard], allow_unused=True)
            for name, slope in zip(heard, slopes, strict=True):
                if slope is not None:
                    found[name].append((heard[name][0].flatten(0, -2).float(), slope.flatten(0, -2).float()))
    finally:
        handle.remove()
    return {name: _grouped(pairs, gradients, tokens) for name, pairs in found.items() if pairs}


@contextmanager
def _watched(names: Mapping[nn.Module, str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Keep what goes into linears and comes out, by the names that they are given here."""
    heard: dict[str, tuple[Tensor, Tensor]] = {}

    def hear(linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        heard[names[linear]] = inputs[0].detach(), output

    handles = [linear.register_forward_hook(hear) for linear in names]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _grouped(pairs: Sequence[tuple[Tensor, Tensor]], gradients: int, tokens: int) -> Samples:
    """Return the tokens in groups of equal size, in their order; what is left over is left out."""
    inputs, slopes = (torch.cat(parts)[:tokens] for parts in zip(*pairs, strict=True))
    count = min(gradients, len(inputs))
    used = len(inputs) // count * count
    return Samples(inputs=inputs[:used].unflatten(0, (count, -1)), slopes=slopes[:used].unflatten(0, (count, -1)))
