"""Gradients through products with packed weights, against dense ones in float64."""

import pytest
import torch
from packed import exact, layout_of, random_weight, scheme
from torch import nn

from quantkit.runtime.kernels import native, reference
from quantkit.runtime.linear import HalfLinear, PackedLinear

GENERATOR = torch.Generator().manual_seed(11)
KERNELS = [native.KERNEL, reference.KERNEL]


def gradient_of(module, inputs, weights):
    inputs = inputs.clone().requires_grad_()
    (module(inputs) * weights).sum().backward()
    return inputs.grad


@pytest.mark.parametrize("kernel", KERNELS, ids=["native", "reference"])
@pytest.mark.parametrize("tokens", [1, 5, 300])
@pytest.mark.parametrize("kind", [scheme(4, 32), scheme(3, None), scheme(2, 8), scheme(8, 32, symmetric=True)], ids=str)
def test_inputs_get_the_gradient_of_a_dense_twin(kernel, kind, tokens):
    weight = random_weight(40, 64, kind)
    module = PackedLinear(weight, torch.ones(40), kernel=kernel)
    inputs, outer = torch.randn(tokens, 64, generator=GENERATOR), torch.randn(tokens, 40, generator=GENERATOR)
    expected = outer.double() @ exact(weight)
    found = gradient_of(module, inputs, outer)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * float(expected.std()))


def test_through_columns_in_another_order():
    weight, order = random_weight(16, 64, scheme(4, 32)), torch.randperm(64, generator=GENERATOR)
    shuffled = torch.empty(16, 64, dtype=torch.float64)
    shuffled[:, order] = exact(weight)
    outer = torch.randn(2, 16, generator=GENERATOR)
    found = gradient_of(PackedLinear(weight, order=order), torch.randn(2, 64, generator=GENERATOR), outer)
    torch.testing.assert_close(found.double(), outer.double() @ shuffled, rtol=1e-5, atol=1e-4)


def test_through_a_weight_stored_by_input_features():
    weight = random_weight(64, 32, scheme(4, 32))
    outer = torch.randn(3, 32, generator=GENERATOR)
    module = PackedLinear(weight, torch.ones(32), transposed=True)
    found = gradient_of(module, torch.randn(3, 64, generator=GENERATOR), outer)
    torch.testing.assert_close(found.double(), outer.double() @ exact(weight).T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 40])
def test_through_a_half_linear(dtype, tokens):
    dense = nn.Linear(48, 30, bias=False).to(dtype)
    inputs, outer = torch.randn(tokens, 48, generator=GENERATOR), torch.randn(tokens, 30, generator=GENERATOR)
    found = gradient_of(HalfLinear(dense), inputs, outer)
    torch.testing.assert_close(found.double(), outer.double() @ dense.weight.double(), rtol=1e-5, atol=1e-5)


def test_a_gradient_of_the_bias():
    module = PackedLinear(random_weight(16, 64, scheme(4, 32)), torch.zeros(16))
    module.bias.requires_grad_()
    outer = torch.randn(5, 16, generator=GENERATOR)
    gradient_of(module, torch.randn(5, 64, generator=GENERATOR), outer)
    torch.testing.assert_close(module.bias.grad, outer.sum(0))


@pytest.mark.parametrize(
    ("kernel", "transposed"),
    [(native.KERNEL, False), (reference.KERNEL, False), (reference.KERNEL, True)],
    ids=["native", "reference", "reference, transposed"],
)
@pytest.mark.parametrize("kind", [scheme(4, 32), scheme(3, None)], ids=str)
def test_scales_get_the_gradient_of_a_dense_twin(kernel, kind, transposed):
    weight = random_weight(40, 64, kind)
    module = PackedLinear(weight, transposed=transposed, kernel=kernel)
    scales = (weight.scale.float() * 1.1).requires_grad_()
    module.scaling = lambda: scales
    width, out = (40, 64) if transposed else (64, 40)
    inputs, outer = torch.randn(7, width, generator=GENERATOR), torch.randn(7, out, generator=GENERATOR)
    found = gradient_of(module, inputs, outer)
    steps = exact(weight) / weight.scale.double().repeat_interleave(64 // weight.scale.shape[1], 1)
    twin = scales.detach().double().requires_grad_()
    dense = steps * twin.repeat_interleave(64 // weight.scale.shape[1], 1)
    wide = inputs.double().requires_grad_()
    expected = wide @ (dense if transposed else dense.T)
    (expected * outer).sum().backward()
    torch.testing.assert_close(module(inputs).double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.double(), wide.grad, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(scales.grad.double(), twin.grad, rtol=1e-4, atol=1e-4)


def test_no_input_is_kept():
    module = PackedLinear(random_weight(40, 64, scheme(4, 32)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        module(torch.randn(9, 64, requires_grad=True))
    assert not kept


@pytest.mark.parametrize("kernel", KERNELS, ids=["native", "reference"])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("rows", [1, 40, 1000])
def test_dense_rows_are_the_weight_to_the_bit(kernel, bits, rows, monkeypatch):
    monkeypatch.setattr(native, "DENSE_BYTES", 2**16)
    monkeypatch.setattr(reference, "ELEMENTS", 2**12)
    weight = random_weight(rows, 64, scheme(bits, 32))
    parts = [part.clone() for part in kernel.dense_rows(kernel.pack(weight), layout_of(weight))]
    assert len(parts) > 1 or rows < 1000
    assert torch.equal(torch.cat(parts).double(), exact(weight).float().double())
