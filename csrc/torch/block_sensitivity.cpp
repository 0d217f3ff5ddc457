// sensibert::block_sensitivity_ on CUDA tensors, and the pair plan / run that packs the tensors once for many calls.
#include "../kernels/block_sensitivity.h"

#include <algorithm>
#include <cstring>
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
std::vector<BlockSensitivityTensor> describe(const std::vector<Tensor>& weight, const std::vector<Tensor>& grad,
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

// f(plan) for as many plans as the tensors need.
template <typename F>
void for_each_plan(const std::vector<BlockSensitivityTensor>& tensors, Reduce reduce, Finish finish, F&& f) {
    for (size_t done = 0; done < tensors.size();) {
        BlockSensitivityPlan plan;
        const int left = int(std::min(tensors.size() - done, size_t(std::numeric_limits<int>::max())));
        const int taken = plan_block_sensitivity(&tensors[done], left, reduce, finish, &plan);
        STD_TORCH_CHECK(taken > 0, kOp, ": weights[", done, "] has more blocks than the kernel counts (2^31)");
        f(plan);
        done += taken;
    }
}

Tensor floats_like(const Tensor& like, int64_t count) {
    return torch::stable::new_empty(like, {count}, ScalarType::Float);
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
    std::vector<BlockSensitivityTensor> tensors = describe(weight, grad, blocks, reduce);
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
    for_each_plan(tensors, reduce, finish, [&](const BlockSensitivityPlan& plan) {
        const Tensor scratch = floats_like(out[0], plan.num_partials);
        check_launch(launch_block_sensitivity(plan, static_cast<float*>(scratch.mutable_data_ptr()), float(decay),
                                              float(scale), current_stream(device)),
                     kOp);
    });
}

// The tensors packed as kernel parameters, in host memory. out is one buffer: the totals of tensor after tensor.
// Returns (plans as bytes, scratch that serves each of them).
std::tuple<Tensor, Tensor> block_sensitivity_plan_cuda(Tensor out, std::vector<Tensor> weight, std::vector<Tensor> grad,
                                                       std::vector<int64_t> blocks, std::string reduce_word,
                                                       std::string finish_word) {
    const Reduce reduce = parse_reduce(reduce_word);
    std::vector<BlockSensitivityTensor> tensors = describe(weight, grad, blocks, reduce);
    STD_TORCH_CHECK(out.scalar_type() == ScalarType::Float && out.is_contiguous(), kOp,
                    ": out is not contiguous float32");
    float* next = static_cast<float*>(out.mutable_data_ptr());
    int64_t room = out.numel();
    for (BlockSensitivityTensor& t : tensors) {
        t.out = next;
        next += num_totals(t);
        room -= num_totals(t);
    }
    STD_TORCH_CHECK(room == 0, kOp, ": out has ", out.numel(), " values, want ", out.numel() - room);
    std::vector<BlockSensitivityPlan> plans;
    int64_t num_partials = 0;
    for_each_plan(tensors, reduce, parse_finish(finish_word), [&](const BlockSensitivityPlan& plan) {
        plans.push_back(plan);
        num_partials = std::max(num_partials, plan.num_partials);
    });
    const int64_t bytes = int64_t(plans.size() * sizeof(BlockSensitivityPlan));
    const Tensor packed = torch::stable::new_empty(out, {bytes}, ScalarType::Byte, std::nullopt,
                                                   torch::stable::Device(torch::headeronly::DeviceType::CPU));
    if (bytes > 0) memcpy(packed.mutable_data_ptr(), plans.data(), size_t(bytes));
    return {packed, floats_like(out, num_partials)};
}

void block_sensitivity_run_cuda(Tensor out, Tensor packed, Tensor scratch, double decay, double scale) {
    const size_t bytes = size_t(packed.numel());
    STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() &&
                        bytes % sizeof(BlockSensitivityPlan) == 0,
                    kOp, ": plan is not one of this build");
    const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
    const char* plans = static_cast<const char*>(packed.const_data_ptr());
    for (size_t at = 0; at < bytes; at += sizeof(BlockSensitivityPlan)) {
        const BlockSensitivityPlan& plan = *reinterpret_cast<const BlockSensitivityPlan*>(plans + at);
        STD_TORCH_CHECK(scratch.numel() >= plan.num_partials, kOp, ": scratch is ", scratch.numel(), ", want ",
                        plan.num_partials);
        check_launch(launch_block_sensitivity(plan, static_cast<float*>(scratch.mutable_data_ptr()), float(decay),
                                              float(scale), current_stream(out.get_device_index())),
                     kOp);
    }
}

}  // namespace
}  // namespace sensibert

STABLE_TORCH_LIBRARY_IMPL(sensibert, CUDA, m) {
    m.impl("block_sensitivity_", TORCH_BOX(&sensibert::block_sensitivity_cuda));
    m.impl("block_sensitivity_plan", TORCH_BOX(&sensibert::block_sensitivity_plan_cuda));
    m.impl("block_sensitivity_run_", TORCH_BOX(&sensibert::block_sensitivity_run_cuda));
}
