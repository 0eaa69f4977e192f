// What Python calls, by ctypes. One caller at a time; the pool shares the work.
#include "attention.h"
#include "linear.h"
#include "quantized.h"
#include "rows.h"
#include "screen.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

using namespace forebay;

namespace {
using Turn = std::lock_guard<std::mutex>;
constexpr int32_t FLOAT = 4;  // bytes of an element; bf16 has 2
}  // namespace

extern "C" {

void forebay_threads(int threads) { Pool::instance().resize(threads); }

int64_t forebay_packed_bytes(int64_t out, int64_t row_bytes) {
    return ceil_div(out, PANEL) * ceil_div(row_bytes, 4) * STEP;
}

// Asks for huge pages: reading weights is what a step mostly does.
void forebay_huge_pages(void *memory, int64_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t HUGE = 2 << 20;
    uintptr_t begin = (uintptr_t(memory) + HUGE - 1) / HUGE * HUGE;
    uintptr_t end = (uintptr_t(memory) + uintptr_t(bytes)) / HUGE * HUGE;
    if (begin < end) madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

void forebay_pack(const char *w, int64_t stride, int64_t out, int64_t row_bytes, char *to) {
    Turn turn(Pool::instance().turn());
    pack(w, stride, out, row_bytes, to);
}

// `chosen`: the panels that are computed, side by side; null: the first `count`.
void forebay_linear_panels(const DenseMatrix *matrix, int32_t element, const void *x,
                           int64_t x_stride, int64_t rows, void *out, int64_t out_stride,
                           const int32_t *chosen, int64_t count) {
    Turn turn(Pool::instance().turn());
    if (element == FLOAT)
        linear<Floats>(*matrix, static_cast<const float *>(x), x_stride, rows,
                       static_cast<float *>(out), out_stride, chosen, count);
    else
        linear<Halves>(*matrix, static_cast<const bf16 *>(x), x_stride, rows,
                       static_cast<bf16 *>(out), out_stride, chosen, count);
}

void forebay_linear(const DenseMatrix *matrix, int32_t element, const void *x, int64_t x_stride,
                    int64_t rows, void *out, int64_t out_stride) {
    forebay_linear_panels(matrix, element, x, x_stride, rows, out, out_stride, nullptr,
                          ceil_div(matrix->out, PANEL));
}

int32_t forebay_screens() {
#if defined(__AVX512VNNI__)
    return 1;
#else
    return 0;  // products of bytes are no faster than those of floats
#endif
}

void forebay_make_screen(int32_t element, const void *w, int64_t stride, const ScreenMatrix *to) {
    Turn turn(Pool::instance().turn());
    if (element == FLOAT)
        make_screen(static_cast<const float *>(w), stride, *to);
    else
        make_screen(static_cast<const bf16 *>(w), stride, *to);
}

int64_t forebay_screen(const ScreenMatrix *matrix, int32_t element, const void *x, int64_t x_stride,
                       int64_t rows, const Draws *draws, int32_t *found, int64_t most) {
    Turn turn(Pool::instance().turn());
    if (element == FLOAT)
        return screen(*matrix, static_cast<const float *>(x), x_stride, rows, *draws, found, most);
    return screen(*matrix, static_cast<const bf16 *>(x), x_stride, rows, *draws, found, most);
}

void forebay_quantized_linear(const QuantizedMatrix *matrix, int32_t element, const void *x,
                              int64_t x_stride, int64_t rows, void *out, int64_t out_stride) {
    Turn turn(Pool::instance().turn());
    if (element == FLOAT)
        quantized_linear(*matrix, static_cast<const float *>(x), x_stride, rows,
                         static_cast<float *>(out), out_stride);
    else
        quantized_linear(*matrix, static_cast<const bf16 *>(x), x_stride, rows,
                         static_cast<bf16 *>(out), out_stride);
}

void forebay_attention(const AttentionArgs *args, int32_t element) {
    Turn turn(Pool::instance().turn());
    if (element == FLOAT)
        Attention<Floats>(*args).run();
    else
        Attention<Halves>(*args).run();
}

void forebay_prepare_qkv(const QkvArgs *args, int32_t element) {
    Turn turn(Pool::instance().turn());
    element == FLOAT ? prepare_qkv<float>(*args) : prepare_qkv<bf16>(*args);
}

void forebay_add_and_norm(const ResidualArgs *args, int32_t element) {
    Turn turn(Pool::instance().turn());
    element == FLOAT ? add_and_norm<float>(*args) : add_and_norm<bf16>(*args);
}

void forebay_norm(int32_t element, const void *x, const float *weight, int64_t rows, int64_t width,
                  float eps, void *out) {
    Turn turn(Pool::instance().turn());
    auto run = [&](auto *from, auto *to) {
        each_row(rows, width, [&](long row) {
            norm_row(from + row * width, weight, width, eps, to + row * width);
        });
    };
    if (element == FLOAT)
        run(static_cast<const float *>(x), static_cast<float *>(out));
    else
        run(static_cast<const bf16 *>(x), static_cast<bf16 *>(out));
}

void forebay_gate(int32_t element, const void *x, int64_t rows, int64_t width, int32_t kind,
                  void *out) {
    Turn turn(Pool::instance().turn());
    if (element == FLOAT)
        gate(static_cast<const float *>(x), rows, width, kind, static_cast<float *>(out));
    else
        gate(static_cast<const bf16 *>(x), rows, width, kind, static_cast<bf16 *>(out));
}

void forebay_argmax(int32_t element, const void *x, int64_t stride, int64_t rows, int64_t width,
                    int64_t *found) {
    Turn turn(Pool::instance().turn());
    if (element == FLOAT)
        argmax(static_cast<const float *>(x), stride, rows, width, found);
    else
        argmax(static_cast<const bf16 *>(x), stride, rows, width, found);
}

}  // extern "C"
