// Runs masked_linear_dweight.cu. arrays: int64 {M, N, K, dy_stride, x_stride, dtype, num_chunks, num_tiles,
// num_dropped}; dy, x, dw; tiles, dropped of the block list. num_chunks 0: what dweight_chunks says, and it is left there.
#include "../../csrc/kernels/masked_linear_dweight.cu"

#include "harness.h"

cudaError_t run(std::vector<Array>& a) {
    using namespace sensibert;
    int64_t* n = a[0].as<int64_t>();
    const int num_chunks = n[6] ? int(n[6]) : n[6] = dweight_chunks(n[0], n[7]);
    const DweightProblem problem = {a[1].data, a[2].data, a[3].data, n[0],        n[1],
                                    n[2],      n[3],      n[4],      DType(n[5]), num_chunks};
    const BlockList list = {a[4].as<int32_t>(), a[5].as<int32_t>(), int(n[7]), int(n[8])};
    const size_t bytes = size_t(dweight_scratch_bytes(n[7], num_chunks));
    void* scratch = malloc(bytes);
    memset(scratch, 0xff, bytes);  // NaN, and -1
    const cudaError_t error = launch_masked_linear_dweight(problem, list, scratch, nullptr);
    free(scratch);
    return error;
}
