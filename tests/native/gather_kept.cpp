// Runs csrc/kernels/gather_kept.cu. arrays for each tensor: entry int64 [N, K, n, k, dtype, out_dtype, has_rows,
// has_cols, skip, out_skip], weight, rows, cols, bits, out. Empty bits: no hole. weight and out start so many elements
// into their array.
#include "../../csrc/kernels/gather_kept.cu"

#include "harness.h"

cudaError_t run(std::vector<Array>& arrays) {
    using namespace sensibert;
    std::vector<GatherTensor> tensors;
    for (size_t i = 0; i < arrays.size(); i += 6) {
        const Array* const a = &arrays[i];
        const int64_t* const e = a[0].as<int64_t>();
        const DType dtype = DType(e[4]), out_dtype = DType(e[5]);
        tensors.push_back({a[1].data + e[8] * element_size(dtype), e[6] ? a[2].as<int64_t>() : nullptr,
                           e[7] ? a[3].as<int64_t>() : nullptr, a[4].bytes ? a[4].as<int8_t>() : nullptr,
                           a[5].data + e[9] * element_size(out_dtype), e[0], e[1], e[2], e[3], dtype, out_dtype});
    }
    return launch_gather_kept(tensors.data(), int64_t(tensors.size()), nullptr);
}
