// One source, two compilers: nvcc builds it for the GPU, g++ -DSENSIBERT_CUDA_ON_CPU runs the same file under test.
#pragma once
#include <cstddef>
#include <cstdint>

#ifdef SENSIBERT_CUDA_ON_CPU
#include "cuda_on_cpu.h"  // tests/native
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Launches, and is the cudaError_t. `kernel` is one identifier: name an instance first, auto* kernel = f<A, B>.
#define SENSIBERT_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    (kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__), cudaGetLastError())

// T* name = the block's dynamic shared memory, 16-byte aligned.
#define SENSIBERT_DYNAMIC_SHARED(T, name)                       \
    extern __shared__ __align__(16) unsigned char name##_raw[]; \
    T* const name = reinterpret_cast<T*>(name##_raw)

namespace sensibert {

// As many blocks as the GPU holds at once: the grid of a kernel whose blocks loop over their work.
template <typename Kernel>
cudaError_t resident_blocks(Kernel* kernel, int threads, size_t shared_bytes, int* num_blocks) {
    int device = 0, num_sms = 0, per_sm = 0;
    if (cudaError_t e = cudaGetDevice(&device)) return e;
    if (cudaError_t e = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device)) return e;
    if (cudaError_t e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, threads, shared_bytes)) return e;
    *num_blocks = num_sms * (per_sm > 0 ? per_sm : 1);
    return cudaSuccess;
}

}  // namespace sensibert
#endif
