// Which columns of a product can hold the token that is drawn, at half the bytes of reading all.
//
// A draw is the column n of the largest w[n] . x / T + noise[n], where greedy is without noise. Weights
// are rounded to int8 by a scale of each column, inputs to 15 bits by a scale of each row, so that
// v . y, with v and y what they were rounded to, is summed up exactly in integers. How far it can be
// from w . x follows from Cauchy and Schwarz, as w . x - v . y = (w - v) . y + w . (x - y):
//
//     |w . x - v . y| <= |w - v| |y| + |w| |x - y|
//
// with lengths that are known. A column whose upper bound is below the largest lower bound of all
// cannot win. The product itself is then made of the panels that are left, some ten of thousands.
// Of Gemma 3 270M's 262144 tokens 6 in the middle, and 20 in the mean, are left of a greedy draw.
#pragma once

#include <cmath>
#include <limits>

#include "linear.h"

namespace forebay {

// As in forebay_kernels.cpu.library. Values of columns that a last panel lacks may be anything.
struct ScreenMatrix {
    char *panels;   // 128 + v / scale, bytes; as in product.h
    float *scale;   // [panels * 32]
    float *error;   // [panels * 32]: |w - v|, infinite where w is not finite
    float *length;  // [panels * 32]: |w|
    int64_t out, into;
};

// What is drawn behind each row of inputs.
struct Draws {
    const float *inverse;  // [rows]: 1 / T; 0: greedy
    const uint64_t *keys;  // [rows]: of the noise
};

constexpr float UP = 1.0f + 1e-4f;  // lengths are sums in float: rounded up by more than their error
constexpr float UNIT = 1.0f / (1 << 24);

// Of bf16 an element of the result is off by 2^-9 of itself at most, and of floats, which are scaled
// and summed up with the noise, by some 2^-24.
template <class T>
constexpr float ROUNDING = sizeof(T) == 2 ? 1.0f / 256 : 1.0f / (1 << 20);

constexpr float INFINITE = std::numeric_limits<float>::infinity();

// Rounds w [out, into], rows `stride` elements apart.
template <class T>
void make_screen(const T *w, long stride, const ScreenMatrix &to) {
    long out = to.out, into = to.into;
    long row_bytes = ceil_div(into, 4) * 4, panel_bytes = row_bytes / 4 * STEP;
    static std::vector<uint8_t> bytes[Pool::MOST_THREADS];
    by_panels(ceil_div(out, PANEL), panel_bytes, [&](long panel, int thread) {
        bytes[thread].assign(size_t(PANEL * (row_bytes + LANES)), 128);
        const char *from[PANEL];
        for (long c = 0; c < PANEL; c++) {
            long column = panel * PANEL + c;
            uint8_t *byte = bytes[thread].data() + c * (row_bytes + LANES);
            from[c] = reinterpret_cast<const char *>(byte);
            if (column >= out) continue;
            const T *row = w + column * stride;
            F32 most{}, square{}, off{};
            for (long k = 0; k < into; k += LANES) {
                F32 value = read(row + k, into - k);
                most = maximum(absolute(value), most);
                square += value * value;
            }
            float step = largest(most) / 127.0f, all = sum(square);
            bool finite = all < INFINITE;
            float inverse = finite && step > 1e-30f ? 1.0f / step : 0.0f;
            if (inverse == 0.0f) step = 0.0f;
            for (long k = 0; finite && k < into; k += LANES) {
                F32 value = read(row + k, into - k), near = whole(value * inverse);
                value -= near * step;
                off += value * value;
                store(byte + k, __builtin_convertvector(__builtin_convertvector(near, I32) + 128, U8));
            }
            to.scale[column] = step;
            to.error[column] = finite ? std::sqrt(sum(off)) * UP : INFINITE;
            to.length[column] = finite ? std::sqrt(all) * UP : 0.0f;
        }
        pack_panel(from, row_bytes, to.panels + panel * panel_bytes);
    });
}

// A row of inputs: step * (128 high + low), with high and low signed bytes.
struct Fifteen {
    float step;
    int32_t high, low;  // 128 times the sum of the bytes: the weights' zero
    float length, rest;  // |y|; |x - y|, and what summing up in floats can be off by for each |w|
    float inverse;       // 1 / T
    uint32_t key[2];
    bool noisy;
};

// Rounds a row; the words of its high and low bytes lie `pitch` words apart.
template <class T>
Fifteen fifteen(const T *x, long into, long steps, int8_t *high, int8_t *low, long pitch) {
    F32 most{}, square{}, near_square{}, off{};
    for (long k = 0; k < into; k += LANES) {
        F32 value = read(x + k, into - k);
        most = maximum(absolute(value), most);
        square += value * value;
    }
    Fifteen row{};
    row.step = largest(most) / 16256.0f;  // 128 * 127
    float inverse = row.step > 1e-30f ? 1.0f / row.step : 0.0f;
    for (long k = 0; k < steps * 4; k += LANES) {
        F32 value = k < into ? read(x + k, into - k) : F32{};
        F32 near = whole(value * inverse), upper = whole(near * (1.0f / 128)), lower = near - upper * 128.0f;
        F32 rest = value - near * row.step;
        near_square += near * near;
        off += rest * rest;
        for (long j = 0; j < LANES && k + j < steps * 4; j++) {
            long at = (k + j) / 4 * pitch * 4 + (k + j) % 4;
            high[at] = int8_t(upper[j]);
            low[at] = int8_t(lower[j]);
            row.high += 128 * high[at];
            row.low += 128 * low[at];
        }
    }
    row.length = std::sqrt(sum(near_square)) * row.step * UP;
    row.rest = std::sqrt(sum(off)) * UP + float(into + 64) * UNIT * std::sqrt(sum(square)) * UP;
    return row;
}

// 31 random bits of tokens under a key, as in forebay_engine.noise.
INLINE U32 token_bits(U32 token, const uint32_t (&key)[2]) {
    U32 x = token ^ key[0];
    x = (x ^ (x >> 17)) * 0xed5ad4bbu + key[1];
    x = (x ^ (x >> 11)) * 0xac4c1b51u;
    x = (x ^ (x >> 15)) * 0x31848babu;
    return (x ^ (x >> 14)) & 0x7fffffffu;
}

// ln x of normal numbers, to 1e-4: the exponent, and a series in (m - 1) / (m + 1) of the mantissa.
INLINE F32 logarithm(F32 x) {
    U32 bits = (U32)x - 0x3f3504f3u;  // the mantissa from sqrt(1/2) to sqrt(2)
    F32 exponent = __builtin_convertvector((I32)bits >> 23, F32);
    F32 m = (F32)((bits & 0x7fffffu) + 0x3f3504f3u);
    F32 t = (m - 1.0f) / (m + 1.0f), square = t * t;
    return exponent * 0.69314718f + 2.0f * t * (1.0f + square * (1.0f / 3 + square * 0.2f));
}

// Tiles of rows times a panel of the screen.
template <class T>
struct ScreenPanel {
    static constexpr int MOST = TALLEST / 2;  // rows of a tile: each has high and low bytes

    const ScreenMatrix &matrix;
    const uint32_t *words;
    const Fifteen *rows_of_input;
    long rows, panel;
    float *highest;  // [rows]: of the panel's upper bounds
    F32 *lowest;     // [rows]: the largest lower bounds so far

    static long tiles(long rows) { return ceil_div(rows, MOST); }

    void run() const {
        long steps = ceil_div(matrix.into, 4), count = tiles(rows);
        const char *weights = matrix.panels + panel * steps * STEP;
        for (long t = 0; t < count; t++) {
            long first = tile_start(rows, count, t), end = tile_start(rows, count, t + 1);
            // Of several tiles each fetches its share of the next panel: memory is never at rest.
            long pace = STEP / count, before = t * pace * steps;
            const char *ahead = weights + (count == 1 ? AHEAD : steps * STEP + before);
            Tile tile{*this, weights, steps, words + first * 2 * steps, ahead, pace};
            rows_of<MOST>(int(end - first), first, tile);
        }
    }

    struct Tile {
        const ScreenPanel &all;
        const char *weights;
        long steps;
        const uint32_t *x;
        const char *ahead;
        long pace;

        template <int ROWS>
        __attribute__((noinline)) void run(long first) const {
            I32 sums[2 * ROWS][WIDE] = {};
            multiply<Bytes, 2 * ROWS>(sums, x, weights, steps, ahead, pace);
            const F32 none = splat(-INFINITE);
            const ScreenMatrix &matrix = all.matrix;
            F32 most[ROWS];
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; i++) most[i] = none;
#pragma GCC unroll 4
            for (int j = 0; j < WIDE; j++) {
                long column = all.panel * PANEL + j * LANES;
                U32 token = uint32_t(column) + COUNTING;
                I32 there = token < uint32_t(matrix.out);
                F32 scale = read(matrix.scale + column), error = read(matrix.error + column);
                F32 length = read(matrix.length + column);
#pragma GCC unroll 8
                for (int i = 0; i < ROWS; i++) {
                    const Fifteen &row = all.rows_of_input[first + i];
                    F32 high = __builtin_convertvector(sums[i][j] - row.high, F32);
                    F32 low = __builtin_convertvector(sums[ROWS + i][j] - row.low, F32);
                    F32 about = (high * 128.0f + low) * (scale * row.step);
                    F32 off = error * row.length + length * row.rest;
                    off += (absolute(about) + off) * ROUNDING<T>;
                    F32 up = about + off, down = about - off;
                    if (row.noisy) {
                        // Noise is -ln -ln(1 - u), and u <= -ln(1 - u) <= u / (1 - u).
                        F32 bits = __builtin_convertvector((I32)token_bits(token, row.key), F32);
                        F32 u = (bits + 0.5f) * (1.0f / 2147483648.0f);
                        F32 noise = -logarithm(u), least = logarithm(maximum(1.0f - u, splat(1e-30f)));
                        up = up * row.inverse + noise + 1e-3f;
                        down = down * row.inverse + noise + least - 1e-3f;
                    }
                    most[i] = maximum(select(there, up, none), most[i]);
                    F32 &best = all.lowest[first + i];
                    best = maximum(select(there, down, none), best);
                }
            }
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; i++) all.highest[first + i] = largest(most[i]);
        }
    };
};

// Panels among whose columns is what each of the rows draws, rising; at most `most` are told, and how
// many there are is returned.
template <class T>
long screen(const ScreenMatrix &matrix, const T *x, long x_stride, long rows, const Draws &draws,
            int32_t *found, long most) {
    long steps = ceil_div(matrix.into, 4), panels = ceil_div(matrix.out, PANEL);
    uint32_t *words = scratch<uint32_t, 4>(rows * steps * 2);
    static std::vector<Fifteen> input;
    input.resize(size_t(rows));
    long tiles = ScreenPanel<T>::tiles(rows);
    for (long t = 0; t < tiles; t++) {
        long first = tile_start(rows, tiles, t), tall = tile_start(rows, tiles, t + 1) - first;
        for (long i = 0; i < tall; i++) {
            auto *high = reinterpret_cast<int8_t *>(words + first * 2 * steps + i);
            auto *low = reinterpret_cast<int8_t *>(words + first * 2 * steps + tall + i);
            long at = first + i;
            Fifteen &row = input[size_t(at)];
            row = fifteen(x + at * x_stride, matrix.into, steps, high, low, 2 * tall);
            row.noisy = draws.inverse[at] != 0.0f;
            row.inverse = draws.inverse[at];
            row.key[0] = uint32_t(draws.keys[at]);
            row.key[1] = uint32_t(draws.keys[at] >> 32);
        }
    }
    float *highest = scratch<float, 5>(panels * rows);
    static std::vector<F32> lowest[Pool::MOST_THREADS];
    const F32 none = splat(-INFINITE);
    int threads = Pool::instance().threads();
    for (int thread = 0; thread < threads; thread++) lowest[thread].assign(size_t(rows), none);
    by_panels(panels, steps * STEP, [&](long panel, int thread) {
        ScreenPanel<T>{matrix, words, input.data(), rows, panel, highest + panel * rows,
                       lowest[thread].data()}
            .run();
    });
    float *limit = scratch<float, 6>(rows);
    for (long i = 0; i < rows; i++) {
        F32 best = none;
        for (int thread = 0; thread < threads; thread++)
            best = maximum(lowest[thread][size_t(i)], best);
        limit[i] = largest(best);
    }
    long count = 0;
    for (long panel = 0; panel < panels; panel++) {
        bool wanted = false;
        for (long i = 0; i < rows; i++) wanted |= !(highest[panel * rows + i] < limit[i]);
        if (wanted && count++ < most) found[count - 1] = int32_t(panel);
    }
    return count;
}

}  // namespace forebay
