"""Random packed weights, and what a product with them is in float64."""

import torch

from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import QuantScheme
from quantkit.runtime.kernel import Layout


def random_weight(out, width, scheme, *, dtype=torch.float16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = scheme.groups(width)

    def codes(*shape):
        values = torch.randint(scheme.smallest_code, scheme.largest_code + 1, shape, generator=generator)
        return values.to(torch.int8)

    return QuantizedTensor(
        codes=codes(out, width),
        scale=(torch.rand(out, groups, generator=generator) * 0.1 + 0.01).to(dtype),
        zero_point=None if scheme.symmetric else codes(out, groups),
        scheme=scheme,
    )


def layout_of(weight, *, transposed=False):
    out, width = weight.codes.shape
    return Layout(out=out, width=width, scheme=weight.scheme, transposed=transposed)


def exact(weight):
    """Return the weight in float64: (codes - zero point) * scale, never rounded."""
    size = weight.codes.shape[1] // weight.scale.shape[1]
    steps = weight.codes.double()
    if weight.zero_point is not None:
        steps -= weight.zero_point.double().repeat_interleave(size, dim=1)
    return steps * weight.scale.double().repeat_interleave(size, dim=1)


def bits_held(packed):
    return 8 * sum(tensor.numel() * tensor.element_size() for tensor in packed.values())


def scheme(bits, group_size=None, *, symmetric=False):
    return QuantScheme(bits=bits, group_size=group_size, symmetric=symmetric)
