"""What a quantized tensor stands for, computed in float64 and rounded once."""

import pytest
import torch

from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import QuantScheme

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def random_tensor(bits, symmetric, dtype, groups=4):
    generator = torch.Generator().manual_seed(bits)
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (16, 64), generator=generator, dtype=torch.int8)
    zero = torch.randint(-half, half, (16, groups), generator=generator, dtype=torch.int8)
    scale = (torch.rand(16, groups, generator=generator) + 1e-3).to(dtype)
    scheme = QuantScheme(bits=bits, group_size=64 // groups, symmetric=symmetric)
    return QuantizedTensor(codes=codes, scale=scale, zero_point=None if symmetric else zero, scheme=scheme)


@DTYPES
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_dequantized_is_the_exact_product_rounded_once(bits, symmetric, dtype):
    tensor = random_tensor(bits, symmetric, dtype)
    zero = 0 if symmetric else tensor.zero_point.double().repeat_interleave(16, dim=1)
    exact = (tensor.codes.double() - zero) * tensor.scale.double().repeat_interleave(16, dim=1)
    dense = tensor.dequantize()
    assert dense.dtype == dtype
    assert torch.equal(dense, exact.to(dtype))


def test_dequantizing_changes_nothing():
    tensor = random_tensor(4, False, torch.float16)
    before = [part.clone() for part in (tensor.codes, tensor.scale, tensor.zero_point)]
    tensor.dequantize()
    assert all(map(torch.equal, before, (tensor.codes, tensor.scale, tensor.zero_point)))


@pytest.mark.parametrize("symmetric", [False, True], ids=["missing", "superfluous"])
def test_a_zero_point_belongs_to_asymmetric_schemes_alone(symmetric):
    tensor = random_tensor(4, not symmetric, torch.float16)
    with pytest.raises(ValueError, match="zero_point is"):
        QuantizedTensor(
            codes=tensor.codes,
            scale=tensor.scale,
            zero_point=tensor.zero_point,
            scheme=QuantScheme(symmetric=symmetric),
        )


def test_groups_must_divide_the_width():
    tensor = random_tensor(4, True, torch.float16)
    with pytest.raises(ValueError, match="3 groups do not divide 64"):
        QuantizedTensor(codes=tensor.codes, scale=tensor.scale[:, :3], zero_point=None, scheme=tensor.scheme)
