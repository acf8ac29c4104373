"""Extended Hamming codes: every single wrong bit is corrected, every pair is detected, and the checks are Hamming's."""

from itertools import combinations

import pytest
import torch

from quantkit.core import secded
from quantkit.core.secded import CORRECTED, DETECTED, FINE


def words(data_bits, count=4):
    random = torch.Generator().manual_seed(data_bits)
    full = torch.randint(-(2**63), 2**63 - 1, (count,), generator=random)
    return full if data_bits == 64 else full & ((1 << data_bits) - 1)


def as_mask(bit):
    return (1 << bit) - ((1 << 64) if bit == 63 else 0)


def hit(word, check, bits, data_bits):
    """Flip the numbered bits of a code word: data first, checks behind."""
    for bit in bits:
        word, check = (word ^ as_mask(bit), check) if bit < data_bits else (word, check ^ (1 << (bit - data_bits)))
    return word, check


def by_definition(word, data_bits):
    """The check bits from the textbook: a parity over the places whose number has the check's bit."""
    size = {16: 21, 64: 71}[data_bits]
    free = [place for place in range(1, size + 1) if place & (place - 1)]
    value = {place: word >> bit & 1 for bit, place in enumerate(free)}
    checks = [sum(value[p] for p in free if p >> number & 1) % 2 for number in range(size.bit_length())]
    checks.append((sum(value.values()) + sum(checks)) % 2)
    return sum(bit << number for number, bit in enumerate(checks))


@pytest.mark.parametrize(("data_bits", "checks"), [(16, 6), (64, 8)])
def test_the_number_of_check_bits_is_that_of_memory_modules(data_bits, checks):
    assert secded.check_bits(data_bits) == checks


@pytest.mark.parametrize("data_bits", [16, 64])
def test_the_checks_are_those_of_the_textbook(data_bits):
    data = words(data_bits, 50)
    assert secded.encode(data, data_bits).tolist() == [by_definition(int(w), data_bits) for w in data]


@pytest.mark.parametrize("data_bits", [16, 64])
def test_what_is_whole_is_left_alone(data_bits):
    data = words(data_bits, 200)
    found, state = secded.correct(data, secded.encode(data, data_bits), data_bits)
    assert torch.equal(found, data)
    assert (state == FINE).all()


@pytest.mark.parametrize("data_bits", [16, 64])
def test_every_single_flip_is_corrected(data_bits):
    data = words(data_bits)
    for bit in range(data_bits + secded.check_bits(data_bits)):
        found, state = secded.correct(*hit(data, secded.encode(data, data_bits), [bit], data_bits), data_bits)
        assert torch.equal(found, data), bit
        assert (state == CORRECTED).all(), bit


@pytest.mark.parametrize("data_bits", [16, 64])
def test_every_pair_of_flips_is_detected(data_bits):
    data = words(data_bits, 2)
    checks = secded.encode(data, data_bits)
    pairs = list(combinations(range(data_bits + secded.check_bits(data_bits)), 2))
    hits = [hit(data, checks, pair, data_bits) for pair in pairs]
    damaged, guards = (torch.cat(part) for part in zip(*hits, strict=True))
    found, state = secded.correct(damaged, guards, data_bits)
    assert (state == DETECTED).all()
    assert torch.equal(found, damaged)
