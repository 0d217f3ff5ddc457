// Runs masked_linear_tiles.cu. arrays: int64 {M, N, K, x_stride, w_stride, y_stride, by_columns, dtype, tile_cols}; x,
// w, bias (empty: none), y; offsets, entries, order of the tile list.
#include "../../csrc/kernels/masked_linear_tiles.cu"

#include "harness.h"

cudaError_t run(std::vector<Array>& a) {
    using namespace sensibert;
    const int64_t* n = a[0].as<int64_t>();
    const void* const bias = a[3].bytes ? a[3].data : nullptr;
    const TilesProblem problem = {a[1].data, a[2].data, bias, a[4].data, n[0],        n[1],
                                  n[2],      n[3],      n[4], n[5],      DType(n[7]), n[6] != 0};
    const TileList list = {a[5].as<int32_t>(), a[6].as<int32_t>(), a[7].as<int32_t>(), int(n[8])};
    return launch_masked_linear_tiles(problem, list, nullptr);
}
