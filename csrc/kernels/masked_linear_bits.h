// y = x (W * keep)^T + bias where keep is one bit a weight, any pattern; and x (W * keep), its dx. Hopper only.
#pragma once
#include "element.h"

namespace sensibert {

// y [M, N] = x [M, K] (w [N, K] * bits)^T + bias [N] or null; by_columns: w is [K, N], not transposed. bits is [N,
// K / 8] in both cases: bit k % 8 of byte k / 8 of row n, set where the weight from k to n survives. Row-major; x, w,
// bias, y of one 16-bit dtype. Rows lie x_stride, w_stride, y_stride elements and bits_stride bytes apart; pointers 16-byte
// aligned, N, K and the first three strides multiples of 8, bits_stride of 16. tile_cols: tokens of an output tile, 192 or
// 256; 0 takes what leaves fewer multiprocessors idle at the end.
struct BitsProblem {
    const void *x, *w, *bias;
    const uint8_t* bits;
    void* y;
    int64_t M, N, K, x_stride, w_stride, bits_stride, y_stride;
    DType dtype;
    bool by_columns;
    int tile_cols;
};

// A dropped weight is replaced by 0 whatever it holds. Accumulates in fp32, in one fixed order. cudaErrorInvalidValue if an
// argument does not fit; cudaErrorNotSupported if the driver knows no tensor maps.
cudaError_t launch_masked_linear_bits(const BitsProblem& problem, cudaStream_t stream);

}  // namespace sensibert
