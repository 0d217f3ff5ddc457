// sensibert::masked_linear_tiles for CUDA: checks, output, launch. The schema is in sensibert/ops/masked_linear/tiles.py.
#include "../kernels/masked_linear_tiles.h"

#include "common.h"

namespace sensibert {

// Absent where the build leaves Hopper out (SENSIBERT_CUDA_ARCHS): then nothing is registered.
[[gnu::weak]] cudaError_t launch_masked_linear_tiles(const TilesProblem&, const TileList&, cudaStream_t);

namespace {

constexpr const char* kOp = "masked_linear_tiles";

Tensor tiles_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& offsets,
                  const Tensor& entries, const Tensor& order, int64_t tile_cols, bool by_columns) {
    const int64_t N = weight.size(by_columns ? 1 : 0), K = weight.size(by_columns ? 0 : 1);
    const DType dtype = dtype_of(x, kOp, "x", 0);
    STD_TORCH_CHECK(dtype != DType::kFloat32 && weight.scalar_type() == x.scalar_type(), kOp,
                    ": x and weight must both be bfloat16, or both float16");
    for (const Tensor* t : {&weight, &offsets, &entries, &order})
        STD_TORCH_CHECK(t->is_cuda() && t->get_device_index() == x.get_device_index(), kOp,
                        ": not all tensors are on the device of x");
    STD_TORCH_CHECK(tile_cols == 192 || tile_cols == 256, kOp, ": tile_cols is ", tile_cols, ", want 192 or 256");
    STD_TORCH_CHECK(x.size(-1) == K, kOp, ": x has ", x.size(-1), " columns, want ", K, " as weight");
    STD_TORCH_CHECK(N % 8 == 0 && K % 8 == 0, kOp, ": weight is for ", K, " -> ", N, " features, want multiples of 8");
    const int64_t num_tiles = (N + tile_cols - 1) / tile_cols;
    STD_TORCH_CHECK(offsets.numel() == 2 * num_tiles + 1 && order.numel() == num_tiles, kOp,
                    ": offsets and order are not those of ", num_tiles, " tiles");
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    shape.back() = N;
    Tensor y = torch::stable::new_empty(x, shape);
    const int64_t M = N ? y.numel() / N : 0;
    if (M == 0) return y;
    const Tensor rows = aligned_rows(torch::stable::reshape(x, {M, K})), w = aligned_rows(weight);
    const std::optional<Tensor> b = bias ? std::optional(torch::stable::contiguous(*bias)) : std::nullopt;
    STD_TORCH_CHECK(!b || (b->scalar_type() == x.scalar_type() && b->numel() == N), kOp, ": bias does not fit weight");
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    const TilesProblem problem = {
        .x = rows.const_data_ptr(),
        .w = w.const_data_ptr(),
        .bias = b ? b->const_data_ptr() : nullptr,
        .y = y.mutable_data_ptr(),
        .M = M,
        .N = N,
        .K = K,
        .x_stride = rows.stride(0),
        .w_stride = w.stride(0),
        .y_stride = N,
        .dtype = dtype,
        .by_columns = by_columns,
    };
    const TileList list = {int32_list(offsets, kOp, "offsets"), int32_list(entries, kOp, "entries"),
                           int32_list(order, kOp, "order"), int(tile_cols)};
    check_launch(launch_masked_linear_tiles(problem, list, current_stream(x.get_device_index())), kOp);
    return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sensibert, CUDA, m) {
    if (!launch_masked_linear_tiles) return;
    m.impl("masked_linear_tiles", TORCH_BOX(&tiles_cuda));
}

}  // namespace sensibert
