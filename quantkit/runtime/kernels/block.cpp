// One token through a Llama block: norm, products, rotary embedding, attention and gate in two calls, so that only the
// cache's own update is left between them. All values are float32.
//
//   x = RMSNorm(h)    q, k, v = x Wqᵀ, x Wkᵀ, x Wvᵀ    q and k are rotated    (then the cache takes k and v)
//   h += softmax(q Kᵀ · scaling) V Woᵀ    x = RMSNorm(h)    h += (silu(x Wgᵀ) ⊙ x Wuᵀ) Wdᵀ

#include "native.cpp"

namespace {

struct Block {  // kernels/compiler.py has the same fields; a bias is null where there is none
    const Weight *qkv, *o, *gate_up, *down;  // three, one, two, one
    const float *qkv_bias, *o_bias, *gate_up_bias, *down_bias, *norm_before, *norm_after;
    const float *o_bound, *down_bound;  // of what reaches o and down, null where there is none
    int64_t width, heads, key_heads, size, inner;
    int64_t o_bound_step, o_bound_drops, down_bound_step, down_bound_drops;  // a step of 0: one threshold for all
    double epsilon, scaling;

    int64_t qkv_size() const { return (heads + 2 * key_heads) * size; }
};

// e to the power of x, as 2^n · 2^f with a polynomial for |f| <= 1/2; relative error below 3e-7.
INLINE Float exponential(Float x) {
    const Float t = x * 1.44269504f, magic = Float{} + 0x1.8p23f;
    const Float clipped = t < -126 ? Float{} - 126 : t > 127 ? Float{} + 127 : t;
    const Float whole = (clipped + magic) - magic, f = clipped - whole;
    Float power = Float{} + 1.5403530e-4f;  // Taylor's coefficients of 2^f: ln(2)^i / i!
    for (const float factor : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 0.24022651f, 0.69314718f, 1.0f})
        power = power * f + factor;
    return power * bits_of<Float>((__builtin_convertvector(whole, Int) + 127) << 23);
}

INLINE float sum_of(Float values) {
    float sum = 0;
    for (int lane = 0; lane < LANES; ++lane) sum += values[lane];
    return sum;
}

// Sizes are multiples of LANES everywhere below.
INLINE float dot(const float* a, const float* b, int64_t size) {
    Float sum[2] = {};
    int64_t i = 0;
    for (; i + 2 * LANES <= size; i += 2 * LANES) {
        sum[0] += load<Float>(a + i) * load<Float>(b + i);
        sum[1] += load<Float>(a + i + LANES) * load<Float>(b + i + LANES);
    }
    for (; i < size; i += LANES) sum[0] += load<Float>(a + i) * load<Float>(b + i);
    return sum_of(sum[0] + sum[1]);
}

std::vector<float> normed(const float* x, const float* weight, const Block& b) {
    const float factor = 1 / std::sqrt(dot(x, x, b.width) / static_cast<float>(b.width) + static_cast<float>(b.epsilon));
    std::vector<float> result(b.width);
    for (int64_t i = 0; i < b.width; ++i) result[i] = x[i] * factor * weight[i];
    return result;
}

void add(float* to, const float* values, int64_t size) {
    if (values)
        for (int64_t i = 0; i < size; ++i) to[i] += values[i];
}

// Keep x within its thresholds, as resilience/bounds.py does: NaN and infinities become 0.
void bound(float* x, int64_t size, const float* threshold, int64_t step, bool drops) {
    for (int64_t i = 0; threshold && i < size; ++i) {
        const float t = threshold[i * step], v = x[i] - x[i] == 0 ? x[i] : 0, low = v < -t ? -t : v;
        x[i] = drops ? (std::fabs(v) <= t ? v : 0) : low > t ? t : low;
    }
}

// Rotate the pairs (i, i + size / 2) of one head.
void rotate(float* head, const float* cosine, const float* sine, int64_t size) {
    for (int64_t i = 0; i < size / 2; ++i) {
        const float first = head[i], second = head[i + size / 2];
        head[i] = first * cosine[i] - second * sine[i];
        head[i + size / 2] = second * cosine[i + size / 2] + first * sine[i + size / 2];
    }
}

// Attend with one head to `tokens` keys and values (tokens, size).
void attend(const float* query, const float* keys, const float* values, int64_t tokens, int64_t size, float scaling,
            float* result) {
    const int64_t padded = (tokens + LANES - 1) / LANES * LANES;
    std::vector<float> weights(padded, -INFINITY);
    float largest = -INFINITY, total = 0;
    for (int64_t token = 0; token < tokens; ++token) {
        weights[token] = dot(query, keys + token * size, size) * scaling;
        largest = weights[token] > largest ? weights[token] : largest;
    }
    for (int64_t i = 0; i < padded; i += LANES) {
        const Float weight = exponential(load<Float>(&weights[i]) - largest);
        memcpy(&weights[i], &weight, sizeof weight);
    }
    for (int64_t token = 0; token < tokens; ++token) total += weights[token];
    for (int64_t i = 0; i < size; i += LANES) {
        Float sum = {};
        for (int64_t token = 0; token < tokens; ++token) sum += load<Float>(values + token * size + i) * weights[token];
        sum /= Float{} + total;
        memcpy(result + i, &sum, sizeof sum);
    }
}

}  // namespace

extern "C" {

// Set `qkv` (heads + 2 key heads, size) for the token `hidden` (width) at the position whose cosines and sines are given.
void quantkit_block_inputs(const Block* block, const float* hidden, const float* cosine, const float* sine, float* qkv,
                           int64_t threads) {
    const Block& b = *block;
    const std::vector<float> x = normed(hidden, b.norm_before, b);
    quantkit_linear(b.qkv, 3, CHUNK, x.data(), 1, qkv, threads);
    add(qkv, b.qkv_bias, b.qkv_size());
    for (int64_t head = 0; head < b.heads + b.key_heads; ++head) rotate(qkv + head * b.size, cosine, sine, b.size);
}

// Set `result` (width) to what the block makes of `hidden`, whose queries are `query` (heads, size); the cache gave `keys`
// and `values` (key heads, tokens, size).
void quantkit_block_outputs(const Block* block, const float* hidden, const float* query, const float* keys,
                            const float* values, int64_t tokens, float* result, int64_t threads) {
    const Block& b = *block;
    std::vector<float> attended(b.heads * b.size), gates(2 * b.inner), down(b.width);
    (void)threads;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && b.heads * tokens * b.size > SERIAL)
    for (int64_t head = 0; head < b.heads; ++head) {
        const int64_t shared = head / (b.heads / b.key_heads) * tokens * b.size;
        attend(query + head * b.size, keys + shared, values + shared, tokens, b.size, static_cast<float>(b.scaling),
               &attended[head * b.size]);
    }
    bound(attended.data(), b.heads * b.size, b.o_bound, b.o_bound_step, b.o_bound_drops);
    quantkit_linear(b.o, 1, CHUNK, attended.data(), 1, result, threads);
    add(result, b.o_bias, b.width);
    add(result, hidden, b.width);
    const std::vector<float> x = normed(result, b.norm_after, b);
    quantkit_linear(b.gate_up, 2, CHUNK, x.data(), 1, gates.data(), threads);
    add(gates.data(), b.gate_up_bias, 2 * b.inner);
    for (int64_t i = 0; i < b.inner; i += LANES) {
        const Float gate = load<Float>(&gates[i]), up = load<Float>(&gates[b.inner + i]);
        const Float value = gate / (1 + exponential(-gate)) * up;
        memcpy(&gates[i], &value, sizeof value);
    }
    bound(gates.data(), b.inner, b.down_bound, b.down_bound_step, b.down_bound_drops);
    quantkit_linear(b.down, 1, CHUNK, gates.data(), 1, down.data(), threads);
    add(down.data(), b.down_bias, b.width);
    add(result, down.data(), b.width);
}
}
