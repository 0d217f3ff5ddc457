// Runs masked_linear_tiles.cu. arrays: int64 {M, N, K, x_stride, w_stride, y_stride, tile_cols, dtype}; x, w, bias (empty:
// none), y; offsets, entries, order of the tile list.
#include "../../csrc/kernels/masked_linear_tiles.cu"

#include "harness.h"

cudaError_t run(std::vector<Array>& a) {
    using namespace sensibert;
    const int64_t* size = a[0].as<int64_t>();
    const TileList list = {a[5].as<int32_t>(), a[6].as<int32_t>(), a[7].as<int32_t>(), int(size[6])};
    return launch_masked_linear_tiles(a[1].data, size[3], a[2].data, size[4], a[3].bytes ? a[3].data : nullptr,
                                      a[4].data, size[5], size[0], size[1], size[2], DType(size[7]), list, nullptr);
}
