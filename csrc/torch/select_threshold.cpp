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

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void select_threshold_cuda(std::vector<Tensor> keep, std::vector<Tensor> bits, std::vector<Tensor> occupancy,
                           Tensor threshold, Tensor num_nan, std::vector<Tensor> scores, int64_t k, int64_t tile_rows,
                           int64_t tile_cols) {
    const int32_t device = threshold.get_device_index();
    want(threshold, ScalarType::Float, 1, device, "threshold", 0);
    want(num_nan, ScalarType::Long, 1, device, "num_nan", 0);
    STD_TORCH_CHECK(keep.size() == scores.size(), kOp, ": keep has ", keep.size(), " tensors, want ", scores.size());
    for (const std::vector<Tensor>* list : {&bits, &occupancy})
        STD_TORCH_CHECK(list->empty() || list->size() == scores.size(), kOp, ": ", list == &bits ? "bits" : "occupancy",
                        " has ", list->size(), " tensors, want 0 or ", scores.size());
    STD_TORCH_CHECK(occupancy.empty() || (tile_rows > 0 && tile_cols > 0), kOp, ": tile is (", tile_rows, ", ",
                    tile_cols, "), want two sizes of at least 1");

    std::vector<SelectTensor> tensors(scores.size());
    int64_t num_scores = 0;
    for (size_t t = 0; t < scores.size(); ++t) {
        if (!scores[t].is_contiguous()) scores[t] = torch::stable::contiguous(scores[t]);
        const Tensor& s = scores[t];
        const bool matrix = s.dim() <= 2;  // else only keep is wanted, and the shape does not matter
        STD_TORCH_CHECK(matrix || (bits.empty() && occupancy.empty()), kOp, ": scores[", t, "] has ", s.dim(),
                        " axes, want at most 2 for bits or tile");
        STD_TORCH_CHECK(s.is_cuda() && s.get_device_index() == device, kOp, ": scores[", t,
                        "] is not on the device of threshold");
        SelectTensor& entry = tensors[t];
        entry.N = matrix && s.dim() > 0 ? s.size(0) : 1;
        entry.K = !matrix ? s.numel() : s.dim() == 2 ? s.size(1) : 1;
        entry.dtype = dtype_of(s, kOp, "scores", t);
        entry.scores = s.const_data_ptr();
        want(keep[t], ScalarType::Bool, s.numel(), device, "keep", t);
        entry.keep = static_cast<uint8_t*>(keep[t].mutable_data_ptr());
        if (!bits.empty()) {
            want(bits[t], ScalarType::Byte, entry.N * ceil_div(entry.K, 8), device, "bits", t);
            entry.bits = static_cast<uint8_t*>(bits[t].mutable_data_ptr());
        }
        if (!occupancy.empty()) {
            const int64_t num_tiles = ceil_div(entry.N, tile_rows) * ceil_div(entry.K, tile_cols);
            want(occupancy[t], ScalarType::Byte, num_tiles, device, "occupancy", t);
            entry.occupancy = static_cast<uint8_t*>(occupancy[t].mutable_data_ptr());
        }
        num_scores += s.numel();
    }
    STD_TORCH_CHECK(0 <= k && k <= num_scores, kOp, ": k is ", k, ", want an int in [0, ", num_scores, "]");

    const SelectProblem problem{tensors.data(),
                                int64_t(tensors.size()),
                                k,
                                tile_rows,
                                tile_cols,
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
