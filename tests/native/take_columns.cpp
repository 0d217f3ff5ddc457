// Runs csrc/kernels/take_columns.cu. arrays for each launch: entry int64 [M, k, x_stride, dtype, skip], x, index, fill,
// out. Empty fill: 0. x and out start skip elements into their array.
#include "../../csrc/kernels/take_columns.cu"

#include "harness.h"

cudaError_t run(std::vector<Array>& arrays) {
    using namespace sensibert;
    for (size_t i = 0; i < arrays.size(); i += 5) {
        const Array* const a = &arrays[i];
        const int64_t* const e = a[0].as<int64_t>();
        const DType dtype = DType(e[3]);
        const int64_t front = e[4] * element_size(dtype);
        const TakeProblem problem = {a[1].data + front,
                                     a[2].as<int32_t>(),
                                     a[3].bytes ? a[3].data : nullptr,
                                     a[4].data + front,
                                     e[0],
                                     e[1],
                                     e[2],
                                     dtype};
        if (cudaError_t error = launch_take_columns(problem, nullptr)) return error;
    }
    return cudaSuccess;
}
