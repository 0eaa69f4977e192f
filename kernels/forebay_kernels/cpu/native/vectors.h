// Sixteen lanes at a time, in the vector types that GCC and Clang lower to any instruction set.
// AVX-512 is named where the compilers do not find it: rounding to bf16, sums of products of bytes.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace forebay {

using F32 = float __attribute__((vector_size(64)));
using I32 = int32_t __attribute__((vector_size(64)));
using U32 = uint32_t __attribute__((vector_size(64)));
using U16 = uint16_t __attribute__((vector_size(32)));
using U8 = uint8_t __attribute__((vector_size(16)));

constexpr int LANES = 16;
constexpr U32 COUNTING = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

template <class V, class T>
INLINE V load(const T *from) {
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

template <class V, class T>
INLINE void store(T *to, V value) {
    std::memcpy(to, &value, sizeof value);
}

INLINE F32 splat(float value) { return F32{} + value; }

// bf16 is the upper half of a float: widening is exact, narrowing rounds to nearest even.
struct bf16 {
    uint16_t bits;
};

INLINE float widen(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE float widen(float x) { return x; }

INLINE U16 narrowed(F32 x) {
#if defined(__AVX512BF16__)
    return (U16)_mm512_cvtneps_pbh((__m512)x);
#else
    U32 bits = (U32)x;
    U32 even = (bits >> 16) & 1;
    U32 rounded = (bits + 0x7fff + even) >> 16;
    I32 nan = x != x;
    rounded = ((U32)~nan & rounded) | ((U32)nan & 0x7fc0u);
    return __builtin_convertvector(rounded, U16);
#endif
}

// Loads and stores of 16 elements as floats.
INLINE F32 read(const float *from) { return load<F32>(from); }
INLINE F32 read(const bf16 *from) {
    return (F32)(__builtin_convertvector(load<U16>(from), U32) << 16);
}
INLINE void write(float *to, F32 value) { store(to, value); }
INLINE void write(bf16 *to, F32 value) { store(to, narrowed(value)); }

// The same of the first `count` elements; the other lanes read as 0.
template <class T>
INLINE F32 read(const T *from, long count) {
    if (count >= LANES) return read(from);
    T part[LANES] = {};
    std::memcpy(part, from, size_t(count) * sizeof(T));
    return read(part);
}

template <class T>
INLINE void write(T *to, F32 value, long count) {
    if (count >= LANES) return write(to, value);
    T part[LANES];
    write(part, value);
    std::memcpy(to, part, size_t(count) * sizeof(T));
}

INLINE F32 select(I32 mask, F32 yes, F32 no) {
    return (F32)((mask & (I32)yes) | (~mask & (I32)no));
}

INLINE F32 maximum(F32 a, F32 b) { return select(a > b, a, b); }
INLINE F32 absolute(F32 x) { return maximum(x, -x); }

// To an integer, ties to even; of numbers below 2^22.
INLINE F32 whole(F32 x) { return (x + 12582912.0f) - 12582912.0f; }

// Always in the same order, so that a sum does not depend on who computes it.
INLINE float sum(F32 x) {
    float lane[LANES];
    store(lane, x);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lane[i] += lane[i + width];
    return lane[0];
}

INLINE float largest(F32 x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float lane[LANES];
    store(lane, x);
    float most = lane[0];
    for (float value : lane) most = value > most ? value : most;
    return most;
#endif
}

// e^x to about 2 units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].
// Coefficients: Taylor's to the seventh power. Below -87 the result is 0.
INLINE F32 exponential(F32 x) {
    I32 none = x < -87.0f;
    x = select(x > 88.0f, splat(88.0f), select(none, splat(-87.0f), x));
    F32 turns = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
    I32 n = (I32)turns - (I32)splat(12582912.0f);
    F32 whole = turns - 12582912.0f;
    F32 r = x - whole * 0.693359375f;
    r = r + whole * 2.12194440e-4f;
    F32 p = splat(1.0f / 5040.0f);
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    F32 result = (F32)((I32)p + (n << 23));
    return select(none, F32{}, result);
}

// By 1 - 2 / (e^2x + 1), which does not overflow into NaN.
INLINE F32 hyperbolic_tangent(F32 x) { return 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f); }

}  // namespace forebay
