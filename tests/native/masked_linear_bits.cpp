// Runs masked_linear_bits.cu. arrays: int64 {M, N, K, x_stride, w_stride, bits_stride, y_stride, by_columns, dtype,
// tile_cols}; x, w, bias (empty: none), bits, y.
#include "../../csrc/kernels/masked_linear_bits.cu"

#include "harness.h"

cudaError_t run(std::vector<Array>& a) {
    using namespace sensibert;
    const int64_t* n = a[0].as<int64_t>();
    const void* bias = a[3].bytes ? a[3].data : nullptr;
    const BitsProblem problem = {a[1].data, a[2].data, bias, a[4].as<uint8_t>(), a[5].data, n[0],     n[1], n[2], n[3],
                                 n[4],      n[5],      n[6], DType(n[8]),        n[7] != 0, int(n[9])};
    return launch_masked_linear_bits(problem, nullptr);
}
