// arrays: reduce, finish (int64); decay, scale (float); shapes (int64, 8 a tensor: rows, cols, block rows, block cols,
// dtype of weight and grad, elements to skip at the front of each); then weight, grad, out of each tensor.
#include "../../csrc/kernels/block_sensitivity.cu"

#include "harness.h"

using namespace sensibert;

cudaError_t run(std::vector<Array>& a) {
    const Reduce reduce = Reduce(a[0].as<int64_t>()[0]);
    const Finish finish = Finish(a[0].as<int64_t>()[1]);
    const float decay = a[1].as<float>()[0], scale = a[1].as<float>()[1];
    std::vector<BlockSensitivityTensor> tensors;
    for (int t = 0; 3 * t + 3 < int(a.size()); ++t) {
        const int64_t* s = a[2].as<int64_t>() + 8 * t;
        const DType weight_dtype = DType(s[4]), grad_dtype = DType(s[5]);
        tensors.push_back({a[3 * t + 3].data + s[6] * element_size(weight_dtype),
                           a[3 * t + 4].data + s[7] * element_size(grad_dtype), a[3 * t + 5].as<float>(), s[0], s[1],
                           s[2], s[3], weight_dtype, grad_dtype});
    }
    int done = 0;
    while (done < int(tensors.size())) {
        BlockSensitivityPlan plan;
        const int taken = plan_block_sensitivity(&tensors[done], int(tensors.size()) - done, reduce, finish, &plan);
        if (taken == 0) return cudaErrorInvalidValue;
        std::vector<float> scratch(plan.num_partials, NAN);
        if (cudaError_t e = launch_block_sensitivity(plan, scratch.data(), decay, scale, nullptr)) return e;
        done += taken;
    }
    return cudaSuccess;
}
