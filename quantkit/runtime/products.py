"""Products with weights that never change, and the gradients that pass through them.

Of y = x Wᵀ only dx = dy W is wanted, and never the gradient of W: no input has to be kept, and the weight is made dense
some rows at a time, once more on the way back. Where the scales of W may change, x is kept, and the gradient of the
scale s of row r and group g, with W = s Q, is the sum over the columns c of g of (dyᵀ x)[r, c] Q[r, c].
"""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quantkit.runtime.kernel import Kernel, Layout
from quantkit.runtime.kernels import native, reference
from quantkit.runtime.kernels.compiler import CompilerError, library

HALVES = (torch.float16, torch.bfloat16)
Packed = Mapping[str, Tensor]


def product(inputs: Tensor, kernel: Kernel, packed: Packed, layout: Layout) -> Tensor:
    """Return `inputs` (tokens, width) times the packed weight, see `Kernel.linear`; a gradient passes to the inputs."""
    if inputs.requires_grad and torch.is_grad_enabled():
        result: Tensor = _Product.apply(inputs, kernel, packed, layout)  # type: ignore[no-untyped-call]
        return result
    return kernel.linear(inputs, packed, layout)


def scaled_product(inputs: Tensor, scale: Tensor, kernel: Kernel, packed: Packed, layout: Layout) -> Tensor:
    """Return `inputs` (tokens, width) times the weight whose scales are `scale` (out, groups) float32.

    Gradients pass to the inputs and to the scales.
    """
    ones = {**packed, "scale": torch.ones_like(packed["scale"])}
    result: Tensor = _ScaledProduct.apply(inputs, scale, kernel, ones, layout)  # type: ignore[no-untyped-call]
    return result


def dense_product(inputs: Tensor, weight: Tensor) -> Tensor:
    """Return float32 `inputs` (tokens, width) times the transposed `weight` (out, width) of 16 bits: (tokens, out).

    A gradient passes to the inputs.
    """
    result: Tensor = _DenseProduct.apply(inputs, weight)  # type: ignore[no-untyped-call]
    return result


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, kernel: Kernel, packed: Packed, layout: Layout) -> Tensor:  # noqa: ANN401
        ctx.weight = kernel, packed, layout
        return kernel.linear(inputs, packed, layout)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        kernel, packed, layout = ctx.weight
        return _back(gradient, kernel.dense_rows(packed, layout), layout), None, None, None


class _ScaledProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        inputs: Tensor,
        scale: Tensor,
        kernel: Kernel,
        steps: Packed,
        layout: Layout,
    ) -> Tensor:
        ctx.save_for_backward(inputs, scale)
        ctx.weight = kernel, steps, layout
        wide, rows = inputs.float(), _scaled(kernel.dense_rows(steps, layout), scale)
        if not layout.transposed:
            return torch.cat([wide @ part.T for part in rows], dim=1).to(inputs.dtype)
        result, first = wide.new_zeros(len(wide), layout.width), 0
        for part in rows:
            result += wide[:, first : first + len(part)] @ part
            first += len(part)
        return result.to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # noqa: ANN401
        inputs, scale = ctx.saved_tensors
        kernel, steps, layout = ctx.weight
        of_inputs = of_scale = None
        if ctx.needs_input_grad[0]:
            of_inputs = _back(gradient, _scaled(kernel.dense_rows(steps, layout), scale), layout)
        if ctx.needs_input_grad[1]:
            of_scale = torch.empty_like(scale)
            of_rows, of_columns = (inputs, gradient) if layout.transposed else (gradient, inputs)
            first, columns = 0, of_columns.float()
            for part in kernel.dense_rows(steps, layout):
                rows = slice(first, first + len(part))
                of_weight = of_rows[:, rows].float().T @ columns
                of_scale[rows] = (of_weight * part).reshape(len(part), layout.groups, -1).sum(2)
                first += len(part)
        return of_inputs, of_scale, None, None, None


class _DenseProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> Tensor:  # noqa: ANN401
        ctx.weight = weight
        if _native(inputs, weight):
            return native.dense_linear(inputs, weight)
        return torch.cat([inputs @ part.T for part in _parts(weight, inputs.dtype)], dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        result, first = gradient.new_zeros(len(gradient), ctx.weight.shape[1]), 0
        for part in _parts(ctx.weight, gradient.dtype):
            result.addmm_(gradient[:, first : first + len(part)], part)
            first += len(part)
        return result, None


def _back(gradient: Tensor, rows: Iterator[Tensor], layout: Layout) -> Tensor:
    """Return the gradient (tokens, width) of inputs from that of outputs, (tokens, out)."""
    wide = gradient.float()
    if layout.transposed:
        return torch.cat([wide @ part.T for part in rows], dim=1).to(gradient.dtype)
    result, first = wide.new_zeros(len(wide), layout.width), 0
    for part in rows:
        result.addmm_(wide[:, first : first + len(part)], part)
        first += len(part)
    return result.to(gradient.dtype)


def _scaled(steps: Iterator[Tensor], scale: Tensor) -> Iterator[Tensor]:
    """Yield rows of the weight: its steps (rows, width) times its scales."""
    first = 0
    for part in steps:
        some = scale[first : first + len(part)]
        yield (part.reshape(len(part), some.shape[1], -1) * some.unsqueeze(2)).view(len(part), -1)
        first += len(part)


def _parts(weight: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    rows = max(1, reference.ELEMENTS // weight.shape[1])
    return (part.to(dtype) for part in weight.split(rows))


def _native(inputs: Tensor, weight: Tensor) -> bool:
    on_cpu = inputs.device.type == weight.device.type == "cpu"
    return on_cpu and len(inputs) <= native.DENSE_TOKENS and weight.is_contiguous() and _compiled()


@cache
def _compiled() -> bool:
    try:
        library(native.ANY_BITS)
    except CompilerError:
        return False
    return True
