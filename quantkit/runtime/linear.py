"""Modules that compute from what is stored: packed codes, or weights of 16 bits under activations of 32."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import import_module
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantkit.core.qtensor import QuantizedTensor
from quantkit.errors import QuantkitWarning, UsageError
from quantkit.runtime.kernel import Kernel, Layout
from quantkit.runtime.kernels import reference
from quantkit.runtime.products import HALVES, dense_product, product, scaled_product

KERNELS = {"cuda": "triton_gpu", "cpu": "native"}  # the fast one of each kind of device


def pick_kernel(device: torch.device, layout: Layout, scale: torch.dtype) -> Kernel:
    """Return the fast kernel of `device`, or `reference` with a warning that says why it is not the fast one.

    Fast kernels read scales of 16 bits; `scale` is the dtype that these have.
    """
    name = KERNELS.get(device.type)
    obstacle = f"there is no kernel for {device.type}"
    if scale not in HALVES:
        obstacle = "its scales are not exact in 16 bits"
    elif name is not None:
        kernel: Kernel = import_module(f"quantkit.runtime.kernels.{name}").KERNEL
        obstacle = kernel.obstacle(device, layout) or ""
        if not obstacle:
            return kernel
    _warn(f"packed weights are computed by torch alone, which is slow: {obstacle}")
    return reference.KERNEL


class PackedLinear(nn.Module):
    """A linear whose weight stays packed; takes the place of `nn.Linear` and of GPT-2's `Conv1D`.

    Gradients pass through it to its inputs and its bias; the weight has none, and so no input is kept for it. Moving it
    to another device moves the packed weight; changing its dtype changes the bias alone.
    """

    bias: Tensor | None
    order: Tensor | None
    scaling: Callable[[], Tensor] | None = None  # gives other scales than the stored ones, (out, groups) float32

    def __init__(
        self,
        weight: QuantizedTensor,
        bias: Tensor | None = None,
        *,
        order: Tensor | None = None,
        transposed: bool = False,
        kernel: Kernel | None = None,
    ) -> None:
        """Pack `weight` (out, in).

        Args:
            weight: as it was stored; where `transposed`, (in, out).
            bias: (out,), or None.
            order: int64 (in,), the input features in the order of the weight's columns; None: as they are.
            transposed: the weight's rows are input features.
            kernel: which one computes; None: the fast one of the device.
        """
        super().__init__()
        rows, width = weight.codes.shape
        self.layout = Layout(out=rows, width=width, scheme=weight.scheme, transposed=transposed)
        self.in_features, self.out_features = (rows, width) if transposed else (width, rows)
        weight = _with_short_scale(weight)
        self.kernel = kernel or pick_kernel(weight.codes.device, self.layout, weight.scale.dtype)
        self._hold(weight)
        self.register_buffer("order", order)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return inputs (…, in) times the weight, plus the bias: (…, out).

        Raises:
            UsageError: inputs of another width or on another device.
        """
        self._refuse_unfit(inputs)
        flat = inputs.reshape(-1, self.in_features)
        if self.order is not None:
            flat = flat.index_select(1, self.order)
        result: Tensor = self._product(flat.contiguous())
        if self.bias is not None:
            result += self.bias
        return result.view(*inputs.shape[:-1], self.out_features)

    def _product(self, flat: Tensor) -> Tensor:
        if self.scaling is not None:
            return scaled_product(flat, self.scaling(), self.kernel, self.packed, self.layout)
        return product(flat, self.kernel, self.packed, self.layout)

    @property
    def packed(self) -> dict[str, Tensor]:
        """The kernel's tensors."""
        return {name: self._buffers[name] for name in self._names}  # type: ignore[misc]

    def unpack(self) -> QuantizedTensor:
        """Return the weight as it was stored, its columns in the stored order."""
        return self.kernel.unpack(self.packed, self.layout)

    def replace_scale(self, scale: Tensor) -> None:
        """Let `scale` (out, groups), rounded to the dtype of the stored ones, be the scales of the weight."""
        weight = self.unpack()
        new = scale.to(weight.scale.device, weight.scale.dtype)
        packed = self.kernel.pack(replace(weight, scale=new))
        self._buffers["scale"] = packed["scale"]

    def extra_repr(self) -> str:
        """Say what is packed."""
        kernel = type(self.kernel).__name__.lower()
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.layout.scheme}, {kernel}"

    def _refuse_unfit(self, inputs: Tensor) -> None:
        # the compiled functions are given addresses, and would read whatever is there
        if inputs.shape[-1] != self.in_features:
            raise UsageError(f"a packed linear has {self.in_features} input features, not {inputs.shape[-1]}")
        if inputs.device != (place := self._place()):
            raise UsageError(f"inputs are on {inputs.device} but the packed weight is on {place}; move one of them")

    def _place(self) -> torch.device:
        device: torch.device = self._buffers[self._names[0]].device  # type: ignore[union-attr]
        return device

    def _hold(self, weight: QuantizedTensor) -> None:
        packed = self.kernel.pack(weight)
        self._names = tuple(packed)
        for name, tensor in packed.items():
            self.register_buffer(name, tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move as modules do, but keep the dtypes of what is packed; each kind of device has its own kernel."""
        before, left = self.packed, self._place()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self._place()
        for name, tensor in before.items():
            self._buffers[name] = tensor.to(device)
        if self.kernel is not reference.KERNEL and device.type != left.type:
            weight = self.unpack()
            for name in self._names:
                del self._buffers[name]
            self.kernel = pick_kernel(device, self.layout, weight.scale.dtype)
            self._hold(weight)
        return self


class HalfLinear(nn.Module):
    """A dense linear whose weight stays in 16 bits where activations are float32, as on CPUs."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        """Take over weight (out, in) and bias of `linear`; a weight that is tied stays shared."""
        super().__init__()
        self.register_buffer("weight", linear.weight.detach())  # no parameter: `model.dtype` is that of parameters
        self.register_parameter("bias", linear.bias)
        self.out_features, self.in_features = linear.weight.shape

    def forward(self, inputs: Tensor) -> Tensor:
        """Return inputs (…, in) times the weight, plus the bias: (…, out), of the inputs' dtype."""
        if inputs.dtype != torch.float32 or self.weight.dtype not in HALVES:
            return functional.linear(inputs, self.weight.to(inputs.dtype), self.bias)
        result: Tensor = dense_product(inputs.reshape(-1, self.in_features).contiguous(), self.weight)
        if self.bias is not None:
            result += self.bias
        return result.view(*inputs.shape[:-1], self.out_features)


class HalfEmbedding(nn.Module):
    """An embedding that is stored in 16 bits and gives float32; its values are exact."""

    weight: Tensor

    def __init__(self, embedding: nn.Embedding) -> None:
        """Take over the weight (tokens, features) of `embedding`; one that is tied stays shared."""
        super().__init__()
        self.register_buffer("weight", embedding.weight.detach())

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the rows of `tokens` (…): (…, features), float32."""
        return functional.embedding(tokens, self.weight).float()


def narrow_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the replacement of each dense linear and embedding of `model` that can be held in 16 bits, by its name.

    Of the plain classes alone: a family's own (Gemma's scaled embedding) computes more than its name says.
    """
    kinds: dict[type[nn.Module], Callable[[Any], nn.Module]] = {nn.Linear: HalfLinear, nn.Embedding: HalfEmbedding}
    named = model.named_modules()
    return {name: kinds[type(module)](module) for name, module in named if type(module) in kinds}


def _with_short_scale(weight: QuantizedTensor) -> QuantizedTensor:
    """Return `weight` with scales of 16 bits where that loses nothing."""
    for dtype in HALVES:
        short = weight.scale.to(dtype)
        if weight.scale.dtype not in HALVES and torch.equal(short.to(weight.scale.dtype), weight.scale):
            return QuantizedTensor(codes=weight.codes, scale=short, zero_point=weight.zero_point, scheme=weight.scheme)
    return weight


@cache
def _warn(text: str) -> None:
    """Warn once of each reason."""
    warnings.warn(text, QuantkitWarning, stacklevel=2)
