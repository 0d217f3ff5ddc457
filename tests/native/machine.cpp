// Small kernels that probe cuda_on_cpu.h itself. arrays: what to run (int32), input, output.
#include "harness.h"

namespace {

// out[b] = sum of in[b, :], by shuffles and shared memory; `barrier` false forgets the __syncthreads.
__global__ void row_sum_kernel(const float* in, float* out, int K, bool barrier) {
    __shared__ float part[4];
    float sum = 0.f;
    for (int k = threadIdx.x; k < K; k += blockDim.x) sum += in[blockIdx.x * K + k];
    for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
    if (barrier) __syncthreads();
    if (threadIdx.x == 0) out[blockIdx.x] = part[0] + part[1] + part[2] + part[3];
}

__global__ void divergent_kernel(float* out) {
    if (threadIdx.x < 32) __syncthreads();
    out[threadIdx.x] = 1.f;
}

__global__ void misaligned_kernel(const float* in, float* out) { out[0] = reinterpret_cast<const float4*>(in + 1)->x; }

__global__ void overrun_kernel(const float* in, float* out, int n) { out[threadIdx.x % n] = in[n + threadIdx.x / 128]; }

// A warp passes values through dynamic shared memory; `barrier` false forgets the __syncwarp.
__global__ void warp_pass_kernel(const float* in, float* out, bool barrier) {
    SENSIBERT_DYNAMIC_SHARED(float, row);
    row[threadIdx.x] = in[threadIdx.x];
    if (barrier) __syncwarp();
    out[threadIdx.x] = row[threadIdx.x ^ 1];
}

// out: votes, matches, a scan and integer atomics of one warp and of the block.
__global__ void words_kernel(const int* in, int* out) {
    const int lane = threadIdx.x % 32, v = in[threadIdx.x];
    const unsigned full = 0xffffffffu;
    int scan = v;
    for (int d = 1; d < 32; d *= 2) {
        const int other = __shfl_up_sync(full, scan, d);
        if (lane >= d) scan += other;
    }
    atomicAdd(&out[0], v);
    atomicMax(&out[1], v);
    if (threadIdx.x >= 32) return;
    const unsigned votes = __ballot_sync(full, v > 0);
    if (lane == 0) out[2] = int(votes);
    const int same = __popc(__match_any_sync(full, v)), down = __shfl_down_sync(full, v, 1, 8);
    const int upper = lane < 16 ? 0 : __reduce_add_sync(0xffff0000u, v);
    const int bits[] = {scan, same, down, upper, __clz(v), __ffs(v)};
    for (int i = 0; i < 6; ++i) out[3 + 32 * i + lane] = bits[i];
}

__global__ void round_kernel(const float* in, float* bf16, float* fp16, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        bf16[i] = __bfloat162float(__float2bfloat16_rn(in[i]));
        fp16[i] = __half2float(__float2half_rn(in[i]));
    }
}

}  // namespace

cudaError_t run(std::vector<Array>& a) {
    const int what = *a[0].as<int>();
    const float* in = a[1].as<float>();
    float* out = a[2].as<float>();
    const int rows = int(a[2].count<float>()), n = int(a[1].count<float>());
    switch (what) {
        case 0:
        case 1:
            return SENSIBERT_LAUNCH(row_sum_kernel, dim3(rows), dim3(128), 0, nullptr, in, out, n / rows, what == 0);
        case 2: return SENSIBERT_LAUNCH(divergent_kernel, dim3(1), dim3(64), 0, nullptr, out);
        case 3: return SENSIBERT_LAUNCH(misaligned_kernel, dim3(1), dim3(1), 0, nullptr, in, out);
        case 4: return SENSIBERT_LAUNCH(overrun_kernel, dim3(1), dim3(128), 0, nullptr, in, out, n);
        case 5:
        case 6: return SENSIBERT_LAUNCH(warp_pass_kernel, dim3(1), dim3(32), 128, nullptr, in, out, what == 5);
        case 7: return SENSIBERT_LAUNCH(words_kernel, dim3(1), dim3(64), 0, nullptr, a[1].as<int>(), a[2].as<int>());
        case 8: return SENSIBERT_LAUNCH(round_kernel, dim3(1), dim3(64), 0, nullptr, in, out, a[3].as<float>(), n);
        default: return SENSIBERT_LAUNCH(divergent_kernel, dim3(0), dim3(64), 0, nullptr, out);
    }
}
