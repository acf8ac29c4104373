"""What every kernel of CPUs must do: products within a stated error, exact packing, few bits."""

import random
import threading

import pytest
import torch
from packed import bits_held, exact, layout_of, random_weight, scheme

from quantkit.runtime.kernels import native, reference

KERNELS = pytest.mark.parametrize("kernel", [native.KERNEL, reference.KERNEL], ids=["native", "reference"])
BITS = pytest.mark.parametrize("bits", range(2, 9))
# (group size, width): whole chunks of 32, parts of one, one group of an odd width, several chunks a group
SHAPES = pytest.mark.parametrize(("group_size", "width"), [(32, 96), (8, 40), (24, 72), (None, 45), (64, 128)])
TOLERANCE = 2e-5  # of Σ |x| |w|: native rounds 32 values of x at a time to 1 / 65000 of the largest
CPU = torch.device("cpu")


def assert_products(kernel, weight, tokens, *, dtype=torch.float32, tolerance=TOLERANCE):
    inputs = torch.randn(tokens, weight.codes.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    layout, dense = layout_of(weight), exact(weight)
    result = kernel.linear(inputs, kernel.pack(weight), layout)
    assert result.dtype == dtype
    assert result.shape == (tokens, len(dense))
    bound = (inputs.double().abs() @ dense.abs().T).max()
    assert (result.double() - inputs.double() @ dense.T).abs().max() <= tolerance * bound


@KERNELS
@BITS
@SHAPES
@pytest.mark.parametrize("symmetric", [False, True])
def test_products_of_every_layout(kernel, bits, group_size, width, symmetric):
    weight = random_weight(21, width, scheme(bits, group_size, symmetric=symmetric))
    for tokens in (1, 3):
        assert_products(kernel, weight, tokens)


@KERNELS
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 12, 13, 65])
@pytest.mark.parametrize("group_size", [32, 8])
def test_any_number_of_tokens(kernel, tokens, group_size):
    assert_products(kernel, random_weight(40, 64, scheme(3, group_size)), tokens)


@KERNELS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-10)])
@pytest.mark.parametrize("tokens", [1, 70])
def test_activations_of_sixteen_bits(kernel, dtype, tolerance, tokens):
    assert_products(kernel, random_weight(40, 64, scheme(4, 32)), tokens, dtype=dtype, tolerance=tolerance)


@KERNELS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_of_either_half_precision(kernel, dtype):
    assert_products(kernel, random_weight(17, 64, scheme(4, 32), dtype=dtype), 2)


@KERNELS
def test_scales_too_small_for_normal_float16(kernel):
    weight = random_weight(16, 32, scheme(4))
    weight.scale.mul_(1e-5)
    assert 0 < weight.scale.min() < 2**-14
    assert_products(kernel, weight, 1)


@KERNELS
@BITS
@SHAPES
def test_packing_is_exact(kernel, bits, group_size, width):
    for symmetric in (False, True):
        weight = random_weight(19, width, scheme(bits, group_size, symmetric=symmetric))
        again = kernel.unpack(kernel.pack(weight), layout_of(weight))
        assert torch.equal(again.codes, weight.codes)
        assert torch.equal(again.scale, weight.scale)
        assert symmetric or torch.equal(again.zero_point, weight.zero_point)
        assert again.scheme == weight.scheme


@KERNELS
@BITS
@pytest.mark.parametrize("group_size", [32, 128, None])
def test_packed_size(kernel, bits, group_size):
    kind = scheme(bits, group_size)
    stated = kind.bits_per_weight(256) * 64 * 256
    assert bits_held(kernel.pack(random_weight(64, 256, kind))) <= 1.1 * stated


@KERNELS
def test_fuzzed_shapes(kernel):
    draw = random.Random(7)
    for seed in range(60):
        groups, size = draw.randint(1, 5), draw.choice([8, 16, 24, 32, 40, 64, 96, 160])
        kind = scheme(draw.randint(2, 8), size if groups > 1 else None, symmetric=draw.random() < 0.5)
        width = groups * size if groups > 1 else draw.randint(1, 130)
        weight = random_weight(draw.randint(1, 50), width, kind, seed=seed)
        assert kernel.obstacle(CPU, layout_of(weight)) is None
        assert_products(kernel, weight, draw.choice([1, 2, 4, 7, 16, 80]))


@KERNELS
def test_values_that_are_no_numbers_are_not_lost(kernel):
    weight = random_weight(16, 64, scheme(4, 32))
    for value in (torch.nan, torch.inf):
        inputs = torch.ones(2, 64)
        inputs[1, 40] = value
        result = kernel.linear(inputs, kernel.pack(weight), layout_of(weight))
        assert torch.isfinite(result[0]).all()
        assert not torch.isfinite(result[1]).any()


@KERNELS
def test_zeros_and_tiny_and_huge_inputs(kernel):
    weight = random_weight(16, 64, scheme(4, 32))
    for size in (0.0, 1e-30, 1e30):
        inputs = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)) * size
        result = kernel.linear(inputs, kernel.pack(weight), layout_of(weight)).double()
        expected = inputs.double() @ exact(weight).T
        assert (result - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_native_computes_on_several_threads_as_on_one():
    weight = random_weight(512, 256, scheme(4, 64))
    inputs = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    packed, layout = native.KERNEL.pack(weight), layout_of(weight)
    alone = native.KERNEL.linear(inputs, packed, layout)
    torch.set_num_threads(2)
    try:
        assert torch.equal(native.KERNEL.linear(inputs, packed, layout), alone)
    finally:
        torch.set_num_threads(1)


@KERNELS
def test_calls_from_several_threads_at_once(kernel):
    weight = random_weight(64, 64, scheme(3, 32))
    packed, layout = kernel.pack(weight), layout_of(weight)
    inputs = [torch.randn(tokens, 64, generator=torch.Generator().manual_seed(tokens)) for tokens in range(1, 9)]
    expected = [kernel.linear(part, packed, layout) for part in inputs]
    wrong = []

    def work(number):
        for _ in range(50):
            if not torch.equal(kernel.linear(inputs[number], packed, layout), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_native_says_what_it_cannot_do():
    odd = layout_of(random_weight(16, 60, scheme(4, 12)))
    assert "groups of 12" in native.KERNEL.obstacle(CPU, odd)
    plain = layout_of(random_weight(16, 64, scheme(4)))
    assert "not on cuda" in native.KERNEL.obstacle(torch.device("cuda"), plain)
    conv = layout_of(random_weight(16, 64, scheme(4)), transposed=True)
    assert "rows are input features" in native.KERNEL.obstacle(CPU, conv)


def test_reference_multiplies_from_the_other_side():
    weight = random_weight(24, 64, scheme(4, 32))
    inputs = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    result = reference.KERNEL.linear(inputs, reference.KERNEL.pack(weight), layout_of(weight, transposed=True))
    torch.testing.assert_close(result.double(), inputs.double() @ exact(weight), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 16, 100, 128])
def test_dense_weights_of_sixteen_bits_are_exact(dtype, width):
    generator = torch.Generator().manual_seed(2)
    weight, inputs = torch.randn(37, width, generator=generator).to(dtype), torch.randn(3, width, generator=generator)
    expected = inputs.double() @ weight.double().T
    error = (native.dense_linear(inputs, weight).double() - expected).abs()
    assert (error <= 1e-6 * (inputs.double().abs() @ weight.double().abs().T)).all()
