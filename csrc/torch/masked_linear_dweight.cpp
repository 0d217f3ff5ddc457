// sensibert::masked_linear_tiles_dweight and .._score_ for CUDA: checks, output, scratch, launch. The schemas are in
// sensibert/ops/masked_linear_dweight.py.
#include "../kernels/masked_linear_dweight.h"

#include "common.h"

namespace sensibert {

// Absent where the build leaves Hopper out (SENSIBERT_CUDA_ARCHS): then nothing is registered.
[[gnu::weak]] cudaError_t launch_masked_linear_dweight(const DweightProblem&, const BlockList&, const DweightScore&,
                                                       void*, cudaStream_t);
[[gnu::weak]] int dweight_chunks(int64_t, int64_t);
[[gnu::weak]] int64_t dweight_scratch_bytes(int64_t, int);

namespace {

constexpr const char* kOp = "masked_linear_tiles_dweight";

void want_together(const Tensor& x, std::initializer_list<const Tensor*> others) {
    for (const Tensor* t : others)
        STD_TORCH_CHECK(t->is_cuda() && t->get_device_index() == x.get_device_index(), kOp,
                        ": not all tensors are on the device of x");
}

Tensor run(const Tensor& dy, const Tensor& x, const Tensor& tiles, const Tensor& dropped, const DweightScore& score) {
    const int64_t N = dy.size(-1), K = x.size(-1);
    const DType dtype = dtype_of(x, kOp, "x", 0);
    STD_TORCH_CHECK(dtype != DType::kFloat32 && dy.scalar_type() == x.scalar_type(), kOp,
                    ": dy and x must both be bfloat16, or both float16");
    want_together(x, {&dy, &tiles, &dropped});
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
    check_launch(launch_masked_linear_dweight(problem, list, score, scratch.mutable_data_ptr(),
                                              current_stream(x.get_device_index())),
                 kOp);
    return dw;
}

Tensor dweight_cuda(const Tensor& dy, const Tensor& x, const Tensor& tiles, const Tensor& dropped) {
    return run(dy, x, tiles, dropped, {});
}

Tensor dweight_score_cuda(Tensor out, const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& tiles,
                          const Tensor& dropped, std::string reduce, std::string finish, double decay, double scale) {
    const int64_t N = dy.size(-1), K = x.size(-1);
    STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == N && weight.size(1) == K, kOp, ": weight is not [", N, ", ",
                    K, "]");
    STD_TORCH_CHECK(
        out.scalar_type() == ScalarType::Float && out.is_contiguous() && out.numel() == (N + 63) / 64 * ((K + 63) / 64),
        kOp, ": out is not contiguous float32 with one value a block");
    want_together(x, {&out, &weight});
    const Tensor dense = weight.is_contiguous() ? weight : torch::stable::contiguous(weight);
    const Tensor w = reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 ? torch::stable::clone(dense) : dense;
    const DweightScore score = {
        .out = static_cast<float*>(out.mutable_data_ptr()),
        .w = w.const_data_ptr(),
        .w_dtype = dtype_of(w, kOp, "weight", 0),
        .reduce = parse_word<Reduce>(kOp, "reduce", reduce, {"signed", "abs", "square"}),
        .finish = parse_word<Finish>(kOp, "finish", finish, {"none", "square", "abs"}),
        .decay = float(decay),
        .scale = float(scale),
    };
    return run(dy, x, tiles, dropped, score);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sensibert, CUDA, m) {
    if (!launch_masked_linear_dweight) return;
    m.impl("masked_linear_tiles_dweight", TORCH_BOX(&dweight_cuda));
    m.impl("masked_linear_tiles_dweight_score_", TORCH_BOX(&dweight_score_cuda));
}

}  // namespace sensibert
