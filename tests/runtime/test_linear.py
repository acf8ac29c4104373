"""`PackedLinear` and the 16-bit modules: what a transformers model expects of the modules whose place they take."""

import copy
import io
from dataclasses import replace

import pytest
import torch
from packed import exact, random_weight, scheme
from torch import nn

from quantkit.errors import QuantkitWarning, UsageError
from quantkit.runtime import linear
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


def test_inputs_that_do_not_fit_are_refused():
    module = PackedLinear(random_weight(16, 64, scheme(4, 32)))
    with pytest.raises(UsageError, match="64 input features, not 32"):
        module(torch.zeros(2, 32))
    with pytest.raises(UsageError, match="inputs are on meta but the packed weight is on cpu"):
        module(torch.zeros(2, 64, device="meta"))


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


def test_scales_of_float32_that_are_exact_in_sixteen_bits():
    weight = random_weight(16, 64, scheme(4, 32))
    module = PackedLinear(replace(weight, scale=weight.scale.float()))
    assert module.kernel is native.KERNEL
    assert torch.equal(module.unpack().scale, weight.scale)


def test_other_scales_of_float32_are_kept_and_torch_computes():
    linear._warn.cache_clear()
    weight = random_weight(16, 64, scheme(4, 32), dtype=torch.float32)
    with pytest.warns(QuantkitWarning, match="scales are not exact in 16 bits"):
        module = PackedLinear(weight)
    assert module.kernel is reference.KERNEL
    assert torch.equal(module.unpack().scale, weight.scale)


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
