// dW = (dY^T X) * keep where keep drops whole 64 x 64 blocks of W. Hopper only.
#pragma once
#include "element.h"

namespace sensibert {

constexpr int kDweightBands = 4;  // blocks of a row in an output tile, at most
constexpr int kDweightTileWords = 5 + 2 * kDweightBands;

// The blocks of dW [N, K], block (i, j) = rows from 64 i on, columns from 64 j on; all in device memory. An output tile
// is kept blocks of two i, up to kDweightBands of each, in kDweightTileWords words: i_0, i_1, only_0, both, only_1,
// then the j that i_0 alone keeps, those of both, those of i_1 alone. i_1 may be i_0: then both is 0.
struct BlockList {
    const int32_t* tiles;    // [num_tiles, kDweightTileWords]: longest first balances
    const int32_t* dropped;  // [num_dropped] i * ceil(K / 64) + j
    int32_t num_tiles, num_dropped;
};

// dW [N, K] = dY [M, N]^T X [M, K], every element written: 0 in dropped blocks. One 16-bit dtype; rows of dY and X lie
// dy_stride and x_stride elements apart, dW is contiguous; pointers 16-byte aligned, N, K and strides multiples of 8.
struct DweightProblem {
    const void *dy, *x;
    void* dw;
    int64_t M, N, K, dy_stride, x_stride;
    DType dtype;
    int num_chunks;  // pieces that the tokens are cut into, 1 .. 16: dweight_chunks() knows a good number
};

// A pure function of the sizes, not of the GPU: a sum has the same order everywhere.
int dweight_chunks(int64_t num_tokens, int64_t num_tiles);

// Bytes of device memory for the launch, 16-byte aligned, not initialised; 0 for one chunk.
int64_t dweight_scratch_bytes(int64_t num_tiles, int num_chunks);

// Accumulates in fp32, in an order set by M, the list and num_chunks. cudaErrorInvalidValue if an argument does not
// fit; cudaErrorNotSupported if the driver knows no tensor maps.
cudaError_t launch_masked_linear_dweight(const DweightProblem& problem, const BlockList& list, void* scratch,
                                         cudaStream_t stream);

}  // namespace sensibert
