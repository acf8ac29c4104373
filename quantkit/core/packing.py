"""Dense bit packing: a row of N-bit codes becomes one little-endian bit stream in 32-bit words.

Code i occupies the bits iN … iN + N - 1 of the stream, low bits first, and may straddle two words; this is the layout
of compressed-tensors `pack-quantized` since 0.17 (for 2, 4 and 8 bits it always was).
"""

import torch
from jaxtyping import Int8, Int32
from torch import Tensor


def packed_words(count: int, bits: int) -> int:
    """Return how many 32-bit words `count` codes of `bits` bits take."""
    return -(-count * bits // 32)


def pack(codes: Int8[Tensor, "rows count"], bits: int) -> Int32[Tensor, "rows words"]:
    """Pack signed codes in [-2^(bits-1), 2^(bits-1) - 1] along the last axis, stored plus 2^(bits-1)."""
    return torch.cat([_pack(part, bits) for part in codes.split(_rows_at_once(codes.shape[1]))])


def unpack(packed: Int32[Tensor, "rows words"], bits: int, count: int) -> Int8[Tensor, "rows count"]:
    """Return the `count` signed codes of each row; the inverse of `pack`."""
    return torch.cat([_unpack(part, bits, count) for part in packed.split(_rows_at_once(count))])


def _rows_at_once(count: int) -> int:
    # the work is done in 64 bits: in pieces, or a large matrix would need dozens of times its packed size
    return max(1, 2**20 // max(1, count))


def _pack(codes: Int8[Tensor, "rows count"], bits: int) -> Int32[Tensor, "rows words"]:
    rows, count = codes.shape
    unsigned = codes.to(torch.int64) + 2 ** (bits - 1)
    # 32 codes fill exactly `bits` words, so every chunk of 32 has the same layout
    unsigned = torch.nn.functional.pad(unsigned, (0, -count % 32)).view(rows, -1, 32)
    start = torch.arange(32, device=codes.device) * bits
    shifted = unsigned << (start % 32)
    words = torch.zeros(rows, unsigned.shape[1], bits + 1, dtype=torch.int64, device=codes.device)
    word = (start // 32).expand_as(shifted)
    words.scatter_add_(2, word, shifted & 0xFFFFFFFF)
    words.scatter_add_(2, word + 1, shifted >> 32)  # the part that straddles into the next word, often zero
    # Every bit is set at most once, so the sums are the words; subtract 2^32 where int32 would overflow
    packed = words[..., :bits].reshape(rows, -1)[:, : packed_words(count, bits)]
    return torch.where(packed > 0x7FFFFFFF, packed - 0x100000000, packed).to(torch.int32)


def _unpack(packed: Int32[Tensor, "rows words"], bits: int, count: int) -> Int8[Tensor, "rows count"]:
    words = packed.to(torch.int64) & 0xFFFFFFFF
    words = torch.nn.functional.pad(words, (0, 1))  # so that the last code may look one word ahead
    start = torch.arange(count, device=packed.device) * bits
    word, shift = start // 32, start % 32
    pair = words[:, word] | (words[:, word + 1] << 32)
    # `>>` on int64 is arithmetic, and the mask removes the sign bits that it brings in
    codes = ((pair >> shift) & ((1 << bits) - 1)) - (1 << (bits - 1))
    return codes.to(torch.int8)
