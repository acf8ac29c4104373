"""One decoder layer in memory, and the record of what is decided about each of its linears."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from quantkit.core.masks import Sparsity
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import QuantScheme
from quantkit.model.activations import Activations
from quantkit.model.architecture import Architecture, HasTextConfig

_PARTS = ("codes", "scale", "zero_point")  # of a QuantizedTensor


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
        sparsity: how much of the weight a pruning pass drops; None: nothing.
        mask: what a pruning pass decided, bool of the weight's shape, True where a weight stays; the others are exactly
            zero from then on. None: no pass pruned.
        samples: what gradients of the whole model's loss are made of, where a pass asked for them.
        quantized: the result, None until a rounding pass ran.
        learned: what a pass keeps for the next window that holds the site, tensors by name; None at first.
    """

    name: str
    local_name: str
    linear: nn.Module
    group: str
    scheme: QuantScheme
    scale_dtype: torch.dtype
    sparsity: Sparsity | None = None
    mask: Tensor | None = None
    samples: Any = None
    quantized: QuantizedTensor | None = None
    learned: Mapping[str, Tensor] | None = None

    @property
    def parameter(self) -> str:
        """Full name of the weight."""
        return f"{self.name}.weight"

    @property
    def transposed(self) -> bool:
        """Whether the weight is (in, out)."""
        return not isinstance(self.linear, nn.Linear)

    @property
    def weight(self) -> Tensor:
        """The linear's weight as it is now."""
        weight = self.linear.weight
        assert isinstance(weight, Tensor)
        return weight


@dataclass(kw_only=True)
class Block:
    """One decoder layer.

    Attributes:
        index: its place.
        name: its module name, for example `model.layers.3`.
        module: the layer, its weights in float32.
        sites: its quantized linears.
        dtypes: name inside the block → dtype of the stored parameter.
        changed: names inside the block of parameters besides the sites' weights that a pass gave other values; they are
            written with these values, which therefore must be exact in the stored dtype.
        architecture: facts of the family, None if no file of the model zoo describes it.
        config: the model's configuration.
        activations: the activations around the sites that are quantized.
    """

    index: int
    name: str
    module: nn.Module
    sites: Sequence[Site]
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    architecture: Architecture | None = None
    config: HasTextConfig | None = None
    activations: Activations | None = None

    def state(self) -> dict[str, Tensor]:
        """Return all that passes may have changed or decided but `changed`: parameters, codes, what is learned."""
        tensors = {f"parameter/{name}": parameter.detach() for name, parameter in self.module.named_parameters()}
        for site in self.sites:
            for part in _PARTS if site.quantized else ():
                value = getattr(site.quantized, part)
                if value is not None:
                    tensors[f"{part}/{site.local_name}"] = value
            if site.mask is not None:
                tensors[f"mask/{site.local_name}"] = site.mask
            tensors |= {f"learned/{site.local_name}/{key}": value for key, value in (site.learned or {}).items()}
        return tensors

    def set_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned for the same block."""
        for name, parameter in self.module.named_parameters():
            parameter.data = tensors[f"parameter/{name}"].to(parameter)
        for site in self.sites:
            device, prefix = site.weight.device, f"learned/{site.local_name}/"
            parts: dict[str, Any] = dict.fromkeys(_PARTS)
            for part in _PARTS:
                if f"{part}/{site.local_name}" in tensors:
                    parts[part] = tensors[f"{part}/{site.local_name}"].to(device)
            site.quantized = None if parts["codes"] is None else QuantizedTensor(**parts, scheme=site.scheme)
            mask = tensors.get(f"mask/{site.local_name}")
            site.mask = None if mask is None else mask.to(device)
            learned = {key.removeprefix(prefix): v.to(device) for key, v in tensors.items() if key.startswith(prefix)}
            site.learned = learned or None

    def forward(
        self,
        hidden: Tensor,
        arguments: Arguments,
        parameters: Mapping[str, Tensor] | None = None,
        *,
        quantized: bool = False,
    ) -> Tensor:
        """Return the block's output hidden states, (batch, tokens, width).

        `parameters` replaces parameters of the block (names inside the block, as `mlp.up_proj.weight`) for this call;
        gradients flow to them. With `quantized` the block's activations are quantized, if its scheme says so.
        """
        with self.activations.quantized() if quantized and self.activations else nullcontext():
            return self._forward(hidden, arguments, parameters)

    def _forward(self, hidden: Tensor, arguments: Arguments, parameters: Mapping[str, Tensor] | None) -> Tensor:
        inputs = (hidden, *arguments.args)
        if parameters:
            output = functional_call(self.module, dict(parameters), inputs, dict(arguments.kwargs))
        else:
            output = self.module(*inputs, **arguments.kwargs)
        hidden_after: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden_after
