"""The kernels that `triton_gpu.py` starts; importing this imports Triton.

In all of them `first`, `second` and `third` are the planes, (out, words) each; those that a width does not have repeat
the first and are not read. `scale` and `zero` are (out, groups). Of code j of a word the bits of plane p move to the
left by `shifts[p, j]` (to the right if negative), are kept where `masks[p, j]` has ones, and belong to a float of the
exponent `exponents[j]`. `middle` is the zero code of symmetric schemes, None where `zero` is read. `even` means that
blocks fill rows without a rest.
"""

import triton
import triton.language as tl

ONE = tl.constexpr(0x3F800000)  # the bits of float32 1


@triton.jit
def _decoded(one, word, shifts: tl.constexpr, masks: tl.constexpr, exponents: tl.constexpr, code: tl.constexpr):
    """Return 2^exponent + code as float32, of the words that `_load` returned."""
    codes: tl.constexpr = len(exponents)
    value = one + (exponents[code] << 23)
    for plane in tl.static_range(len(shifts) // codes):
        bits = _moved(word[plane], shifts[plane * codes + code]) & masks[plane * codes + code]
        # the bits are disjoint; two kinds of "or", for a compiler that reorders one kind needs an instruction more
        value = value ^ bits if plane == 1 else value | bits
    return value.to(tl.float32, bitcast=True)


@triton.jit
def _moved(word, left: tl.constexpr):
    return word << left if left >= 0 else word >> -left


@triton.jit
def _load(first, second, third, where, planes: tl.constexpr):
    word = tl.load(first + where)
    other = word
    last = word
    if planes > 1:
        other = tl.load(second + where).to(tl.int32)
    if planes > 2:
        last = tl.load(third + where).to(tl.int32)
    return word, other, last


@triton.jit
def _zero(zero, where, middle: tl.constexpr):
    if middle is not None:
        return middle
    return tl.load(zero + where).to(tl.float32)


@triton.jit
def _folded(tile, vector: tl.constexpr):
    """Return the sums of `vector` neighbours on the last axis, which one thread holds."""
    shape: tl.constexpr = tile.shape
    return tl.sum(tl.reshape(tile, [shape[0], shape[1], shape[2], shape[3] // vector, vector]), 4)


@triton.jit
def multiply_add(
    one,
    x,
    first,
    second,
    third,
    scale,
    zero,
    y,
    tokens,
    out,
    width,
    words,
    groups,
    shifts: tl.constexpr,
    masks: tl.constexpr,
    exponents: tl.constexpr,
    middle: tl.constexpr,
    even: tl.constexpr,
    exact: tl.constexpr,
    lanes: tl.constexpr,
    spans_per_group: tl.constexpr,
    vector: tl.constexpr,
    block_tokens: tl.constexpr,
    block_rows: tl.constexpr,
    block_spans: tl.constexpr,
):
    """Write y = x Wᵀ, (tokens, out), for few tokens; a program computes `block_rows` outputs of all tokens.

    `one` is `ONE`: as a constant it would keep the assembler from joining "and" and "or" into one instruction. Every
    tensor has the axes (token, row, span, lane): the compiler then gives words and activations to the same threads.
    """
    program = tl.program_id(0) * block_rows
    row = tl.minimum(program + tl.arange(0, block_rows), out - 1)[None, :, None, None]
    token = tl.minimum(tl.arange(0, block_tokens), tokens - 1)[:, None, None, None]
    lane = tl.arange(0, lanes)[None, None, None, :]
    total = tl.zeros([block_tokens, block_rows, block_spans, lanes // vector], tl.float32)
    for start in range(0, words // lanes, block_spans):
        span = start + tl.arange(0, block_spans)[None, None, :, None]
        inside = span if even else tl.minimum(span, words // lanes - 1)
        where = tl.max_contiguous(row * words + inside * lanes + lane, [1, 1, 1, vector])
        word = _load(first, second, third, where, len(shifts) // len(exponents))
        group = row * groups + inside // spans_per_group
        step = tl.load(scale + group).to(tl.float32)
        zero_code = _zero(zero, group, middle)
        product = tl.zeros([block_tokens, block_rows, block_spans, lanes], tl.float32)
        plain = tl.zeros([block_tokens, 1, block_spans, lanes], tl.float32)
        excess = tl.zeros([block_tokens, 1, block_spans, lanes], tl.float32)
        for code in tl.static_range(len(exponents)):
            feature = span * (lanes * len(exponents)) + code * lanes + lane
            # no wider than the words, or the compiler would load with other threads and exchange
            at = tl.max_contiguous(x + token * width + feature, [1, 1, 1, vector])
            value = (tl.load(at) if even else tl.load(at, mask=feature < width, other=0.0)).to(tl.float32)
            weight = _decoded(one, word, shifts, masks, exponents, code)
            if exact:
                weight -= 1 << exponents[code]
            else:
                excess += value * (1 << exponents[code])
            product += weight * value
            plain += value
        total += step * (_folded(product, vector) - (_folded(excess, vector) + zero_code * _folded(plain, vector)))
    sums = tl.sum(tl.reshape(total, [block_tokens, block_rows, block_spans * (lanes // vector)]), 2)
    token = tl.arange(0, block_tokens)[:, None]
    row = program + tl.arange(0, block_rows)[None, :]
    tl.store(y + token * out + row, sums.to(y.dtype.element_ty), mask=(token < tokens) & (row < out))


@triton.jit
def tensor_cores(
    x,
    first,
    second,
    third,
    scale,
    zero,
    partial,
    tokens,
    out,
    width,
    words,
    groups,
    words_per_part,
    shifts: tl.constexpr,
    masks: tl.constexpr,
    exponents: tl.constexpr,
    middle: tl.constexpr,
    even: tl.constexpr,
    lanes: tl.constexpr,
    spans_per_group: tl.constexpr,
    block_tokens: tl.constexpr,
    block_rows: tl.constexpr,
    block_words: tl.constexpr,
    stages: tl.constexpr,
):
    """Write x Wᵀ of each part of the width, (parts, tokens, out); a program computes `block_rows` outputs of one part.

    Threads exchange words once, as they are, and decode where the tensor cores want the weights.
    """
    program = tl.program_id(0) * block_rows
    row = tl.minimum(program + tl.arange(0, block_rows), out - 1)[:, None]
    token = tl.minimum(tl.arange(0, block_tokens), tokens - 1)[None, :]
    total = tl.zeros([block_rows, block_tokens], tl.float32)
    begin = tl.program_id(1) * words_per_part
    for start in tl.range(begin, tl.minimum(begin + words_per_part, words), block_words, num_stages=stages):
        number = start + tl.arange(0, block_words)
        inside = number if even else tl.minimum(number, words - 1)
        word = _load(first, second, third, row * words + inside[None, :], len(shifts) // len(exponents))
        span = start // lanes + tl.arange(0, block_words // lanes)
        inside = span if even else tl.minimum(span, words // lanes - 1)
        group = row * groups + (inside // spans_per_group)[None, :]
        step = tl.load(scale + group).to(tl.float32)
        zero_code = _zero(zero, group, middle)
        feature = (number // lanes) * (lanes * len(exponents)) + number % lanes
        for code in tl.static_range(len(exponents)):
            at = (feature + code * lanes)[:, None]
            value = (
                tl.load(x + token * width + at) if even else tl.load(x + token * width + at, mask=at < width, other=0.0)
            )
            shift_down = _spread(-(zero_code + (1 << exponents[code])) * step, lanes)
            weight = _decoded(ONE, word, shifts, masks, exponents, code) * _spread(step, lanes) + shift_down
            total = tl.dot(weight.to(value.dtype), value, total)
    token = tl.arange(0, block_tokens)[None, :]
    row = program + tl.arange(0, block_rows)[:, None]
    tl.store(partial + (tl.program_id(1) * tokens + token) * out + row, total, mask=(token < tokens) & (row < out))


@triton.jit
def _spread(tile, lanes: tl.constexpr):
    """Return (rows, spans) as (rows, words)."""
    rows: tl.constexpr = tile.shape[0]
    spans: tl.constexpr = tile.shape[1]
    return tl.reshape(tl.broadcast_to(tile[:, :, None], [rows, spans, lanes]), [rows, spans * lanes])


@triton.jit
def add_parts(partial, y, parts, size, block: tl.constexpr):
    """Write the sum y of `partial`, (parts, size), always in the same order."""
    at = tl.program_id(0) * block + tl.arange(0, block)
    total = tl.zeros([block], tl.float32)
    for part in range(parts):
        total += tl.load(partial + part * size + at, mask=at < size, other=0.0)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=at < size)


@triton.jit
def dequantize(
    first,
    second,
    third,
    scale,
    zero,
    y,
    start,
    stop,
    width,
    words,
    groups,
    group_size,
    shifts: tl.constexpr,
    masks: tl.constexpr,
    exponents: tl.constexpr,
    middle: tl.constexpr,
    lanes: tl.constexpr,
    block_rows: tl.constexpr,
    block_words: tl.constexpr,
):
    """Write the weights of the rows from `start` to `stop`, y (stop - start, width); any group size."""
    row = start + tl.program_id(0) * block_rows + tl.arange(0, block_rows)[:, None]
    number = tl.program_id(1) * block_words + tl.arange(0, block_words)[None, :]
    here = (row < stop) & (number < words)
    where = tl.minimum(row, stop - 1) * words + tl.minimum(number, words - 1)
    word = _load(first, second, third, where, len(shifts) // len(exponents))
    feature = (number // lanes) * (lanes * len(exponents)) + number % lanes
    for code in tl.static_range(len(exponents)):
        at = feature + code * lanes
        valid = here & (at < width)
        group = tl.minimum(row, stop - 1) * groups + tl.minimum(at // group_size, groups - 1)
        step = tl.load(scale + group).to(tl.float32)
        zero_code = _zero(zero, group, middle)
        weight = _decoded(ONE, word, shifts, masks, exponents, code) - ((1 << exponents[code]) + zero_code)
        tl.store(y + (row - start) * width + at, (weight * step).to(y.dtype.element_ty), mask=valid)
