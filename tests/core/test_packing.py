"""Packing against two independent implementations: compressed-tensors' own and a string of binary digits."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from quantkit.core.packing import pack, packed_words, unpack

BITS = range(2, 9)
WIDTHS = (1, 5, 31, 32, 33, 64, 97, 128, 384)


def random_codes(bits, width, rows=3):
    generator = torch.Generator().manual_seed(1000 * bits + width)
    half = 2 ** (bits - 1)
    return torch.randint(-half, half, (rows, width), generator=generator, dtype=torch.int8)


def words_of_digits(row, bits):
    """Write the codes as one binary number, the first code lowest, and cut it into words from the end."""
    digits = "".join(f"{code + 2 ** (bits - 1):0{bits}b}" for code in reversed(row))
    digits = digits.zfill(-(-len(digits) // 32) * 32)
    words = [int(digits[end - 32 : end], 2) for end in range(len(digits), 0, -32)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("bits", BITS)
def test_packed_words_are_those_of_the_digit_string(bits, width):
    codes = random_codes(bits, width)
    assert pack(codes, bits).tolist() == [words_of_digits(row, bits) for row in codes.tolist()]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("bits", BITS)
def test_packed_words_are_those_of_compressed_tensors(bits, width):
    codes = random_codes(bits, width)
    assert torch.equal(pack(codes, bits), pack_to_int32(codes, bits))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("bits", BITS)
def test_both_read_what_either_wrote(bits, width):
    codes = random_codes(bits, width)
    assert torch.equal(unpack(pack_to_int32(codes, bits), bits, width), codes)
    assert torch.equal(unpack_from_int32(pack(codes, bits), bits, codes.shape), codes)


@pytest.mark.parametrize("bits", BITS)
def test_every_code_survives(bits):
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.int8)[None]
    assert torch.equal(unpack(pack(codes, bits), bits, codes.shape[1]), codes)


@pytest.mark.parametrize("bits", BITS)
def test_the_last_word_is_padded_with_zero_bits(bits):
    largest = torch.full((1, 1), 2 ** (bits - 1) - 1, dtype=torch.int8)
    assert pack(largest, bits).tolist() == [[2**bits - 1]]


@pytest.mark.parametrize(
    ("count", "bits", "words"), [(32, 3, 3), (33, 3, 4), (8, 4, 1), (9, 4, 2), (1, 8, 1), (0, 5, 0)]
)
def test_number_of_words(count, bits, words):
    assert packed_words(count, bits) == words
