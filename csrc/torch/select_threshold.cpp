// sensibert::select_threshold_ on CUDA: checks what the kernel relies on, packs pointers, launches.
#include "../kernels/select_threshold.h"

#include "common.h"

namespace sensibert {
namespace {

constexpr const char* kOp = "select_threshold";

void want(const Tensor& t, ScalarType dtype, int64_t numel, int32_t device, const char* name, size_t index) {
    const bool fits = t.scalar_type() == dtype && t.numel() == numel && t.is_contiguous() && t.is_cuda() &&
                      t.get_device_index() == device;
    STD_TORCH_CHECK(fits, kOp, ": ", name, "[", index, "] is not ", numel,
                    " contiguous elements of the documented dtype on the device of threshold (it has ", t.numel(), ")");
}

void select_threshold_cuda(std::vector<Tensor> keep, Tensor threshold, Tensor num_nan, std::vector<Tensor> scores,
                           int64_t k) {
    const int32_t device = threshold.get_device_index();
    want(threshold, ScalarType::Float, 1, device, "threshold", 0);
    want(num_nan, ScalarType::Long, 1, device, "num_nan", 0);
    STD_TORCH_CHECK(keep.size() == scores.size(), kOp, ": keep has ", keep.size(), " tensors, want ", scores.size());

    std::vector<SelectTensor> tensors(scores.size());
    int64_t num_scores = 0;
    for (size_t t = 0; t < scores.size(); ++t) {
        if (!scores[t].is_contiguous()) scores[t] = torch::stable::contiguous(scores[t]);
        const Tensor& s = scores[t];
        STD_TORCH_CHECK(s.is_cuda() && s.get_device_index() == device, kOp, ": scores[", t,
                        "] is not on the device of threshold");
        SelectTensor& entry = tensors[t];
        entry.size = s.numel();
        entry.dtype = dtype_of(s, kOp, "scores", t);
        entry.scores = s.const_data_ptr();
        want(keep[t], ScalarType::Bool, s.numel(), device, "keep", t);
        entry.keep = static_cast<uint8_t*>(keep[t].mutable_data_ptr());
        num_scores += s.numel();
    }
    STD_TORCH_CHECK(0 <= k && k <= num_scores, kOp, ": k is ", k, ", want an int in [0, ", num_scores, "]");

    const SelectProblem problem{tensors.data(), int64_t(tensors.size()), k,
                                static_cast<float*>(threshold.mutable_data_ptr()),
                                static_cast<int64_t*>(num_nan.mutable_data_ptr())};
    const torch::stable::accelerator::DeviceGuard guard(device);
    size_t bytes = 0;
    check_launch(select_threshold_scratch_bytes(problem, &bytes), kOp);
    const Tensor scratch = torch::stable::new_empty(threshold, {int64_t(bytes)}, ScalarType::Byte);
    check_launch(launch_select_threshold(problem, scratch.mutable_data_ptr(), current_stream(device)), kOp);
}

}  // namespace
}  // namespace sensibert

STABLE_TORCH_LIBRARY_IMPL(sensibert, CUDA, m) {
    m.impl("select_threshold_", TORCH_BOX(&sensibert::select_threshold_cuda));
}
