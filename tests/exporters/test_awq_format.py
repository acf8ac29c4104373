"""AWQ checkpoints against an unpacker that reads nibble by nibble what the format's definition says."""

import itertools

import numpy as np
import pytest
import torch

from quantkit.core.affine import round_to_nearest
from quantkit.core.scheme import QuantScheme
from quantkit.errors import ModelError, UsageError
from quantkit.exporters.awq import AWQFormat, scheme_of

SHAPE = (24, 64)
SCHEMES = [QuantScheme.parse(text) for text in ("w4g16", "w4g32s", "w4", "w4s")]
EVERY = pytest.mark.parametrize("scheme", SCHEMES, ids=str)
COLUMN_OF_NIBBLE = {0: 0, 1: 2, 2: 4, 3: 6, 4: 1, 5: 3, 6: 5, 7: 7}


def tensor_of(scheme, dtype=torch.float16):
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)) + 0.3
    return round_to_nearest(weight, scheme, dtype)


def nibbles(words):
    """Return the unsigned numbers (rows, 8 words) of AWQ's words (rows, words), one at a time."""
    found = np.zeros((words.shape[0], words.shape[1] * 8))
    for row, word, nibble in itertools.product(range(words.shape[0]), range(words.shape[1]), range(8)):
        found[row, word * 8 + COLUMN_OF_NIBBLE[nibble]] = ((int(words[row, word]) & 0xFFFFFFFF) >> (4 * nibble)) & 15
    return found


def dense(tensors):
    """Return the float64 weight (out, in) of AWQ's tensors."""
    scales, codes = tensors["scales"].double().numpy(), nibbles(tensors["qweight"].numpy())
    size = len(codes) // len(scales)
    spread = [np.repeat(values, size, axis=0) for values in (nibbles(tensors["qzeros"].numpy()), scales)]
    return torch.from_numpy(((codes - spread[0]) * spread[1]).T)


@EVERY
def test_another_unpacker_reads_the_same_weights(scheme):
    tensor = tensor_of(scheme)
    assert torch.equal(dense(AWQFormat().encode(tensor)).to(torch.float16), tensor.dequantize())


@EVERY
def test_it_decodes_to_what_was_encoded(scheme):
    tensor = tensor_of(scheme, torch.bfloat16)
    config = AWQFormat().config({"a": scheme}, ["Linear"], ["lm_head"])
    decoded = AWQFormat.of(config).decode(AWQFormat().encode(tensor), scheme)
    assert decoded.scheme == scheme
    assert torch.equal(decoded.codes, tensor.codes)
    assert torch.equal(decoded.dequantize(), tensor.dequantize())


def test_symmetric_weights_get_the_zero_point_in_the_middle():
    tensors = AWQFormat().encode(tensor_of(QuantScheme.parse("w4g16s")))
    assert set(tensors["qzeros"].flatten().tolist()) == {0x88888888 - 2**32}


def test_the_configuration_names_scheme_and_dense_linears():
    config = AWQFormat().config({"a": QuantScheme.parse("w4g16s")}, ["Linear"], ["model.layers.1.q_proj", "lm_head"])
    assert scheme_of(config, "model.layers.0.q_proj") == QuantScheme.parse("w4g16")
    assert scheme_of(config, "model.layers.1.q_proj") is None
    assert scheme_of({"w_bit": 4, "q_group_size": -1}, "a") == QuantScheme.parse("w4")


@pytest.mark.parametrize(
    ("schemes", "reason"),
    [(["w3g32"], "AWQ holds 4 bits, not 3"), (["w4g32s", "w4g16s"], "one scheme, not w4a16g32s and w4a16g16s")],
)
def test_what_it_cannot_hold_is_refused(schemes, reason):
    with pytest.raises(UsageError, match=reason):
        AWQFormat().check({text: QuantScheme.parse(text) for text in schemes})


def test_rows_that_leave_a_word_unfilled_are_refused():
    with pytest.raises(UsageError, match="20 is no multiple of eight"):
        AWQFormat().layout((20, 64), QuantScheme(bits=4), "F16")


@pytest.mark.parametrize("version", ["gemv", "marlin"])
def test_other_layouts_are_not_read(version):
    with pytest.raises(ModelError, match=f"the AWQ layout '{version}' is not read"):
        AWQFormat.of({"version": version})


@pytest.mark.parametrize(
    ("end", "change", "reason"),
    [
        ("qweight", lambda t: t[:-1], "cannot be w4a16g16"),
        ("qweight", lambda t: t.flatten(), "missing or no matrix"),
        ("qzeros", lambda t: t[:, :-1], "qzeros of a packed linear is"),
        ("qzeros", lambda t: t.float(), "qzeros of a packed linear is torch.float32"),
    ],
)
def test_damage_is_named(end, change, reason):
    tensor = tensor_of(QuantScheme.parse("w4g16"))
    tensors = AWQFormat().encode(tensor)
    with pytest.raises(ModelError, match=reason):
        AWQFormat().decode(tensors | {end: change(tensors[end])}, tensor.scheme)


def test_a_configuration_that_is_none_is_named():
    with pytest.raises(ModelError, match="describes no AWQ checkpoint"):
        scheme_of({"bits": "four"}, "a")


@pytest.mark.parametrize(("text", "count"), [("w4g128", 1), ("w4a8", 2)])
def test_what_runtimes_will_not_do_is_told(text, count):
    assert len(list(AWQFormat().notices({"a": QuantScheme.parse(text)}, ["Linear"]))) == count
