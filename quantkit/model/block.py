"""One decoder layer in memory, and the record of what is decided about each of its linears."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import QuantScheme
from quantkit.model.activations import Activations


@dataclass(frozen=True, slots=True)
class Arguments:
    """What a block is called with besides the hidden states."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Site:
    """One linear that is quantized, and what the passes decide about it.

    Attributes:
        name: full module name.
        local_name: name inside the block.
        linear: the module; its `weight` has shape (out, in), for GPT-2's Conv1D (in, out). Groups run along
            the last axis either way, because that is the axis that the packed format groups.
        group: name of the group of linears that share this one's input.
        scheme: what the weight becomes.
        scale_dtype: dtype in which scales are stored.
        quantized: the result, None until a rounding pass ran.
    """

    name: str
    local_name: str
    linear: nn.Module
    group: str
    scheme: QuantScheme
    scale_dtype: torch.dtype
    quantized: QuantizedTensor | None = None

    @property
    def weight(self) -> Tensor:
        """The linear's weight as it is now."""
        weight = self.linear.weight
        assert isinstance(weight, Tensor)
        return weight


@dataclass(kw_only=True)
class Block:
    """One decoder layer: its place, its module, its quantized sites, the activations that are quantized around them."""

    index: int
    module: nn.Module
    sites: Sequence[Site]
    activations: Activations | None = None

    def forward(
        self,
        hidden: Tensor,
        arguments: Arguments,
        weights: Mapping[str, Tensor] | None = None,
        *,
        quantized: bool = False,
    ) -> Tensor:
        """Return the block's output hidden states, (batch, tokens, width).

        `weights` replaces the weights of the named linears (local names) for this call; gradients flow to
        them. With `quantized` the block's activations are quantized, if its scheme says so.
        """
        with self.activations.quantized() if quantized and self.activations else nullcontext():
            return self._forward(hidden, arguments, weights)

    def _forward(self, hidden: Tensor, arguments: Arguments, weights: Mapping[str, Tensor] | None) -> Tensor:
        inputs = (hidden, *arguments.args)
        if weights:
            replaced = {f"{name}.weight": weight for name, weight in weights.items()}
            output = functional_call(self.module, replaced, inputs, dict(arguments.kwargs))
        else:
            output = self.module(*inputs, **arguments.kwargs)
        hidden_after: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden_after
