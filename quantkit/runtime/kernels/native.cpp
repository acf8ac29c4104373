// Products of activations with a packed weight on CPUs, for codes of BITS bits (given by -DBITS=...).
//
// Written with the vector types of GCC and Clang, which become AVX2, AVX-512, NEON or plain code as -march tells.
// A lane is an output row: 16 rows are a panel, each lane sums for its own row, so nothing is summed across lanes, any
// group size costs the same, and the panel is read front to back once.
//
//   codes   int32 (panels, chunks, BITS, 16)   a chunk is 32 columns. Its BITS words of a row are planes of 8, 4, 2 and
//                                              1 bits, as BITS has in binary, widest first: a plane of P bits has P
//                                              words, a word the codes of 32 / P columns, the first in the low bits.
//                                              No code straddles two words. Codes are not negative: q + 2^(BITS-1).
//   scale   16 bits (panels, groups, 16)       bfloat16, or float16 where `half`
//   zero    uint8 (panels, groups, 16)         zero points + 2^(BITS-1); null: all are 2^(BITS-1)
//
//   y[row] = Σ_groups scale · (Σ code · x − zero · Σ x)

#include <cstdint>
#include <cstring>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

constexpr int LANES = 16, CHUNK = 32;
typedef float Float __attribute__((vector_size(64)));
typedef int32_t Int __attribute__((vector_size(64)));
typedef uint32_t Word __attribute__((vector_size(64)));
typedef uint16_t Half __attribute__((vector_size(32)));
typedef uint8_t Byte __attribute__((vector_size(16)));
#define INLINE inline __attribute__((always_inline))

template <typename T>
INLINE T load(const void* from) {
    T value;
    memcpy(&value, from, sizeof value);
    return value;
}

template <typename To, typename From>
INLINE To bits_of(From value) {
    To same;
    memcpy(&same, &value, sizeof same);
    return same;
}

INLINE Float from_half(Word wide, bool half) {
    if (!half) return bits_of<Float>(wide << 16);
    // float16 has 5 bits of exponent biased by 15; moved to float32's place they are biased by 127 after the product
    const Float magnitude = bits_of<Float>((wide & 0x7fff) << 13) * 0x1p112f;
    return bits_of<Float>(bits_of<Word>(magnitude) | (wide & 0x8000) << 16);
}

INLINE Float load_scale(const uint16_t* from, bool half) {
    return from_half(__builtin_convertvector(load<Half>(from), Word), half);
}

INLINE Float load_zero(const uint8_t* from) {
    return __builtin_convertvector(__builtin_convertvector(load<Byte>(from), Int), Float);
}

// The codes of column `column` of a chunk, as integers. `column` is a constant once the loops are unrolled, and so are
// the shifts.
INLINE Word code(const Word* words, int column) {
    Word value = {};
    int first = 0, above = BITS;
    for (int plane = 8; plane; plane /= 2) {
        if (!(BITS & plane)) continue;
        above -= plane;
        const int bit = column * plane;
        const Word part = (words[first + bit / 32] >> (bit % 32)) & ((1u << plane) - 1);
        value |= part << above;
        first += plane;
    }
    return value;
}

INLINE Float decoded(const Word* words, int column) {
#if defined(__AVX512F__) && (BITS == 4 || BITS == 2)
    // a table of 16 in one register: the permutation looks at four bits of the index, so no mask and no conversion
    const Float table = BITS == 4 ? Float{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
                                  : Float{0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
    const int bit = column * BITS;
    return __builtin_shuffle(table, bits_of<Int>(words[bit / 32] >> (bit % 32)));
#else
    return __builtin_convertvector(bits_of<Int>(code(words, column)), Float);
#endif
}

struct Weight {
    const uint32_t* codes;
    const uint16_t* scale;
    const uint8_t* zero;
    int64_t out, width, groups;
    bool half;

    int64_t chunks() const { return (width + CHUNK - 1) / CHUNK; }
    const uint32_t* panel_codes(int64_t panel) const { return codes + panel * chunks() * BITS * LANES; }
    const uint16_t* panel_scale(int64_t panel) const { return scale + panel * groups * LANES; }
    const uint8_t* panel_zero(int64_t panel) const { return zero + panel * groups * LANES; }
};

INLINE void store_rows(float* y, Float values, int64_t rows) {
    if (rows >= LANES) {
        memcpy(y, &values, sizeof values);
    } else {
        for (int64_t row = 0; row < rows; ++row) y[row] = values[row];
    }
}

// One panel times TOKENS vectors. STEP columns (8 or 32) share a group; x is padded with zeros to whole chunks, and
// `sums` (TOKENS, groups) are its sums over each group.
template <int STEP, int TOKENS>
void panel_times(const Weight& w, int64_t panel, const float* x, int64_t stride, const float* sums, float* y) {
    constexpr int CHAINS = TOKENS == 1 ? 4 : TOKENS == 2 ? 2 : 1;  // independent sums hide the latency of additions
    const uint32_t* codes = w.panel_codes(panel);
    const uint16_t* scale = w.panel_scale(panel);
    const uint8_t* zero = w.zero ? w.panel_zero(panel) : nullptr;
    const int64_t group_size = w.width / w.groups, padded = w.chunks() * CHUNK;
    Float total[TOKENS] = {}, sum[TOKENS][CHAINS] = {};
    int64_t group = 0, left = group_size;
    for (int64_t start = 0; start < padded; start += CHUNK, codes += BITS * LANES) {
        Word words[BITS];
        for (int i = 0; i < BITS; ++i) words[i] = load<Word>(codes + i * LANES);
#pragma GCC unroll 4
        for (int part = 0; part < CHUNK; part += STEP) {
#pragma GCC unroll 32
            for (int column = part; column < part + STEP; ++column) {
                const Float value = decoded(words, column);
#pragma GCC unroll 4
                for (int token = 0; token < TOKENS; ++token)
                    sum[token][column % CHAINS] += value * x[token * stride + start + column];
            }
            left -= STEP;
            if (left > 0 && !(group == w.groups - 1 && start + part + STEP == padded)) continue;
            const Float s = load_scale(scale + group * LANES, w.half);
            const Float z = zero ? load_zero(zero + group * LANES) : Float{} + float(1 << (BITS - 1));
            for (int token = 0; token < TOKENS; ++token) {
                Float all = sum[token][0];
                sum[token][0] = Float{};
                for (int chain = 1; chain < CHAINS; ++chain) all += sum[token][chain], sum[token][chain] = Float{};
                total[token] += s * (all - z * sums[token * w.groups + group]);
            }
            ++group;
            left = group_size;
            if (group == w.groups) goto done;  // what is left of the last chunk is padding
        }
    }
done:
    for (int token = 0; token < TOKENS; ++token)
        store_rows(y + token * w.out + panel * LANES, total[token], w.out - panel * LANES);
}

template <int STEP>
void panel_times_all(const Weight& w, int64_t panel, const float* x, int64_t tokens, const float* sums, float* y) {
    const int64_t stride = w.chunks() * CHUNK;
    while (tokens) {
        const int64_t now = tokens >= 4 ? 4 : tokens >= 2 ? 2 : 1;
        if (now == 4) panel_times<STEP, 4>(w, panel, x, stride, sums, y);
        else if (now == 2) panel_times<STEP, 2>(w, panel, x, stride, sums, y);
        else panel_times<STEP, 1>(w, panel, x, stride, sums, y);
        x += now * stride, sums += now * w.groups, y += now * w.out, tokens -= now;
    }
}

// Return Σ x over each group of each token: (tokens, groups).
std::vector<float> group_sums(const float* x, int64_t stride, int64_t tokens, int64_t groups, int64_t group_size) {
    std::vector<float> sums(tokens * groups);
    for (int64_t at = 0; at < tokens * groups; ++at) {
        const float* from = x + at / groups * stride + at % groups * group_size;
        Float lanes = {};
        int64_t column = 0;
        for (; column + LANES <= group_size; column += LANES) lanes += load<Float>(from + column);
        for (int lane = 0; lane < LANES; ++lane) sums[at] += lanes[lane];
        for (; column < group_size; ++column) sums[at] += from[column];
    }
    return sums;
}

// Rounds to bfloat16, to nearest and even.
INLINE Half to_bfloat16(Float value) {
    const Word word = bits_of<Word>(value);
    return __builtin_convertvector((word + 0x7fff + (word >> 16 & 1)) >> 16, Half);
}

}  // namespace

extern "C" {

// Set y (tokens, out) to x times the transposed weight. x (tokens, chunks · 32) has zeros behind `width`; `step` is 8 or
// 32 and divides the group size, or there is one group.
void quantkit_linear(const void* codes, const void* scale, const void* zero, int64_t out, int64_t width,
                     int64_t groups, int32_t half, int32_t step, const float* x, int64_t tokens, float* y,
                     int32_t threads) {
    const Weight w{static_cast<const uint32_t*>(codes), static_cast<const uint16_t*>(scale),
                   static_cast<const uint8_t*>(zero), out, width, groups, half != 0};
    const int64_t panels = (out + LANES - 1) / LANES;
    const std::vector<float> sums = group_sums(x, w.chunks() * CHUNK, tokens, groups, width / groups);
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t panel = 0; panel < panels; ++panel) {
        if (step == 32) panel_times_all<32>(w, panel, x, tokens, sums.data(), y);
        else panel_times_all<8>(w, panel, x, tokens, sums.data(), y);
    }
}

// Write the panels [first, last), dequantized and transposed, to `dense` (width, (last - first) · 16): float32, or bfloat16
// if `narrow`.
void quantkit_dequantize(const void* codes, const void* scale, const void* zero, int64_t out, int64_t width,
                         int64_t groups, int32_t half, int64_t first, int64_t last, void* dense, int32_t narrow,
                         int32_t threads) {
    const Weight w{static_cast<const uint32_t*>(codes), static_cast<const uint16_t*>(scale),
                   static_cast<const uint8_t*>(zero), out, width, groups, half != 0};
    const int64_t columns = (last - first) * LANES, group_size = width / groups;
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t panel = first; panel < last; ++panel) {
        const uint32_t* words = w.panel_codes(panel);
        Float s{}, z{};
        for (int64_t start = 0; start < width; start += CHUNK, words += BITS * LANES) {
            Word chunk[BITS];
            for (int i = 0; i < BITS; ++i) chunk[i] = load<Word>(words + i * LANES);
#pragma GCC unroll 32
            for (int column = 0; column < CHUNK; ++column) {
                if (start + column >= width) break;
                if ((start + column) % group_size == 0) {
                    const int64_t at = (start + column) / group_size * LANES;
                    s = load_scale(w.panel_scale(panel) + at, w.half);
                    z = w.zero ? load_zero(w.panel_zero(panel) + at) : Float{} + float(1 << (BITS - 1));
                }
                const Float value = (decoded(chunk, column) - z) * s;
                const int64_t to = (start + column) * columns + (panel - first) * LANES;
                if (narrow) {
                    const Half rounded = to_bfloat16(value);
                    memcpy(static_cast<uint16_t*>(dense) + to, &rounded, sizeof rounded);
                } else {
                    memcpy(static_cast<float*>(dense) + to, &value, sizeof value);
                }
            }
        }
    }
}

// Set y (tokens, out) to x (tokens, width) times the transposed weight (out, width) of bfloat16, or float16 if `half`.
void quantkit_dense(const uint16_t* weight, int64_t out, int64_t width, int32_t half, const float* x, int64_t tokens,
                    float* y, int32_t threads) {
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < out; ++row) {
        const uint16_t* values = weight + row * width;
        for (int64_t token = 0; token < tokens; ++token) {
            const float* from = x + token * width;
            Float sum[4] = {};
            int64_t column = 0;
            for (; column + 4 * LANES <= width; column += 4 * LANES)
#pragma GCC unroll 4
                for (int chain = 0; chain < 4; ++chain)
                    sum[chain] += load_scale(values + column + chain * LANES, half) *
                                  load<Float>(from + column + chain * LANES);
            for (; column + LANES <= width; column += LANES)
                sum[0] += load_scale(values + column, half) * load<Float>(from + column);
            const Float all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
            float result = 0;
            for (int lane = 0; lane < LANES; ++lane) result += all[lane];
            for (; column < width; ++column) {
                const Word wide = Word{} + values[column];
                result += from_half(wide, half)[0] * from[column];
            }
            y[token * out + row] = result;
        }
    }
}
}
