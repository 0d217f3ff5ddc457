// sensibert::masked_linear_bits for CUDA: checks, output, launch. The schema is in sensibert/ops/masked_linear/bits.py.
#include "../kernels/masked_linear_bits.h"

#include "common.h"

namespace sensibert {

// Absent where the build leaves Hopper out (SENSIBERT_CUDA_ARCHS): then nothing is registered.
[[gnu::weak]] cudaError_t launch_masked_linear_bits(const BitsProblem&, cudaStream_t);

namespace {

constexpr const char* kOp = "masked_linear_bits";

// A matrix of bytes as TMA reads it, like aligned_rows. pack() of bits.py makes such rows; the bits of
// select_threshold are like that where K is a multiple of 128.
Tensor aligned_bits(const Tensor& t) {
    const bool aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
    if (aligned && t.stride(1) == 1 && t.stride(0) % 16 == 0 && t.stride(0) >= t.size(1)) return t;
    const int64_t num_bytes = t.size(1);
    Tensor rows = torch::stable::new_empty(t, {t.size(0), (num_bytes + 15) / 16 * 16});
    rows = torch::stable::narrow(rows, 1, 0, num_bytes);
    torch::stable::copy_(rows, t);
    return rows;
}

Tensor masked_linear_bits_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                               const Tensor& bits, bool by_columns) {
    const int64_t N = weight.size(by_columns ? 1 : 0), K = weight.size(by_columns ? 0 : 1);
    const DType dtype = dtype_of(x, kOp, "x", 0);
    STD_TORCH_CHECK(dtype != DType::kFloat32 && weight.scalar_type() == x.scalar_type(), kOp,
                    ": x and weight must both be bfloat16, or both float16");
    for (const Tensor* t : {&weight, &bits, bias ? &*bias : &bits})
        STD_TORCH_CHECK(t->is_cuda() && t->get_device_index() == x.get_device_index(), kOp,
                        ": weight, bias and bits must be on the device of x");
    STD_TORCH_CHECK(x.size(-1) == K, kOp, ": x has ", x.size(-1), " columns, want ", K, " as weight");
    STD_TORCH_CHECK(N % 8 == 0 && K % 8 == 0, kOp, ": weight is for ", K, " -> ", N, " features, want multiples of 8");
    STD_TORCH_CHECK(
        bits.scalar_type() == ScalarType::Byte && bits.dim() == 2 && bits.size(0) == N && bits.size(1) == K / 8, kOp,
        ": bits are not uint8 (", N, ", ", K / 8, "), a row for each of the ", N, " output features");
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    shape.back() = N;
    Tensor y = torch::stable::new_empty(x, shape);
    const int64_t M = N ? y.numel() / N : 0;
    if (M == 0) return y;
    const Tensor rows = aligned_rows(torch::stable::reshape(x, {M, K})), w = aligned_rows(weight);
    const Tensor kept = aligned_bits(bits);
    const std::optional<Tensor> b = bias ? std::optional(torch::stable::contiguous(*bias)) : std::nullopt;
    STD_TORCH_CHECK(!b || (b->scalar_type() == x.scalar_type() && b->numel() == N), kOp, ": bias does not fit weight");
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    const BitsProblem problem = {
        .x = rows.const_data_ptr(),
        .w = w.const_data_ptr(),
        .bias = b ? b->const_data_ptr() : nullptr,
        .bits = static_cast<const uint8_t*>(kept.const_data_ptr()),
        .y = y.mutable_data_ptr(),
        .M = M,
        .N = N,
        .K = K,
        .x_stride = rows.stride(0),
        .w_stride = w.stride(0),
        .bits_stride = kept.stride(0),
        .y_stride = N,
        .dtype = dtype,
        .by_columns = by_columns,
        .tile_cols = 0,
    };
    check_launch(launch_masked_linear_bits(problem, current_stream(x.get_device_index())), kOp);
    return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sensibert, CUDA, m) {
    if (launch_masked_linear_bits) m.impl("masked_linear_bits", TORCH_BOX(&masked_linear_bits_cuda));
}

}  // namespace sensibert
