"""GPTQ checkpoints against an unpacker that reads bit by bit what the format's definition says."""

import itertools

import numpy as np
import pytest
import torch

from quantkit.core.affine import round_to_nearest
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import QuantScheme
from quantkit.errors import ModelError, UsageError
from quantkit.exporters.gptq import GPTQFormat, column_order, scheme_of

OUT, WIDTH = 32, 64
SCHEMES = [
    QuantScheme(bits=bits, group_size=size, symmetric=symmetric)
    for bits, size, symmetric in itertools.product((2, 3, 4, 8), (None, 16), (False, True))
]
EVERY = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


def tensor_of(scheme, dtype=torch.float16):
    """Return random codes and zero points that use the whole range, but for the smallest zero point."""
    generator = torch.Generator().manual_seed(scheme.bits)
    groups = scheme.groups(WIDTH)
    low, high = scheme.smallest_code, scheme.largest_code + 1
    codes = torch.randint(low, high, (OUT, WIDTH), generator=generator).to(torch.int8)
    zero = torch.randint(low + 1, high, (OUT, groups), generator=generator).to(torch.int8)
    scale = (torch.rand(OUT, groups, generator=generator) + 0.1).to(dtype)
    return QuantizedTensor(codes=codes, scale=scale, zero_point=None if scheme.symmetric else zero, scheme=scheme)


def value_at(words, start, bits):
    """Return the number whose bits begin at `start` of a stream of 32-bit words, low bits first."""
    number = 0
    for position in range(bits):
        word = int(words[(start + position) // 32]) & 0xFFFFFFFF
        number |= ((word >> ((start + position) % 32)) & 1) << position
    return number


def dense(tensors, bits, add_to_zero):
    """Return the float64 weight (out, in) of GPTQ's tensors, one weight at a time."""
    qweight, qzeros, g_idx = (tensors[end].numpy() for end in ("qweight", "qzeros", "g_idx"))
    scales = tensors["scales"].double().numpy()
    out, width = qweight.shape[1], len(g_idx)
    weight = np.zeros((out, width))
    for row, column in itertools.product(range(out), range(width)):
        group = g_idx[column]
        zero = value_at(qzeros[group], row * bits, bits) + add_to_zero
        weight[row, column] = scales[group, row] * (value_at(qweight[:, row], column * bits, bits) - zero)
    return torch.from_numpy(weight)


def exact(tensor):
    """Return the float64 weight of our own tensor, before any rounding."""
    zero = 0 if tensor.zero_point is None else tensor.zero_point.double().unsqueeze(-1)
    steps = tensor.codes.double().unflatten(1, (tensor.scale.shape[1], -1)) - zero
    return (steps * tensor.scale.double().unsqueeze(-1)).flatten(1)


@EVERY
@pytest.mark.parametrize("version", [1, 2])
def test_another_unpacker_reads_the_same_weights(scheme, version):
    tensor, exporter = tensor_of(scheme), GPTQFormat(version=version)
    found = dense(exporter.encode(tensor), scheme.bits, add_to_zero=2 - version)
    assert torch.equal(found, exact(tensor))


@EVERY
@pytest.mark.parametrize("version", [1, 2])
def test_the_version_in_the_configuration_says_how_to_decode(scheme, version):
    tensor, exporter = tensor_of(scheme, torch.bfloat16), GPTQFormat(version=version)
    config = exporter.config({"a": scheme}, ["Linear"], ["lm_head"])
    assert config["checkpoint_format"] == ("gptq", "gptq_v2")[version - 1]
    decoded = GPTQFormat.of(config).decode(exporter.encode(tensor), scheme_of(config, "a"))
    assert decoded.scheme == scheme
    assert torch.equal(decoded.codes, tensor.codes)
    assert torch.equal(decoded.scale, tensor.scale)
    assert scheme.symmetric or torch.equal(decoded.zero_point, tensor.zero_point)


def test_symmetric_weights_are_written_as_every_runtime_reads_them():
    scheme = QuantScheme(bits=4, group_size=16, symmetric=True)
    tensors = GPTQFormat().encode(tensor_of(scheme))
    assert set(tensors["qzeros"].flatten().tolist()) == {0x77777777}
    assert GPTQFormat().config({"a": scheme}, [], [])["checkpoint_format"] == "gptq"


def test_asymmetric_weights_are_version_2_unless_asked_otherwise():
    schemes = {"a": QuantScheme(bits=2, group_size=16)}
    assert GPTQFormat().config(schemes, [], [])["checkpoint_format"] == "gptq_v2"
    assert GPTQFormat(version=1).config(schemes, [], [])["checkpoint_format"] == "gptq"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_version_1_refuses_the_zero_point_that_it_has_no_word_for(bits):
    tensor = tensor_of(QuantScheme(bits=bits, group_size=16))
    tensor.zero_point[3, 1] = tensor.scheme.smallest_code
    with pytest.raises(UsageError, match="one here is the smallest; write version 2"):
        GPTQFormat(version=1).encode(tensor)
    assert torch.equal(dense(GPTQFormat().encode(tensor), bits, add_to_zero=0), exact(tensor))


def test_a_zero_point_that_wrapped_in_version_1_is_not_guessed():
    tensor = tensor_of(QuantScheme(bits=4, group_size=16))
    tensors = GPTQFormat(version=2).encode(tensor)
    tensors["qzeros"][0, 0] = -1
    with pytest.raises(ModelError, match="zero point of version 1 is out of range"):
        GPTQFormat(version=1).decode(tensors, tensor.scheme)


def test_columns_in_the_order_of_activations():
    """Quantize permuted columns, store them where they were, and give the inputs in the order that decoding names."""
    generator = torch.Generator().manual_seed(1)
    scheme, order = QuantScheme(bits=4, group_size=16), torch.randperm(WIDTH, generator=generator)
    sorted_ = round_to_nearest(torch.randn(OUT, WIDTH, generator=generator), scheme, torch.float16)
    tensors = GPTQFormat().encode(sorted_)
    back = torch.argsort(order)
    scattered = QuantizedTensor(
        codes=sorted_.codes[:, back], scale=sorted_.scale, zero_point=sorted_.zero_point, scheme=scheme
    )
    stored = GPTQFormat().encode(scattered) | {"g_idx": tensors["g_idx"][back]}
    inputs = torch.randn(3, WIDTH, generator=generator, dtype=torch.float64)
    expected = inputs @ dense(stored, 4, add_to_zero=0).T
    decoded, columns = GPTQFormat().decode(stored, scheme), column_order(stored["g_idx"], 4)
    torch.testing.assert_close(inputs[:, columns] @ exact(decoded).T, expected)
    torch.testing.assert_close(inputs[:, order] @ exact(sorted_).T, expected)


def test_columns_in_sequence_need_no_order():
    assert column_order(None, 4) is None
    assert column_order(torch.arange(WIDTH, dtype=torch.int32) // 16, 4) is None
    assert column_order(torch.zeros(WIDTH, dtype=torch.int32), 1) is None


@pytest.mark.parametrize("wrong", [[0, 0, 0, 1], [0, 0, 2, 2], [0, 1, -1, 0]], ids=str)
def test_groups_of_unequal_size_are_damage(wrong):
    with pytest.raises(ModelError, match="does not divide 4 features into 2 equal groups"):
        column_order(torch.tensor(wrong), 2)


def test_zero_points_that_a_symmetric_checkpoint_should_not_have_are_kept():
    tensor = tensor_of(QuantScheme(bits=4, group_size=16))
    claimed = QuantScheme(bits=4, group_size=16, symmetric=True)
    decoded = GPTQFormat().decode(GPTQFormat(version=1).encode(tensor), claimed)
    assert not decoded.scheme.symmetric
    assert torch.equal(decoded.zero_point, tensor.zero_point)


@pytest.mark.parametrize(
    ("schemes", "reason"),
    [
        (["w5g32"], "GPTQ holds 2, 3, 4 or 8 bits, not 5"),
        (["w4g32s", "w8g32s"], "one scheme, not w4a16g32s and w8a16g32s"),
    ],
)
def test_what_it_cannot_hold_is_refused(schemes, reason):
    with pytest.raises(UsageError, match=reason):
        GPTQFormat().check({text: QuantScheme.parse(text) for text in schemes})


@pytest.mark.parametrize(("shape", "bits"), [((32, 44), 3), ((30, 64), 4)])
def test_shapes_that_leave_a_word_unfilled_are_refused(shape, bits):
    with pytest.raises(UsageError, match=r"features of \d bits do not fill"):
        GPTQFormat().layout(shape, QuantScheme(bits=bits), "F16")


def test_a_version_is_1_or_2():
    with pytest.raises(UsageError, match="1 or 2, not 3"):
        GPTQFormat(version=3)


@pytest.mark.parametrize(
    ("end", "change", "reason"),
    [
        ("qweight", lambda t: t[:-1], "cannot be w4a16g16"),
        ("qweight", lambda t: t.flatten(), "missing or holds no 4-bit codes"),
        ("qzeros", lambda t: t[:-1], "qzeros of a packed linear is torch.int32"),
        ("scales", lambda t: t.to(torch.int32), "scales of a packed linear is torch.int32"),
        ("g_idx", lambda t: t[:-1], "g_idx of a packed linear is"),
        ("scales", None, "scales of a packed linear is missing"),
        ("qweight", None, "qweight of a packed linear is missing"),
    ],
)
def test_damage_is_named(end, change, reason):
    tensor = tensor_of(QuantScheme(bits=4, group_size=16))
    tensors = GPTQFormat().encode(tensor)
    tensors[end] = change(tensors[end]) if change else None
    with pytest.raises(ModelError, match=reason):
        GPTQFormat().decode({key: value for key, value in tensors.items() if value is not None}, tensor.scheme)


def test_a_checkpoint_without_groups_of_columns_is_read():
    tensor = tensor_of(QuantScheme(bits=4, group_size=16))
    tensors = GPTQFormat().encode(tensor)
    del tensors["g_idx"]
    assert torch.equal(GPTQFormat().decode(tensors, tensor.scheme).codes, tensor.codes)


def test_linears_that_others_left_dense_or_gave_other_bits():
    config = {"bits": 4, "group_size": 128, "sym": True, "dynamic": {r"-:.*\.q_proj": {}, r"+:.*\.1\.": {"bits": 8}}}
    assert scheme_of(config, "model.layers.1.q_proj") is None
    assert scheme_of(config, "model.layers.1.k_proj") == QuantScheme.parse("w8g128s")
    assert scheme_of(config, "model.layers.0.k_proj") == QuantScheme.parse("w4g128s")
    assert scheme_of({"bits": 3, "group_size": -1, "sym": False}, "a") == QuantScheme.parse("w3")


@pytest.mark.parametrize("config", [{}, {"bits": "x", "group_size": 32}, {"bits": 9, "group_size": 32}], ids=str)
def test_a_configuration_that_is_none_is_named(config):
    with pytest.raises(ModelError, match="describes no GPTQ checkpoint"):
        scheme_of(config, "a")


def test_what_stays_dense_is_left_out_by_name():
    scheme = QuantScheme(bits=4, group_size=16, symmetric=True)
    config = GPTQFormat().config({"a": scheme}, ["Linear"], ["model.layers.0.q_proj", "lm_head"])
    assert scheme_of(config, "model.layers.0.q_proj") is None
    assert scheme_of(config, "model.layers.0.q_projector") == scheme


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("w4g128s", ["transformers"]),
        ("w8g128s", ["transformers"]),
        ("w3g128s", ["symmetric 4- and 8-bit GPTQ only, not these symmetric 3-bit", "transformers"]),
        ("w4g128", ["not these asymmetric 4-bit", "transformers"]),
        ("w4a8s", ["transformers", "nothing of activations"]),
    ],
)
def test_what_runtimes_will_not_do_is_told(text, words):
    found = list(GPTQFormat().notices({"a": QuantScheme.parse(text)}, ["Linear"]))
    assert len(found) == len(words)
    assert all(word in line for word, line in zip(words, found, strict=True))
