// Linear layers over bytes or nibbles, with inputs rounded to bytes while they are read.
//
// A weight is (q - zero) * scale or codebook[q] * scale, with a scale of each column and group of
// GROUP inner positions. A group of each input row is rounded to int8 by a scale of its own, the
// products of a group are summed up exactly, in integers, and the groups are added in their order
// in float. So an input is off by at most 1/254 of its group's largest.
//
// Columns lie in panels of 32, as in product.h: [panel][step][column][4 bytes], 4 positions a step.
// Nibbles: [panel][two steps][column][4 bytes], the first step in the low halves. q is unsigned: int8
// weights are stored with 128 added, and 128 is their zero. Scales and zeros: [panel][group][32].
#pragma once

#include "linear.h"

namespace forebay {

// As in forebay_kernels.cpu.library.
struct QuantizedMatrix {
    const char *panels;
    const float *scale;  // [panels][groups][32]
    const float *zero;   // the same, or null: `same_zero` everywhere
    const float *bias;   // [out] or null
    const uint8_t *codes;  // [16]: what a nibble stands for, as q; null: itself
    int64_t out, into;
    int64_t group;  // positions; divides `into`, a multiple of 4, of 8 for nibbles
    int32_t bits;   // 8 or 4
    float same_zero;
};

// Rows of inputs rounded to int8: words of 4, and of each group its scale and the sum of its bytes.
struct Rounded {
    const uint32_t *words;  // [rows, into / 4]
    const float *scale;     // [rows, groups]
    const float *sum;       // [rows, groups]
    long width, groups;
};

template <class T>
Rounded rounded(const T *x, long stride, long rows, long into, long group) {
    long groups = into / group;
    auto *bytes = reinterpret_cast<int8_t *>(scratch<uint32_t, 1>(rows * into / 4));
    float *scale = scratch<float, 2>(rows * groups), *total = scratch<float, 3>(rows * groups);
    auto row = [&](long i, int) {
        for (long g = 0; g < groups; g++) {
            const T *from = x + i * stride + g * group;
            F32 most{};
            for (long k = 0; k < group; k += LANES) {
                most = maximum(most, absolute(read(from + k, group - k)));
            }
            float step = largest(most) / 127.0f, inverse = step > 0.0f ? 1.0f / step : 0.0f;
            F32 sums{};
            for (long k = 0; k < group; k += LANES) {
                F32 value = whole(read(from + k, group - k) * inverse);
                sums += value;
                int8_t eight[LANES];
                for (int j = 0; j < LANES; j++) eight[j] = int8_t(value[j]);
                std::memcpy(bytes + i * into + g * group + k, eight,
                            size_t(group - k < LANES ? group - k : LANES));
            }
            scale[i * groups + g] = step;
            total[i * groups + g] = sum(sums);
        }
    };
    if (rows * into < (1 << 15))
        for (long i = 0; i < rows; i++) row(i, 0);
    else
        shared(rows, row);
    return {reinterpret_cast<const uint32_t *>(bytes), scale, total, into / 4, groups};
}

template <int BITS>
struct QuantizedSteps {
    template <int ROWS>
    static INLINE void run(I32 (&sums)[ROWS][WIDE], const uint32_t *x, long stride, const char *panel,
                           long steps, U32 codes) {
        if constexpr (BITS == 8) {
            multiply<Bytes, ROWS>(sums, x, stride, panel, steps);
        } else {
            for (long s = 0; s < steps; s += 2, panel += STEP) {
                U32 low[WIDE], high[WIDE];
#pragma GCC unroll 4
                for (int j = 0; j < WIDE; j++) {
                    __builtin_prefetch(panel + AHEAD + 64 * j);
                    U32 both = load<U32>(panel + 64 * j);
                    low[j] = decode(both & 0x0f0f0f0fu, codes);
                    high[j] = decode((both >> 4) & 0x0f0f0f0fu, codes);
                }
#pragma GCC unroll 16
                for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
                    for (int j = 0; j < WIDE; j++) {
                        sums[i][j] = Bytes::add(sums[i][j], low[j], x[i * stride + s]);
                        sums[i][j] = Bytes::add(sums[i][j], high[j], x[i * stride + s + 1]);
                    }
            }
        }
    }

    // `codes` holds the 16 codes four times over, once in each 16 bytes.
    static INLINE U32 decode(U32 nibbles, U32 codes) {
#if defined(__AVX512BW__)
        return (U32)_mm512_shuffle_epi8((__m512i)codes, (__m512i)nibbles);
#else
        uint8_t table[64], at[64];
        store(table, codes);
        store(at, nibbles);
        for (auto &byte : at) byte = table[byte];
        return load<U32>(at);
#endif
    }
};

template <int BITS>
struct QuantizedTile {
    const QuantizedMatrix &matrix;
    const Rounded &x;
    float *out;  // [rows, PANEL]
    long panel;
    U32 codes;

    template <int ROWS>
    INLINE void run(long first) {
        F32 result[ROWS][WIDE] = {};
        long steps = matrix.group / 4, group_bytes = steps * STEP * BITS / 8;
        const char *weights = matrix.panels + panel * x.groups * group_bytes;
        for (long g = 0; g < x.groups; g++) {
            I32 sums[ROWS][WIDE] = {};
            QuantizedSteps<BITS>::template run<ROWS>(
                sums, x.words + first * x.width + g * steps, x.width, weights + g * group_bytes, steps,
                codes);
            long at = (panel * x.groups + g) * PANEL;
#pragma GCC unroll 4
            for (int j = 0; j < WIDE; j++) {
                F32 scale = read(matrix.scale + at + j * LANES);
                F32 zero = matrix.zero ? read(matrix.zero + at + j * LANES) : splat(matrix.same_zero);
#pragma GCC unroll 16
                for (int i = 0; i < ROWS; i++) {
                    long of = (first + i) * x.groups + g;
                    F32 exact = __builtin_convertvector(sums[i][j], F32) - zero * x.sum[of];
                    result[i][j] += exact * (scale * x.scale[of]);
                }
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++)
            for (int j = 0; j < WIDE; j++) store(out + (first + i) * PANEL + j * LANES, result[i][j]);
    }

    // In few sizes: the panel stays in the cache from one to the next.
    void all(long rows) {
        long first = 0;
        for (; rows - first >= 8; first += 8) run<8>(first);
        for (; rows - first >= 4; first += 4) run<4>(first);
        for (; rows - first >= 2; first += 2) run<2>(first);
        if (first < rows) run<1>(first);
    }
};

template <class T>
void quantized_linear(const QuantizedMatrix &matrix, const T *x, long x_stride, long rows, T *out,
                      long out_stride) {
    Rounded input = rounded(x, x_stride, rows, matrix.into, matrix.group);
    uint8_t table[64];
    for (int i = 0; i < 64; i++) table[i] = matrix.codes ? matrix.codes[i % 16] : uint8_t(i % 16);
    U32 codes = load<U32>(table);
    long panel_bytes = matrix.into * PANEL * matrix.bits / 8;
    static std::vector<float> sums[Pool::MOST_THREADS];
    by_panels(ceil_div(matrix.out, PANEL), panel_bytes, [&](long panel, int thread) {
        sums[thread].resize(size_t(rows * PANEL));
        float *mine = sums[thread].data();
        if (matrix.bits == 8)
            QuantizedTile<8>{matrix, input, mine, panel, codes}.all(rows);
        else
            QuantizedTile<4>{matrix, input, mine, panel, codes}.all(rows);
        long column = panel * PANEL;
        const float *bias = matrix.bias ? matrix.bias + column : nullptr;
        for (long i = 0; i < rows; i++) {
            F32 row[WIDE] = {read(mine + i * PANEL), read(mine + i * PANEL + LANES)};
            finish(row, bias, matrix.out - column, out + i * out_stride + column);
        }
    });
}

}  // namespace forebay
