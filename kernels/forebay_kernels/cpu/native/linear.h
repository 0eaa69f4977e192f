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

// Memory that grows and is used again; a job has it for itself.
template <class T, int WHICH>
T *scratch(long count) {
    static std::vector<T> memory;
    if (long(memory.size()) < count) memory.resize(size_t(count));
    return memory.data();
}

// Rows [rows, width] as floats [rows, padded]; what is past the width is 0.
template <class T>
const float *widened(const T *x, long stride, long rows, long width, long padded) {
    float *wide = scratch<float, 0>(rows * padded);
    auto row = [&](long i, int) {
        float *to = wide + i * padded;
        for (long k = 0; k < width; k += LANES) write(to + k, read(x + i * stride + k, width - k), width - k);
        for (long k = width; k < padded; k++) to[k] = 0.0f;
    };
    if (rows * width < (1 << 16))
        for (long i = 0; i < rows; i++) row(i, 0);
    else
        shared(rows, row);
    return wide;
}

template <class T>
INLINE void finish(F32 (&sums)[WIDE], const float *bias, long column, long columns, T *out) {
#pragma GCC unroll 4
    for (int j = 0; j < WIDE; j++, column += LANES) {
        long left = columns - column;
        if (left <= 0) return;
        F32 value = sums[j];
        if (bias) value += read(bias + column, left);
        write(out + column, value, left);
    }
}

template <class Kind>
struct DenseTile {
    using T = typename Kind::Element;
    const DenseMatrix &matrix;
    const float *x;
    T *out;
    long out_stride, panel, steps;

    template <int ROWS>
    INLINE void run(long first) {
        F32 sums[ROWS][WIDE] = {};
        long width = steps * Kind::PARTS;
        multiply<Kind, ROWS>(sums, x + first * width, width, matrix.panels + panel * steps * STEP,
                             steps);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++)
            finish(sums[i], matrix.bias, panel * PANEL, matrix.out, out + (first + i) * out_stride);
    }
};

// `body(panel, thread)` for all panels, in parts of about 64 KB of weights, which take 6 us to read.
template <class Body>
void by_panels(long panels, long panel_bytes, Body &&body) {
    long each = (64 << 10) / panel_bytes;
    if (each < 1) each = 1;
    shared(ceil_div(panels, each), [&](long part, int thread) {
        long end = (part + 1) * each < panels ? (part + 1) * each : panels;
        for (long panel = part * each; panel < end; panel++) body(panel, thread);
    });
}

template <class Kind>
void linear(const DenseMatrix &matrix, const typename Kind::Element *x, long x_stride, long rows,
            typename Kind::Element *out, long out_stride) {
    long steps = ceil_div(matrix.into, PER_STEP<Kind>);
    const float *wide = widened(x, x_stride, rows, matrix.into, steps * Kind::PARTS);
    by_panels(ceil_div(matrix.out, PANEL), steps * STEP, [&](long panel, int) {
        by_tiles(rows, DenseTile<Kind>{matrix, wide, out, out_stride, panel, steps});
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
