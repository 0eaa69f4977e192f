// What Python calls, by ctypes. One caller at a time; the pool shares the work.
#include "linear.h"

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

void forebay_linear(const DenseMatrix *matrix, int32_t element, const void *x, int64_t x_stride,
                    int64_t rows, void *out, int64_t out_stride) {
    Turn turn(Pool::instance().turn());
    if (element == FLOAT)
        linear<Floats>(*matrix, static_cast<const float *>(x), x_stride, rows,
                       static_cast<float *>(out), out_stride);
    else
        linear<Halves>(*matrix, static_cast<const bf16 *>(x), x_stride, rows,
                       static_cast<bf16 *>(out), out_stride);
}

}  // extern "C"
