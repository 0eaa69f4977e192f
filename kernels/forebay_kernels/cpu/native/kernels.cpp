// What Python calls, by ctypes. One caller at a time; the pool shares the work.
#include "attention.h"
#include "linear.h"
#include "quantized.h"
#include "rounding.h"
#include "rows.h"
#include "screen.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

using namespace forebay;

namespace {
using Turn = std::lock_guard<std::mutex>;
constexpr int32_t FLOAT = 4;  // bytes of an element; bf16 has 2

// As in forebay_kernels.cpu.library.
struct Call {
    void (*run)(const void *args, int32_t element);
    const void *args;
    int64_t element;
};
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

void forebay_linear(const LinearArgs *a, int32_t element) {
    Turn turn(Pool::instance().turn());
    const DenseMatrix &matrix = *static_cast<const DenseMatrix *>(a->matrix);
    long count = a->chosen ? a->count : ceil_div(matrix.out, PANEL);
    if (element == FLOAT)
        linear<Floats>(matrix, static_cast<const float *>(a->x), a->x_stride, a->rows,
                       static_cast<float *>(a->out), a->out_stride, a->chosen, count);
    else
        linear<Halves>(matrix, static_cast<const bf16 *>(a->x), a->x_stride, a->rows,
                       static_cast<bf16 *>(a->out), a->out_stride, a->chosen, count);
}

void forebay_quantized_linear(const LinearArgs *a, int32_t element) {
    Turn turn(Pool::instance().turn());
    const QuantizedMatrix &matrix = *static_cast<const QuantizedMatrix *>(a->matrix);
    if (element == FLOAT)
        quantized_linear(matrix, static_cast<const float *>(a->x), a->x_stride, a->rows,
                         static_cast<float *>(a->out), a->out_stride);
    else
        quantized_linear(matrix, static_cast<const bf16 *>(a->x), a->x_stride, a->rows,
                         static_cast<bf16 *>(a->out), a->out_stride);
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

void forebay_round_to_int8(int32_t element, const void *x, int64_t rows, int64_t width, int8_t *out,
                           float *scale) {
    Turn turn(Pool::instance().turn());
    if (element == FLOAT)
        round_to_int8(static_cast<const float *>(x), rows, width, out, scale);
    else
        round_to_int8(static_cast<const bf16 *>(x), rows, width, out, scale);
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

void forebay_norm(const NormArgs *args, int32_t element) {
    Turn turn(Pool::instance().turn());
    element == FLOAT ? norm<float>(*args) : norm<bf16>(*args);
}

void forebay_gate(const GateArgs *args, int32_t element) {
    Turn turn(Pool::instance().turn());
    element == FLOAT ? gate<float>(*args) : gate<bf16>(*args);
}

// One call after the other, without a word to Python between them; `seconds` [count] that each took,
// or null.
void forebay_replay(const Call *calls, int64_t count, double *seconds) {
    using Clock = std::chrono::steady_clock;
    for (int64_t i = 0; i < count; i++) {
        auto begin = seconds ? Clock::now() : Clock::time_point();
        calls[i].run(calls[i].args, int32_t(calls[i].element));
        if (seconds) seconds[i] = std::chrono::duration<double>(Clock::now() - begin).count();
    }
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
