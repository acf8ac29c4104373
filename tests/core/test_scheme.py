import pytest

from quantkit.core.scheme import QuantScheme, group_sizes
from quantkit.errors import UsageError

NAMED = {
    "w4a16g128": QuantScheme(bits=4, group_size=128),
    "w3a16": QuantScheme(bits=3),
    "w8a16g32s": QuantScheme(bits=8, group_size=32, symmetric=True),
    "w2a16s": QuantScheme(bits=2, symmetric=True),
    "w4a4": QuantScheme(bits=4, activation_bits=4),
    "w4a8g128": QuantScheme(bits=4, group_size=128, activation_bits=8),
    "w8as8s": QuantScheme(bits=8, symmetric=True, activation_bits=8, activation_symmetric=True),
    "w6a6s": QuantScheme(bits=6, symmetric=True, activation_bits=6),
    "w4a8kv4g128s": QuantScheme(bits=4, group_size=128, symmetric=True, activation_bits=8, kv_bits=4),
    "w3as16kv8": QuantScheme(bits=3, activation_symmetric=True, kv_bits=8),
}


@pytest.mark.parametrize(("text", "scheme"), NAMED.items(), ids=NAMED)
def test_text_and_scheme_stand_for_each_other(text, scheme):
    assert QuantScheme.parse(text) == scheme
    assert str(scheme) == text


@pytest.mark.parametrize(
    ("short", "full"), [("w4", "w4a16"), ("W3G64", "w3a16g64"), ("w8s", "w8a16s"), ("W4KV4", "w4a16kv4")]
)
def test_a_scheme_may_be_abbreviated(short, full):
    assert QuantScheme.parse(short) == QuantScheme.parse(full)


@pytest.mark.parametrize("text", ["", "4", "w4a", "w4kv", "w4g128a8", "w4g", "int4", "w4g128x", "w-4"])
def test_text_that_names_no_scheme(text):
    with pytest.raises(UsageError, match=r"is no scheme \(.*w4a16g128.*\)$"):
        QuantScheme.parse(text)


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16])
def test_bits_out_of_range(bits):
    with pytest.raises(UsageError, match=f"^bits must be 2 to 8, not {bits}$"):
        QuantScheme(bits=bits)


@pytest.mark.parametrize("bits", [-4, 0, 1, 9, 15, 17])
def test_bits_of_activations_out_of_range(bits):
    with pytest.raises(UsageError, match=f"^activation bits must be 2 to 8, or 16 for none, not {bits}$"):
        QuantScheme(activation_bits=bits)
    with pytest.raises(UsageError, match=f"^kv bits must be 2 to 8, or 16 for none, not {bits}$"):
        QuantScheme(kv_bits=bits)


def test_symmetry_of_activations_that_are_not_quantized():
    with pytest.raises(UsageError, match=r"^no activations are quantized, so none are symmetric; give their bits too"):
        QuantScheme(activation_symmetric=True)


@pytest.mark.parametrize(
    ("text", "quantizes", "keys"), [("w4", False, 16), ("w4a8", True, 8), ("w4a8kv4", True, 4), ("w4kv3", True, 3)]
)
def test_keys_and_values_have_the_bits_of_activations_unless_they_have_their_own(text, quantizes, keys):
    scheme = QuantScheme.parse(text)
    assert (scheme.quantizes_activations, scheme.key_value_bits) == (quantizes, keys)


@pytest.mark.parametrize("size", [0, -1, -128])
def test_group_size_out_of_range(size):
    with pytest.raises(UsageError, match=f"the group size must be positive, not {size}"):
        QuantScheme(group_size=size)


@pytest.mark.parametrize(
    ("bits", "smallest", "largest"), [(2, -2, 1), (3, -4, 3), (4, -8, 7), (5, -16, 15), (8, -128, 127)]
)
def test_codes_are_the_signed_integers_of_that_many_bits(bits, smallest, largest):
    scheme = QuantScheme(bits=bits)
    assert (scheme.smallest_code, scheme.largest_code) == (smallest, largest)
    assert scheme.levels == largest - smallest


@pytest.mark.parametrize(("size", "groups"), [(None, 1), (96, 1), (32, 3), (1, 96)])
def test_groups_of_a_row(size, groups):
    assert QuantScheme(group_size=size).groups(96) == groups


def test_a_group_size_that_does_not_divide_names_the_width_and_sizes_that_do():
    with pytest.raises(UsageError) as caught:
        QuantScheme(group_size=128).groups(96)
    assert str(caught.value) == "group size 128 does not divide the width 96; sizes that do: 16, 32"


@pytest.mark.parametrize("width", [48, 96, 384, 4096, 9, 22, 13])
def test_suggested_sizes_divide(width):
    sizes = group_sizes(width)
    assert sizes
    assert all(width % size == 0 for size in sizes)


# sizes of llama-7b's paper table (arXiv 2308.13137, A15): 4.16, 3.15, 2.14 and 2.28 bits
@pytest.mark.parametrize(
    ("text", "bits"), [("w4g128", 4.15625), ("w3g128", 3.1484375), ("w2g128", 2.140625), ("w2g64", 2.28125)]
)
def test_bits_per_weight_are_the_papers(text, bits):
    assert QuantScheme.parse(text).bits_per_weight(4096) == bits


def test_activations_cost_no_stored_bits():
    assert QuantScheme.parse("w4a4kv4g128").bits_per_weight(4096) == QuantScheme.parse("w4g128").bits_per_weight(4096)


def test_bits_per_weight_of_symmetric_rows_count_the_scale_alone():
    assert QuantScheme(bits=4, symmetric=True).bits_per_weight(64) == 4 + 16 / 64
