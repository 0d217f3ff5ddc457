// Runs csrc/kernels/masked_adamw.cu. arrays: meta int64 [num_tensors, num_groups, reduce, finish, has_factor], settings
// fp64 [num_groups, 4], lr fp32 [num_groups], numbers fp32 [factor, decay, scale]; then for each tensor: entry int64
// [N, K, dtype, group, keep_rows, keep_cols, score_rows, score_cols, skip, copy_rows, copy_cols], param, grad,
// exp_avg, exp_avg_sq, step, keep, copy, score, row_map, col_map. Empty keep, copy, score, maps: not wanted. The
// four big ones start `skip` elements into their array.
#include "../../csrc/kernels/masked_adamw.cu"

#include "harness.h"

cudaError_t run(std::vector<Array>& arrays) {
    using namespace sensibert;
    const int64_t* const meta = arrays[0].as<int64_t>();
    std::vector<AdamWGroup> groups;
    for (int64_t g = 0; g < meta[1]; ++g) {
        const double* const s = arrays[1].as<double>() + 4 * g;
        groups.push_back({s[0], s[1], s[2], s[3]});
    }
    std::vector<AdamWTensor> tensors;
    for (int64_t t = 0; t < meta[0]; ++t) {
        const Array* const a = &arrays[4 + 11 * t];
        const int64_t* const entry = a[0].as<int64_t>();
        const DType dtype = DType(entry[2]);
        const int64_t skip = entry[8] * element_size(dtype);
        const auto wanted = [](const Array& array) { return array.bytes ? array.data : nullptr; };
        tensors.push_back({a[1].data + skip,
                           a[2].data + skip,
                           a[3].data + skip,
                           a[4].data + skip,
                           a[5].as<float>(),
                           entry[0],
                           entry[1],
                           dtype,
                           int(entry[3]),
                           reinterpret_cast<const uint8_t*>(wanted(a[6])),
                           entry[4],
                           entry[5],
                           reinterpret_cast<__nv_bfloat16*>(wanted(a[7])),
                           reinterpret_cast<float*>(wanted(a[8])),
                           entry[6],
                           entry[7],
                           reinterpret_cast<const int32_t*>(wanted(a[9])),
                           reinterpret_cast<const int32_t*>(wanted(a[10])),
                           entry[9],
                           entry[10]});
    }
    float* const numbers = arrays[3].as<float>();
    const AdamWProblem problem{tensors.data(),
                               int64_t(tensors.size()),
                               groups.data(),
                               int64_t(groups.size()),
                               arrays[2].as<float>(),
                               meta[4] ? numbers : nullptr,
                               Reduce(meta[2]),
                               Finish(meta[3]),
                               numbers[1],
                               numbers[2]};
    std::vector<char> scratch(masked_adamw_scratch_bytes(problem),
                              char(0xff));  // NaN: what is not written must not count
    return launch_masked_adamw(problem, reinterpret_cast<float*>(scratch.data()), nullptr);
}
