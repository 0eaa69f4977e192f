// Weights rounded to int8 while they are read.
#pragma once

#include "rows.h"

namespace forebay {

// x [rows, width] as round(x / scale), -127 to 127, with the scale max |x| / 127 of each row.
// Ties go to even, and a row of zeros has the scale 0.
template <class T>
void round_to_int8(const T *x, long rows, long width, int8_t *out, float *scale) {
    using I8 = int8_t __attribute__((vector_size(LANES)));
    each_row(rows, width, [&](long row) {
        const T *from = x + row * width;
        F32 most{};
        for (long k = 0; k < width; k += LANES)
            most = maximum(absolute(read(from + k, width - k)), most);
        float step = largest(most) / 127.0f, divisor = step > 0.0f ? step : 1.0f;
        scale[row] = step;
        for (long k = 0; k < width; k += LANES) {
            F32 near = whole(read(from + k, width - k) / divisor);
            I8 bytes = __builtin_convertvector(__builtin_convertvector(near, I32), I8);
            std::memcpy(out + row * width + k, &bytes, size_t(std::min<long>(LANES, width - k)));
        }
    });
}

}  // namespace forebay
