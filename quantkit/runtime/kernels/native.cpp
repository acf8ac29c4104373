// Products of activations with a packed weight on CPUs, for codes of BITS bits (given by -DBITS=...).
//
// Written with the vector types of GCC and Clang, which become AVX2, AVX-512, NEON or plain code as -march tells.
// A lane is an output row: 16 rows are a panel, each lane sums for its own row, so nothing is summed across lanes, any
// group size costs the same, and the panel is read front to back once.
//
//   codes   int32 (panels, chunks, BITS, 16)   a chunk is 32 columns, which are eight quads of four. The BITS words of a
//                                              row are planes of 8, 4, 2 and 1 bits, as BITS has in binary, widest
//                                              first: a plane of P bits has P words, and a word has 8 / P quads. Column
//                                              c of a quad is in byte c of its word, the first quad in the low bits of
//                                              each byte. Codes are not negative: q + 2^(BITS-1).
//   scale   16 bits (panels, groups, 16)       bfloat16, or float16 where `half`
//   zero    uint8 (panels, groups, 16)         zero points + 2^(BITS-1); null: all are 2^(BITS-1)
//
//   y[row] = Σ_groups scale · (Σ code · x − zero · Σ x)
//
// Where the processor multiplies bytes (AVX-512 VNNI, AVX2), x is rounded to 16 bits of fixed point, one step for each
// chunk of 32 values, and a product is two products of bytes; it is wrong by at most 1 / 65000 of the largest value of
// the chunk, less than a product in bfloat16. Elsewhere, and where groups are no whole chunks, it is float32.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16, CHUNK = 32;
constexpr int64_t SERIAL = 1 << 16;  // products that one thread has done before a second one has begun
constexpr int64_t AHEAD = 4096;  // bytes: a page, at whose end processors stop to read ahead by themselves
typedef float Float __attribute__((vector_size(64)));
typedef int32_t Int __attribute__((vector_size(64)));
typedef uint32_t Word __attribute__((vector_size(64)));
typedef uint16_t Half __attribute__((vector_size(32)));
typedef uint8_t Byte __attribute__((vector_size(16)));
typedef int8_t Bytes __attribute__((vector_size(16)));
#define INLINE inline __attribute__((always_inline))

// Ask for what a stream of reads will come to.
INLINE void will_read(const void* now) { __builtin_prefetch(static_cast<const char*>(now) + AHEAD); }

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

// Four codes of each lane, a byte each. `quad` is a constant once the loops are unrolled, and so are the shifts.
INLINE Word quad_codes(const Word* words, int quad) {
    Word value = {};
    int first = 0, above = BITS;
    for (int plane = 8; plane; plane /= 2) {
        if (!(BITS & plane)) continue;
        above -= plane;
        const int quads = 8 / plane, shift = quad % quads * plane - above;
        const Word word = words[first + quad / quads];
        const uint32_t mask = ((1u << plane) - 1) << above;
        value |= (shift < 0 ? word << -shift : word >> shift) & (mask * 0x01010101u);
        first += plane;
    }
    return value;
}

// The codes of one column.
INLINE Float decoded(const Word* words, int column) {
#if defined(__AVX512F__) && (BITS == 4 || BITS == 2)
    // a table of 16 in one register: the permutation looks at four bits of the index, so no mask and no conversion
    const Float table = BITS == 4 ? Float{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
                                  : Float{0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
    const int quads = 8 / BITS, quad = column / 4;
    return __builtin_shuffle(table, bits_of<Int>(words[quad / quads] >> (column % 4 * 8 + quad % quads * BITS)));
#else
    return __builtin_convertvector(bits_of<Int>(quad_codes(words, column / 4) >> (column % 4 * 8) & 0xff), Float);
#endif
}

#if defined(__AVX512VNNI__)
#define BYTE_PRODUCTS 1
// Add the products of four unsigned and four signed bytes of each lane.
INLINE Int add_products(Int sum, Word codes, int32_t x) {
    return Int(_mm512_dpbusd_epi32(__m512i(sum), __m512i(codes), _mm512_set1_epi32(x)));
}
#elif defined(__AVX2__) && BITS < 8  // sums of two products of 8-bit codes would not fit into 16 bits
#define BYTE_PRODUCTS 1
INLINE Int add_products(Int sum, Word codes, int32_t x) {
    __m256i half[2], total[2];
    memcpy(half, &codes, sizeof half);
    memcpy(total, &sum, sizeof total);
    for (int i = 0; i < 2; ++i) {
        const __m256i pairs = _mm256_maddubs_epi16(half[i], _mm256_set1_epi32(x));
        total[i] = _mm256_add_epi32(total[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    memcpy(&sum, total, sizeof sum);
    return sum;
}
#else
#define BYTE_PRODUCTS 0
#endif

struct Weight {  // kernels/compiler.py has the same fields
    const uint32_t* codes;
    const uint16_t* scale;
    const uint8_t* zero;
    int64_t out, width, groups, half;

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
void panel_times(const Weight& w, int64_t panel, const float* x, int64_t stride, const float* sums, float* y,
                 int64_t y_stride) {
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
        store_rows(y + token * y_stride + panel * LANES, total[token], w.out - panel * LANES);
}

template <int STEP>
void panel_times_all(const Weight& w, int64_t panel, const float* x, int64_t tokens, const float* sums, float* y,
                     int64_t y_stride) {
    const int64_t stride = w.chunks() * CHUNK;
    while (tokens) {
        const int64_t now = tokens >= 4 ? 4 : tokens >= 2 ? 2 : 1;
        if (now == 4) panel_times<STEP, 4>(w, panel, x, stride, sums, y, y_stride);
        else if (now == 2) panel_times<STEP, 2>(w, panel, x, stride, sums, y, y_stride);
        else panel_times<STEP, 1>(w, panel, x, stride, sums, y, y_stride);
        x += now * stride, sums += now * w.groups, y += now * y_stride, tokens -= now;
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

#if BYTE_PRODUCTS

// Vectors in 16 bits of fixed point: x ≈ (256 high + low) step, with one step a chunk.
struct Fixed {
    std::vector<int8_t> high, low;   // (tokens, chunks · 32)
    std::vector<float> step, sums;   // (tokens, chunks), (tokens, groups)
    int64_t chunks, groups;

    Fixed(const float* x, int64_t tokens, const Weight& w)
        : high(tokens * w.chunks() * CHUNK), low(high.size()), step(tokens * w.chunks()), sums(tokens * w.groups),
          chunks(w.chunks()), groups(w.groups) {
        const int64_t chunks_of_group = groups == 1 ? chunks : w.width / groups / CHUNK;
        for (int64_t chunk = 0; chunk < tokens * chunks; ++chunk) {
            const int64_t token = chunk / chunks, group = chunk % chunks / chunks_of_group;
            sums[token * groups + group] += set(chunk, x + chunk * CHUNK);
        }
    }

    // Set one chunk; return the sum of what its values became. With a value that is no finite number, all are NaN.
    float set(int64_t chunk, const float* x) {
        const Float values[2] = {load<Float>(x), load<Float>(x + LANES)};
        const Float sizes[2] = {bits_of<Float>(bits_of<Word>(values[0]) & 0x7fffffff),
                                bits_of<Float>(bits_of<Word>(values[1]) & 0x7fffffff)};
        const Float larger = sizes[0] > sizes[1] ? sizes[0] : sizes[1], poison = (sizes[0] + sizes[1]) * 0;
        float largest = 0, poisoned = 0;
        for (int lane = 0; lane < LANES; ++lane) {
            largest = larger[lane] > largest ? larger[lane] : largest;
            poisoned += poison[lane];
        }
        step[chunk] = poisoned != 0 ? NAN : largest / 32512;  // 127 · 256: the high byte has no room for more
        if (!(step[chunk] > 0)) return step[chunk];
        const Float magic = Float{} + 0x1.8p23f;  // adding it rounds to an integer, in the low bits of the sum
        Int sum = {};
        for (int half = 0; half < 2; ++half) {
            const Int value = bits_of<Int>(values[half] / step[chunk] + magic) - bits_of<Int>(magic);
            const Bytes below = __builtin_convertvector(value, Bytes);
            const Bytes above = __builtin_convertvector((value - __builtin_convertvector(below, Int)) >> 8, Bytes);
            memcpy(&low[chunk * CHUNK + half * LANES], &below, sizeof below);
            memcpy(&high[chunk * CHUNK + half * LANES], &above, sizeof above);
            sum += value;
        }
        int32_t total = 0;
        for (int lane = 0; lane < LANES; ++lane) total += sum[lane];
        return step[chunk] * static_cast<float>(total);
    }
};

// As `panel_times`, with x in fixed point and groups that are whole chunks.
template <int TOKENS>
void panel_times_fixed(const Weight& w, int64_t panel, const Fixed& x, int64_t first, float* y, int64_t y_stride) {
    const uint32_t* codes = w.panel_codes(panel);
    const uint16_t* scale = w.panel_scale(panel);
    const uint8_t* zero = w.zero ? w.panel_zero(panel) : nullptr;
    const int64_t chunks_of_group = w.groups == 1 ? x.chunks : w.width / w.groups / CHUNK;
    const int8_t *high = &x.high[first * x.chunks * CHUNK], *low = &x.low[first * x.chunks * CHUNK];
    const float *steps = &x.step[first * x.chunks], *sums = &x.sums[first * x.groups];
    Float total[TOKENS] = {};
    for (int64_t group = 0, chunk = 0; group < w.groups; ++group) {
        Float sum[TOKENS] = {};
        for (const int64_t end = chunk + chunks_of_group; chunk < end; ++chunk, codes += BITS * LANES) {
            Word words[BITS];
            for (int i = 0; i < BITS; ++i) words[i] = load<Word>(codes + i * LANES);
            for (int i = 0; i < BITS; ++i) will_read(codes + i * LANES);
            Int highs[TOKENS][2] = {}, lows[TOKENS][2] = {};  // two each: an addition waits for the one before
#pragma GCC unroll 8
            for (int quad = 0; quad < 8; ++quad) {
                const Word value = quad_codes(words, quad);
#pragma GCC unroll 4
                for (int token = 0; token < TOKENS; ++token) {
                    const int64_t at = (token * x.chunks + chunk) * CHUNK + quad * 4;
                    highs[token][quad % 2] = add_products(highs[token][quad % 2], value, load<int32_t>(high + at));
                    lows[token][quad % 2] = add_products(lows[token][quad % 2], value, load<int32_t>(low + at));
                }
            }
            for (int token = 0; token < TOKENS; ++token) {
                const Int both = ((highs[token][0] + highs[token][1]) << 8) + (lows[token][0] + lows[token][1]);
                sum[token] += __builtin_convertvector(both, Float) * steps[token * x.chunks + chunk];
            }
        }
        const Float s = load_scale(scale + group * LANES, w.half);
        const Float z = zero ? load_zero(zero + group * LANES) : Float{} + float(1 << (BITS - 1));
        for (int token = 0; token < TOKENS; ++token)
            total[token] += s * (sum[token] - z * sums[token * w.groups + group]);
    }
    for (int token = 0; token < TOKENS; ++token)
        store_rows(y + token * y_stride + panel * LANES, total[token], w.out - panel * LANES);
}

void panel_times_fixed_all(const Weight& w, int64_t panel, const Fixed& x, int64_t tokens, float* y,
                           int64_t y_stride) {
    for (int64_t first = 0; first < tokens;) {
        const int64_t now = tokens - first >= 4 ? 4 : tokens - first >= 2 ? 2 : 1;
        if (now == 4) panel_times_fixed<4>(w, panel, x, first, y + first * y_stride, y_stride);
        else if (now == 2) panel_times_fixed<2>(w, panel, x, first, y + first * y_stride, y_stride);
        else panel_times_fixed<1>(w, panel, x, first, y + first * y_stride, y_stride);
        first += now;
    }
}

#endif

// Rounds to bfloat16, to nearest and even.
INLINE Half to_bfloat16(Float value) {
    const Word word = bits_of<Word>(value);
    return __builtin_convertvector((word + 0x7fff + (word >> 16 & 1)) >> 16, Half);
}

}  // namespace

extern "C" {

// Whether x is rounded to fixed point and bytes are multiplied.
int32_t quantkit_multiplies_bytes() { return BYTE_PRODUCTS; }

// Set y (tokens, Σ out) to x times the `count` transposed weights, side by side, which have the same width and groups. x
// (tokens, chunks · 32) has zeros behind the width; `step` is 8 or 32 and divides the group size, or there is one group.
void quantkit_linear(const Weight* weights, int64_t count, int64_t step, const float* x, int64_t tokens, float* y,
                     int64_t threads) {
    const Weight& w = weights[0];
    std::vector<std::pair<int64_t, int64_t>> panels;  // weight, panel
    std::vector<float*> to(count);
    int64_t all = 0;
    for (int64_t i = 0; i < count; ++i) {
        to[i] = y + all;
        all += weights[i].out;
        for (int64_t panel = 0; panel * LANES < weights[i].out; ++panel) panels.emplace_back(i, panel);
    }
    const int64_t tasks = panels.size();
    if (tasks * LANES * w.width * tokens < SERIAL) threads = 1;
#if BYTE_PRODUCTS
    if (step == CHUNK) {
        const Fixed fixed(x, tokens, w);
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads) if (threads > 1)
        for (int64_t task = 0; task < tasks; ++task) {
            const auto [i, panel] = panels[task];
            panel_times_fixed_all(weights[i], panel, fixed, tokens, to[i], all);
        }
        return;
    }
#endif
    const std::vector<float> sums = group_sums(x, w.chunks() * CHUNK, tokens, w.groups, w.width / w.groups);
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < tasks; ++task) {
        const auto [i, panel] = panels[task];
        if (step == CHUNK) panel_times_all<CHUNK>(weights[i], panel, x, tokens, sums.data(), to[i], all);
        else panel_times_all<8>(weights[i], panel, x, tokens, sums.data(), to[i], all);
    }
}

// Write the panels [first, last), dequantized and transposed, to `dense` (width, (last - first) · 16): float32, or
// bfloat16 if `narrow`.
void quantkit_dequantize(const Weight* weight, int64_t first, int64_t last, void* dense, int64_t narrow,
                         int64_t threads) {
    const Weight& w = *weight;
    const int64_t columns = (last - first) * LANES, group_size = w.width / w.groups;
    (void)threads;
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads) if (threads > 1)
    for (int64_t panel = first; panel < last; ++panel) {
        const uint32_t* words = w.panel_codes(panel);
        Float s{}, z{};
        for (int64_t start = 0; start < w.width; start += CHUNK, words += BITS * LANES) {
            Word chunk[BITS];
            for (int i = 0; i < BITS; ++i) chunk[i] = load<Word>(words + i * LANES);
#pragma GCC unroll 32
            for (int column = 0; column < CHUNK; ++column) {
                if (start + column >= w.width) break;
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
void quantkit_dense(const uint16_t* weight, int64_t out, int64_t width, int64_t half, const float* x, int64_t tokens,
                    float* y, int64_t threads) {
    (void)threads;
#pragma omp parallel for schedule(dynamic, 64) num_threads(threads) if (threads > 1 && out * width > SERIAL)
    for (int64_t row = 0; row < out; ++row) {
        const uint16_t* values = weight + row * width;
        for (int64_t token = 0; token < tokens; ++token) {
            const float* from = x + token * width;
            Float sum[4] = {};
            int64_t column = 0;
            for (; column + 4 * LANES <= width; column += 4 * LANES) {
                will_read(values + column);
                will_read(values + column + 2 * LANES);
#pragma GCC unroll 4
                for (int chain = 0; chain < 4; ++chain)
                    sum[chain] += load_scale(values + column + chain * LANES, half) *
                                  load<Float>(from + column + chain * LANES);
            }
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
