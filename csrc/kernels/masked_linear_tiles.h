// y = x (W * keep)^T + bias where keep drops whole 64 x 64 blocks of W; and x (W * keep), its dx. Hopper only.
#pragma once
#include "element.h"

namespace sensibert {

// What is left of W, for output tiles of tile_cols (192 or 256) features, all in device memory. Output tile n
// multiplies the steps entries[offsets[2 n] .. offsets[2 n + 2]), each 64 input features wide: (input feature / 64)
// << 4 | bands, where bit b of bands says that the 64 features from n * tile_cols + 64 b on keep their block; those
// that keep all of tile_cols / 64 bands come first, up to offsets[2 n + 1]. Tiles are computed in the order given:
// longest first balances.
struct TileList {
    const int32_t* offsets;  // [2 * ceil(N / tile_cols) + 1]
    const int32_t* entries;  // [offsets[2 * ceil(N / tile_cols)]]
    const int32_t* order;    // [ceil(N / tile_cols)]
    int tile_cols;
};

// y [M, N] = x [M, K] w [N, K]^T + bias [N] or null; by_columns: w is [K, N], not transposed, and the tiles of the list
// are of its columns. Row-major, of one 16-bit dtype; rows lie x_stride, w_stride, y_stride elements apart; pointers
// 16-byte aligned, N, K and strides multiples of 8.
struct TilesProblem {
    const void *x, *w, *bias;
    void* y;
    int64_t M, N, K, x_stride, w_stride, y_stride;
    DType dtype;
    bool by_columns;
};

// Accumulates in fp32, in one fixed order. cudaErrorInvalidValue if an argument does not fit; cudaErrorNotSupported if
// the driver knows no tensor maps.
cudaError_t launch_masked_linear_tiles(const TilesProblem& problem, const TileList& list, cudaStream_t stream);

}  // namespace sensibert
