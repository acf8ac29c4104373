"""`PackedLinear` and the 16-bit modules: what a transformers model expects of the modules whose place they take."""

import copy
import io

import pytest
import torch
from packed import exact, random_weight, scheme
from torch import nn

from quantkit.runtime.kernels import native, reference
from quantkit.runtime.linear import HalfEmbedding, HalfLinear, PackedLinear, narrow_modules

GENERATOR = torch.Generator().manual_seed(3)


def test_it_computes_what_a_dense_linear_does():
    weight, bias = random_weight(40, 64, scheme(4, 32)), torch.randn(40, generator=GENERATOR)
    dense = nn.Linear(64, 40)
    dense.weight.data, dense.bias.data = exact(weight).float(), bias
    inputs = torch.randn(2, 3, 64, generator=GENERATOR)
    module = PackedLinear(weight, bias)
    assert module.kernel is native.KERNEL
    result = module(inputs)
    assert result.shape == (2, 3, 40)
    assert (result - dense(inputs)).abs().max() < 1e-4 * result.std()
    torch.testing.assert_close(module(inputs.transpose(0, 1)), result.transpose(0, 1))
    assert module(inputs[:, :0]).shape == (2, 0, 40)


def test_columns_in_another_order():
    weight, order = random_weight(16, 64, scheme(4, 32)), torch.randperm(64, generator=GENERATOR)
    shuffled = torch.empty(16, 64, dtype=torch.float64)
    shuffled[:, order] = exact(weight)
    inputs = torch.randn(2, 64, generator=GENERATOR)
    result = PackedLinear(weight, order=order)(inputs)
    assert (result - inputs.double() @ shuffled.T).abs().max() < 1e-4 * result.std()


def test_a_weight_stored_by_input_features():
    weight = random_weight(64, 32, scheme(4, 32))
    module = PackedLinear(weight, torch.ones(32), transposed=True)
    assert (module.in_features, module.out_features) == (64, 32)
    inputs = torch.randn(2, 64, generator=GENERATOR)
    torch.testing.assert_close(module(inputs).double(), inputs.double() @ exact(weight) + 1, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float32])
def test_its_dtype_is_that_of_the_bias_alone(dtype):
    module = PackedLinear(random_weight(16, 64, scheme(4, 32)), torch.ones(16))
    before = module.packed
    module.to(dtype)
    assert module.bias.dtype == dtype
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.packed.items())
    assert {name: tensor.dtype for name, tensor in module.packed.items()} == {n: t.dtype for n, t in before.items()}


def test_copies_and_state_dicts():
    module = PackedLinear(random_weight(16, 64, scheme(3, 32)), torch.ones(16))
    other = PackedLinear(random_weight(16, 64, scheme(3, 32), seed=9), torch.zeros(16))
    inputs = torch.randn(2, 64, generator=GENERATOR)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    assert not torch.equal(other(inputs), module(inputs))
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(inputs), module(inputs))
    assert torch.equal(copy.deepcopy(module)(inputs), module(inputs))


@pytest.mark.parametrize("exactly", [True, False])
def test_scales_of_float32(exactly):
    """They become 16 bits where they can; else torch computes with them as they are."""
    weight = random_weight(16, 64, scheme(4, 32))
    wide = torch.rand(16, 2, generator=GENERATOR)
    weight = random_weight(16, 64, scheme(4, 32), dtype=torch.float32) if not exactly else weight
    module = PackedLinear(weight if not exactly else _with_scale(weight, weight.scale.float()))
    assert module.kernel is (native.KERNEL if exactly else reference.KERNEL)
    assert torch.equal(module.unpack().scale.float(), weight.scale.float())
    assert wide.dtype == torch.float32


def _with_scale(weight, scale):
    return type(weight)(codes=weight.codes, scale=scale, zero_point=weight.zero_point, scheme=weight.scheme)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_half_linear_is_exact(dtype, tokens):
    dense = nn.Linear(48, 30).to(dtype)
    inputs = torch.randn(1, tokens, 48, generator=GENERATOR)
    result = HalfLinear(dense)(inputs)
    torch.testing.assert_close(result, dense.float()(inputs), rtol=1e-5, atol=1e-5)


def test_a_half_linear_of_other_activations():
    module = HalfLinear(nn.Linear(48, 30, dtype=torch.bfloat16))
    assert module(torch.randn(2, 48, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert module.to(torch.float32)(torch.randn(2, 48)).dtype == torch.float32


def test_a_half_embedding_is_exact():
    dense = nn.Embedding(20, 8, dtype=torch.bfloat16)
    tokens = torch.tensor([[3, 19], [0, 3]])
    result = HalfEmbedding(dense)(tokens)
    assert result.dtype == torch.float32
    assert torch.equal(result, dense(tokens).float())


def test_only_plain_classes_become_half():
    class Scaled(nn.Embedding):
        pass

    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Embedding(4, 4), "c": Scaled(4, 4), "d": nn.LayerNorm(4)})
    assert narrow_modules(model).keys() == {"a", "b"}
