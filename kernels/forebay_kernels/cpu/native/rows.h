// What is done to each row or head by itself: norms, rotation, gates, the likeliest token.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "product.h"

namespace forebay {

// `body(row)`, shared only where it pays: waking a thread costs about as much as 20000 elements.
template <class Body>
void each_row(long rows, long width, Body &&body) {
    if (rows * width < (1 << 15)) {
        for (long row = 0; row < rows; row++) body(row);
        return;
    }
    long each = std::max(1L, (1L << 13) / width);
    shared(ceil_div(rows, each), [&](long part, int) {
        long end = std::min(rows, (part + 1) * each);
        for (long row = part * each; row < end; row++) body(row);
    });
}

template <class T>
INLINE float root_mean_square_inverse(const T *x, long width, float eps) {
    F32 total{};
    for (long k = 0; k < width; k += LANES) {
        F32 value = read(x + k, width - k);
        total += value * value;
    }
    return 1.0f / std::sqrt(sum(total) / float(width) + eps);
}

// out = x / rms(x) * weight.
template <class T>
INLINE void norm_row(const T *x, const float *weight, long width, float eps, T *out) {
    float scale = root_mean_square_inverse(x, width, eps);
    for (long k = 0; k < width; k += LANES)
        write(out + k, read(x + k, width - k) * scale * read(weight + k, width - k), width - k);
}

// As in forebay_kernels.cpu.library.
struct NormArgs {
    const void *x;        // [rows, width]
    const float *weight;  // [width]
    void *out;            // [rows, width]
    int64_t rows, width;
    float eps;
};

template <class T>
void norm(const NormArgs &a) {
    each_row(a.rows, a.width, [&](long row) {
        norm_row(static_cast<const T *>(a.x) + row * a.width, a.weight, a.width, a.eps,
                 static_cast<T *>(a.out) + row * a.width);
    });
}

// Rotates each pair (x[i], x[i + half]) of the first 2 * half elements, in place.
template <class T>
INLINE void rotate_row(T *x, const float *cosine, const float *sine, long half) {
    for (long k = 0; k < half; k += LANES) {
        long left = half - k;
        F32 c = read(cosine + k, left), s = read(sine + k, left);
        F32 a = read(x + k, left), b = read(x + half + k, left);
        write(x + k, a * c - b * s, left);
        write(x + half + k, b * c + a * s, left);
    }
}

// As in forebay_kernels.cpu.library. Strides are in elements.
struct QkvArgs {
    void *qkv;  // [tokens, heads + 2 kv_heads, dim]: norm and rotation happen in place
    int64_t stride;
    const float *norm;              // [heads + kv_heads, dim] or null
    const float *cosine, *sine;     // [tokens, half], or null
    void *keys, *values;            // [kv_heads, pages, block_size, dim]
    const int64_t *slots;           // [tokens]; negative: not stored
    int64_t tokens, heads, kv_heads, dim, half, cached;  // cached: pages * block_size
    float eps;
};

// Norm and rotation of queries and keys, then keys and values into the cache.
template <class T>
void prepare_qkv(const QkvArgs &a) {
    each_row(a.tokens, (a.heads + 2 * a.kv_heads) * a.dim, [&](long token) {
        T *row = static_cast<T *>(a.qkv) + token * a.stride;
        for (long head = 0; head < a.heads + a.kv_heads; head++) {
            T *x = row + head * a.dim;
            if (a.norm) norm_row(x, a.norm + head * a.dim, a.dim, a.eps, x);
            if (a.cosine) rotate_row(x, a.cosine + token * a.half, a.sine + token * a.half, a.half);
        }
        if (a.slots[token] < 0) return;
        for (long head = 0; head < a.kv_heads; head++) {
            long at = (head * a.cached + a.slots[token]) * a.dim;
            size_t bytes = size_t(a.dim) * sizeof(T);
            std::memcpy(static_cast<T *>(a.keys) + at, row + (a.heads + head) * a.dim, bytes);
            std::memcpy(static_cast<T *>(a.values) + at,
                        row + (a.heads + a.kv_heads + head) * a.dim, bytes);
        }
    });
}

// As in forebay_kernels.cpu.library.
struct ResidualArgs {
    void *stream;        // [rows, width]: x, to which is added
    const void *added;   // [rows, width]
    const float *inner;  // norm of what is added, or null
    const float *outer;  // norm of the result
    void *out;           // [rows, width]
    int64_t rows, width;
    float eps;
};

// x += norm(added) or added; out = norm(x).
template <class T>
void add_and_norm(const ResidualArgs &a) {
    each_row(a.rows, a.width, [&](long row) {
        T *x = static_cast<T *>(a.stream) + row * a.width;
        const T *added = static_cast<const T *>(a.added) + row * a.width;
        float scale = a.inner ? root_mean_square_inverse(added, a.width, a.eps) : 1.0f;
        for (long k = 0; k < a.width; k += LANES) {
            long left = a.width - k;
            F32 value = read(added + k, left);
            if (a.inner) value = value * scale * read(a.inner + k, left);
            write(x + k, read(x + k, left) + value, left);
        }
        norm_row(x, a.outer, a.width, a.eps, static_cast<T *>(a.out) + row * a.width);
    });
}

enum Gate : int32_t { SILU = 0, GELU_TANH = 1 };

INLINE F32 gated(F32 gate, F32 up, int kind) {
    if (kind == SILU) return gate / (1.0f + exponential(-gate)) * up;
    F32 inner = 0.7978845608f * (gate + 0.044715f * gate * gate * gate);
    return 0.5f * gate * (1.0f + hyperbolic_tangent(inner)) * up;
}

// As in forebay_kernels.cpu.library.
struct GateArgs {
    const void *x;  // [rows, 2 width]
    void *out;      // [rows, width]
    int64_t rows, width;
    int32_t kind;
};

template <class T>
void gate(const GateArgs &a) {
    each_row(a.rows, 2 * a.width, [&](long row) {
        const T *from = static_cast<const T *>(a.x) + row * 2 * a.width;
        T *to = static_cast<T *>(a.out) + row * a.width;
        for (long k = 0; k < a.width; k += LANES) {
            long left = a.width - k;
            write(to + k, gated(read(from + k, left), read(from + a.width + k, left), a.kind), left);
        }
    });
}

// The first of the largest elements of each row; NaN is never the largest.
template <class T>
void argmax(const T *x, long stride, long rows, long width, int64_t *found) {
    constexpr long PIECE = 1 << 14;
    long pieces = ceil_div(width, PIECE);
    std::vector<float> most(size_t(rows * pieces));
    shared(rows * pieces, [&](long part, int) {
        const T *from = x + part / pieces * stride;
        long end = std::min(width, (part % pieces + 1) * PIECE);
        F32 largest_of = splat(-std::numeric_limits<float>::infinity());
        long k = part % pieces * PIECE;
        for (; k + LANES <= end; k += LANES) largest_of = maximum(read(from + k), largest_of);
        float value = largest(largest_of);
        for (; k < end; k++) value = std::max(value, widen(from[k]));
        most[size_t(part)] = value;
    });
    for (long row = 0; row < rows; row++) {
        long best = 0;
        for (long piece = 1; piece < pieces; piece++)
            if (most[size_t(row * pieces + piece)] > most[size_t(row * pieces + best)]) best = piece;
        float value = most[size_t(row * pieces + best)];
        long k = best * PIECE, end = std::min(width, k + PIECE);
        while (k < end && widen(x[row * stride + k]) != value) k++;
        found[row] = k < end ? k : 0;
    }
}

}  // namespace forebay
