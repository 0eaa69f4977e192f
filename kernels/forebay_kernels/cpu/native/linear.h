// Linear layers over packed weights of float or bf16.
#pragma once

#include <vector>

#include "product.h"

namespace forebay {

// As in forebay_kernels.cpu.library.
struct DenseMatrix {
    const char *panels;
    const float *bias;  // [out] or null
    int64_t out, into;
};

// As in forebay_kernels.cpu.library. Strides are in elements.
struct LinearArgs {
    const void *matrix;  // DenseMatrix or QuantizedMatrix
    const void *x;       // [rows, into]
    void *out;           // [rows, out], or [rows, count * 32]
    int64_t x_stride, out_stride, rows;
    const int32_t *chosen;  // [count]: the panels that are computed, side by side; null: all
    int64_t count;
};

constexpr long INPUT_BYTES = 1 << 19;

// Memory that grows and is used again; a job has it for itself.
template <class T, int WHICH>
T *scratch(long count) {
    static std::vector<T> memory;
    if (long(memory.size()) < count) memory.resize(size_t(count));
    return memory.data();
}

// Where tile t of `tiles` begins; they are cut evenly, as by_tiles does.
INLINE long tile_start(long rows, long tiles, long t) { return rows * t / tiles; }

// Rows [rows, width] as floats, filled up with zeros to `padded`, in the order in which they are
// read: for each block of the width and each tile of rows [of the block][rows of the tile].
template <class T>
const float *interleaved(const T *x, long stride, long rows, long width, long padded, long block) {
    float *all = scratch<float, 0>(rows * padded);
    long tiles = ceil_div(rows, TALLEST);
    auto tile = [&](long part, int) {
        long t = part % tiles, from = part / tiles * block;
        long first = tile_start(rows, tiles, t), tall = tile_start(rows, tiles, t + 1) - first;
        long count = padded - from < block ? padded - from : block;
        long there = width - from < count ? width - from : count;
        float *to = all + from * rows + first * count;
        for (long i = 0; i < tall; i++) {
            const T *row = x + (first + i) * stride + from;
            for (long k = 0; k < there; k++) to[k * tall + i] = widen(row[k]);
            for (long k = there; k < count; k++) to[k * tall + i] = 0.0f;
        }
    };
    long parts = ceil_div(padded, block) * tiles;
    if (rows * width < (1 << 14))
        for (long part = 0; part < parts; part++) tile(part, 0);
    else
        shared(parts, tile);
    return all;
}

// Of a panel's columns: `left` of them are there, to `out`.
template <class T>
INLINE void finish(F32 (&sums)[WIDE], const float *bias, long left, T *out) {
#pragma GCC unroll 4
    for (int j = 0; j < WIDE; j++, left -= LANES) {
        if (left <= 0) return;
        F32 value = sums[j];
        if (bias) value += read(bias + j * LANES, left);
        write(out + j * LANES, value, left);
    }
}

// All rows times a panel.
template <class Kind>
struct DensePanel {
    using T = typename Kind::Element;
    static constexpr long BLOCK = 128;  // 16 KB of weights

    const DenseMatrix &matrix;
    const float *x;  // interleaved
    T *out;          // where the panel's columns go
    long out_stride, rows, panel;
    float *sums;  // [rows, PANEL] so far, of several tiles

    // Of one tile, weights come from memory as fast as they can. Of several, BLOCK steps stay in the
    // first cache for all of them: the first one fetches the next block, the others their
    // neighbour's input. Sums go on as they were.
    void run() const {
        long tiles = ceil_div(rows, TALLEST), steps = ceil_div(matrix.into, PER_STEP<Kind>);
        long block = tiles == 1 ? steps : BLOCK;
        const char *weights = matrix.panels + panel * steps * STEP;
        for (long from = 0; from < steps; from += block, weights += block * STEP) {
            long count = steps - from < block ? steps - from : block;
            for (long t = 0; t < tiles; t++) {
                long first = tile_start(rows, tiles, t), end = tile_start(rows, tiles, t + 1);
                const float *input = x + (from * rows + first * count) * Kind::PARTS;
                const float *next = input + (end - first) * count * Kind::PARTS;
                const char *ahead = tiles == 1 ? weights + AHEAD
                                    : t == 0   ? weights + count * STEP
                                               : reinterpret_cast<const char *>(next);
                Tile tile{*this, weights, count, input, ahead, from == 0, from + count == steps};
                rows_of<TALLEST>(int(end - first), first, tile);
            }
        }
    }

    struct Tile {
        const DensePanel &all;
        const char *weights;
        long steps;
        const float *x;
        const char *ahead;
        bool begins, ends;

        // A function of its own for each number of rows: together they take minutes to compile.
        template <int ROWS>
        __attribute__((noinline)) void run(long first) const {
            F32 sums[ROWS][WIDE] = {};
            float *so_far = all.sums + first * PANEL;
            if (!begins)
#pragma GCC unroll 16
                for (int i = 0; i < ROWS; i++)
                    for (int j = 0; j < WIDE; j++) sums[i][j] = read(so_far + i * PANEL + j * LANES);
            multiply<Kind, ROWS>(sums, x, weights, steps, ahead);
            long column = all.panel * PANEL;
            const float *bias = all.matrix.bias ? all.matrix.bias + column : nullptr;
            if (ends)
#pragma GCC unroll 16
                for (int i = 0; i < ROWS; i++)
                    finish(sums[i], bias, all.matrix.out - column,
                           all.out + (first + i) * all.out_stride);
            else
#pragma GCC unroll 16
                for (int i = 0; i < ROWS; i++)
                    for (int j = 0; j < WIDE; j++) store(so_far + i * PANEL + j * LANES, sums[i][j]);
        }
    };
};

// `body(panel, thread)` for all panels, in parts of 64 KB of weights, which take 6 us to read, or of
// up to 1 MB where there are many: each part begins with what nobody has fetched ahead.
template <class Body>
void by_panels(long panels, long panel_bytes, Body &&body) {
    long bytes = panels * panel_bytes / (64 * Pool::instance().threads());
    bytes = bytes < (64 << 10) ? 64 << 10 : bytes > (1 << 20) ? 1 << 20 : bytes;
    long each = bytes / panel_bytes;
    if (each < 1) each = 1;
    shared(ceil_div(panels, each), [&](long part, int thread) {
        long end = (part + 1) * each < panels ? (part + 1) * each : panels;
        for (long panel = part * each; panel < end; panel++) body(panel, thread);
    });
}

// Of all panels, or of those `chosen` only, whose columns then lie side by side.
template <class Kind>
void linear(const DenseMatrix &matrix, const typename Kind::Element *x, long x_stride, long rows,
            typename Kind::Element *out, long out_stride, const int32_t *chosen, long count) {
    constexpr long PARTS = Kind::PARTS;
    long steps = ceil_div(matrix.into, PER_STEP<Kind>);
    // As many rows at a time as stay in the second cache while panels pass by.
    long most = INPUT_BYTES / (steps * PARTS * long(sizeof(float))) / TALLEST * TALLEST;
    if (most < TALLEST) most = TALLEST;
    for (; rows > most; rows -= most, x += most * x_stride, out += most * out_stride)
        linear<Kind>(matrix, x, x_stride, most, out, out_stride, chosen, count);
    const float *input = interleaved(x, x_stride, rows, matrix.into, steps * PARTS,
                                     DensePanel<Kind>::BLOCK * PARTS);
    static std::vector<float> sums[Pool::MOST_THREADS];
    by_panels(count, steps * STEP, [&](long number, int thread) {
        if (rows > TALLEST) sums[thread].resize(size_t(rows * PANEL));
        float *mine = sums[thread].data();
        long panel = chosen ? chosen[number] : number;
        DensePanel<Kind>{matrix, input, out + number * PANEL, out_stride, rows, panel, mine}.run();
    });
}

// Packs w, [out] rows of `bytes` bytes, `stride` bytes apart.
inline void pack(const char *w, long stride, long out, long bytes, char *to) {
    std::vector<char> zeros(size_t(bytes), 0);
    long panel_bytes = ceil_div(bytes, 4) * STEP;
    by_panels(ceil_div(out, PANEL), panel_bytes, [&](long panel, int) {
        const char *from[PANEL];
        for (long c = 0; c < PANEL; c++) {
            long row = panel * PANEL + c;
            from[c] = row < out ? w + row * stride : zeros.data();
        }
        pack_panel(from, bytes, to + panel * panel_bytes);
    });
}

}  // namespace forebay
