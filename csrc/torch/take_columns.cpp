// sensibert::take_columns for CUDA: checks, output, launch. The schema is in sensibert/ops/masked_linear/take_columns.py.
#include "../kernels/take_columns.h"

#include "common.h"

namespace sensibert {
namespace {

constexpr const char* kOp = "take_columns";

void want_list(const Tensor& t, const Tensor& x, const char* name) {
    STD_TORCH_CHECK(t.dim() == 1, kOp, ": ", name, " has ", t.dim(), " axes, want 1");
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == x.get_device_index(), kOp, ": ", name,
                    " is not on the device of x");
}

Tensor take_columns_cuda(const Tensor& x, const Tensor& index, const std::optional<Tensor>& fill) {
    const DType dtype = dtype_of(x, kOp, "x", 0);
    STD_TORCH_CHECK(x.dim() > 0, kOp, ": x has no axis, want [.., K]");
    want_list(index, x, "index");
    const int64_t K = x.size(-1), k = index.numel();
    const Tensor from = torch::stable::contiguous(index);
    const int32_t* const places = int32_list(from, kOp, "index");
    if (fill) {
        want_list(*fill, x, "fill");
        STD_TORCH_CHECK(fill->scalar_type() == x.scalar_type() && fill->numel() == k, kOp, ": fill is not ", k,
                        " elements of the dtype of x");
    }
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    shape.back() = k;
    Tensor out = torch::stable::new_empty(x, shape);
    const int64_t M = k ? out.numel() / k : 0;
    if (M == 0) return out;
    Tensor rows = torch::stable::reshape(x, {M, K});
    if (K > 1 && rows.stride(1) != 1) rows = torch::stable::contiguous(rows);
    const std::optional<Tensor> other = fill ? std::optional(torch::stable::contiguous(*fill)) : std::nullopt;
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    const TakeProblem problem = {
        .x = rows.const_data_ptr(),
        .index = places,
        .fill = other ? other->const_data_ptr() : nullptr,
        .out = out.mutable_data_ptr(),
        .M = M,
        .k = k,
        .x_stride = rows.stride(0),
        .dtype = dtype,
    };
    check_launch(launch_take_columns(problem, current_stream(x.get_device_index())), kOp);
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sensibert, CUDA, m) { m.impl("take_columns", TORCH_BOX(&take_columns_cuda)); }

}  // namespace sensibert
