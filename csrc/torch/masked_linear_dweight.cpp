// sensibert::masked_linear_tiles_dweight for CUDA: checks, output, scratch, launch. The schema is in
// sensibert/ops/masked_linear/dweight.py.
#include "../kernels/masked_linear_dweight.h"

#include "common.h"

namespace sensibert {

// Absent where the build leaves Hopper out (SENSIBERT_CUDA_ARCHS): then nothing is registered.
[[gnu::weak]] cudaError_t launch_masked_linear_dweight(const DweightProblem&, const BlockList&, void*, cudaStream_t);
[[gnu::weak]] int dweight_chunks(int64_t, int64_t);
[[gnu::weak]] int64_t dweight_scratch_bytes(int64_t, int);

namespace {

constexpr const char* kOp = "masked_linear_tiles_dweight";

Tensor dweight_cuda(const Tensor& dy, const Tensor& x, const Tensor& tiles, const Tensor& dropped) {
    const int64_t N = dy.size(-1), K = x.size(-1);
    const DType dtype = dtype_of(x, kOp, "x", 0);
    STD_TORCH_CHECK(dtype != DType::kFloat32 && dy.scalar_type() == x.scalar_type(), kOp,
                    ": dy and x must both be bfloat16, or both float16");
    for (const Tensor* t : {&dy, &tiles, &dropped})
        STD_TORCH_CHECK(t->is_cuda() && t->get_device_index() == x.get_device_index(), kOp,
                        ": not all tensors are on the device of x");
    STD_TORCH_CHECK(N % 8 == 0 && K % 8 == 0, kOp, ": the weight is for ", K, " -> ", N,
                    " features, want multiples of 8");
    STD_TORCH_CHECK(tiles.dim() == 2 && tiles.size(1) == kDweightTileWords, kOp, ": tiles is not [.., ",
                    kDweightTileWords, "]");
    Tensor dw = torch::stable::new_empty(x, {N, K});
    if (N == 0 || K == 0) return dw;
    const int64_t M = x.numel() / K;
    STD_TORCH_CHECK(dy.numel() == M * N, kOp, ": dy has ", dy.numel() / N, " rows, want ", M, " as x");
    const Tensor dy_rows = aligned_rows(torch::stable::reshape(dy, {M, N}));
    const Tensor x_rows = aligned_rows(torch::stable::reshape(x, {M, K}));
    const BlockList list = {int32_list(tiles, kOp, "tiles"), int32_list(dropped, kOp, "dropped"),
                            int32_t(tiles.size(0)), int32_t(dropped.numel())};
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    const DweightProblem problem = {
        .dy = dy_rows.const_data_ptr(),
        .x = x_rows.const_data_ptr(),
        .dw = dw.mutable_data_ptr(),
        .M = M,
        .N = N,
        .K = K,
        .dy_stride = dy_rows.stride(0),
        .x_stride = x_rows.stride(0),
        .dtype = dtype,
        .num_chunks = dweight_chunks(M, list.num_tiles),
    };
    const int64_t bytes = dweight_scratch_bytes(list.num_tiles, problem.num_chunks);
    const Tensor scratch = torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
    check_launch(
        launch_masked_linear_dweight(problem, list, scratch.mutable_data_ptr(), current_stream(x.get_device_index())),
        kOp);
    return dw;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sensibert, CUDA, m) {
    if (!launch_masked_linear_dweight) return;
    m.impl("masked_linear_tiles_dweight", TORCH_BOX(&dweight_cuda));
}

}  // namespace sensibert
