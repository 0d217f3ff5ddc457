// sensibert::block_sensitivity_ on CUDA tensors: checks, kernel parameters, launches.
#include "../kernels/block_sensitivity.h"

#include <algorithm>
#include <limits>

#include "common.h"

namespace sensibert {
namespace {

constexpr const char* kOp = "block_sensitivity";

Reduce parse_reduce(const std::string& word) {
    return parse_word<Reduce>(kOp, "reduce", word, {"signed", "abs", "square", "grad_square", "weight_square"});
}
Finish parse_finish(const std::string& word) {
    return parse_word<Finish>(kOp, "finish", word, {"none", "square", "abs"});
}

std::vector<int64_t> sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

int64_t num_blocks(int64_t size, int64_t block) { return size == 0 ? 0 : block == 0 ? 1 : (size + block - 1) / block; }

// Everything but `out`. Checks what would otherwise read out of bounds; sensibert.ops words the errors for users.
std::vector<BlockSensitivityTensor> checked(const std::vector<Tensor>& weight, const std::vector<Tensor>& grad,
                                            const std::vector<int64_t>& blocks, Reduce reduce) {
    const bool no_grad = grad.empty() && reduce == Reduce::kWeightSquare;
    STD_TORCH_CHECK(no_grad || grad.size() == weight.size(), kOp, ": grads are ", grad.size(), ", want ",
                    weight.size());
    STD_TORCH_CHECK(blocks.size() == 2 * weight.size(), kOp, ": blocks are ", blocks.size(), ", want ",
                    2 * weight.size());
    std::vector<BlockSensitivityTensor> tensors;
    tensors.reserve(weight.size());
    for (size_t t = 0; t < weight.size(); ++t) {
        const Tensor& w = weight[t];
        const Tensor& g = no_grad ? w : grad[t];
        STD_TORCH_CHECK(w.dim() == 1 || w.dim() == 2, kOp, ": weights[", t, "] has ", w.dim(), " axes, want 1 or 2");
        STD_TORCH_CHECK(sizes_of(w) == sizes_of(g), kOp, ": grads[", t, "] is not of the shape of weights[", t, "]");
        STD_TORCH_CHECK(w.get_device_index() == weight[0].get_device_index() && g.is_cuda() &&
                            g.get_device_index() == weight[0].get_device_index(),
                        kOp, ": weights[", t, "] and its gradient are not on the device of weights[0]");
        STD_TORCH_CHECK(w.is_contiguous() && g.is_contiguous(), kOp, ": weights[", t, "] or its gradient has gaps");
        for (size_t i : {2 * t, 2 * t + 1})
            STD_TORCH_CHECK(blocks[i] >= 0, kOp, ": blocks[", i, "] is ", blocks[i], ", want at least 0");
        tensors.push_back({w.const_data_ptr(), g.const_data_ptr(), nullptr, w.size(0), w.dim() == 2 ? w.size(1) : 1,
                           blocks[2 * t], blocks[2 * t + 1], dtype_of(w, kOp, "weights", t),
                           dtype_of(g, kOp, "grads", t)});
    }
    return tensors;
}

int64_t num_totals(const BlockSensitivityTensor& t) {
    return num_blocks(t.rows, t.block_rows) * num_blocks(t.cols, t.block_cols);
}

void block_sensitivity_cuda(std::vector<Tensor> out, std::vector<Tensor> weight, std::vector<Tensor> grad,
                            std::vector<int64_t> blocks, std::string reduce_word, std::string finish_word, double decay,
                            double scale) {
    const Reduce reduce = parse_reduce(reduce_word);
    const Finish finish = parse_finish(finish_word);
    STD_TORCH_CHECK(out.size() == weight.size(), kOp, ": out has ", out.size(), " tensors, want ", weight.size());
    if (weight.empty()) return;
    for (std::vector<Tensor>* list : {&weight, &grad})
        for (Tensor& t : *list)
            if (!t.is_contiguous()) t = torch::stable::contiguous(t);
    std::vector<BlockSensitivityTensor> tensors = checked(weight, grad, blocks, reduce);
    for (size_t t = 0; t < tensors.size(); ++t) {
        STD_TORCH_CHECK(out[t].scalar_type() == ScalarType::Float && out[t].is_contiguous() &&
                            out[t].numel() == num_totals(tensors[t]) && out[t].is_cuda() &&
                            out[t].get_device_index() == weight[0].get_device_index(),
                        kOp, ": out[", t,
                        "] is not contiguous float32 with one value a block, on the device of weights[0]");
        tensors[t].out = static_cast<float*>(out[t].mutable_data_ptr());
    }
    const int32_t device = weight[0].get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    for (size_t done = 0; done < tensors.size();) {  // as many launches as the tensors need
        BlockSensitivityPlan plan;
        const int left = int(std::min(tensors.size() - done, size_t(std::numeric_limits<int>::max())));
        const int taken = plan_block_sensitivity(&tensors[done], left, reduce, finish, &plan);
        STD_TORCH_CHECK(taken > 0, kOp, ": weights[", done, "] has more blocks than the kernel counts (2^31)");
        const Tensor scratch = torch::stable::new_empty(out[0], {plan.num_partials}, ScalarType::Float);
        check_launch(launch_block_sensitivity(plan, static_cast<float*>(scratch.mutable_data_ptr()), float(decay),
                                              float(scale), current_stream(device)),
                     kOp);
        done += taken;
    }
}

}  // namespace
}  // namespace sensibert

STABLE_TORCH_LIBRARY_IMPL(sensibert, CUDA, m) {
    m.impl("block_sensitivity_", TORCH_BOX(&sensibert::block_sensitivity_cuda));
}
