// Element types of the memory-bound kernels: fp32, bf16, fp16 in memory, fp32 in registers, four elements at a time.
#pragma once
#include "portable.h"

namespace sensibert {

enum class DType : uint8_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

template <typename T>
struct TypeTag {
    using type = T;
};

#pragma nv_exec_check_disable
// f(TypeTag<float | __nv_bfloat16 | __half>{}): a run-time dtype becomes a template argument.
template <typename F>
__host__ __device__ __forceinline__ void dispatch_dtype(DType dtype, F&& f) {
    switch (dtype) {
        case DType::kFloat32: f(TypeTag<float>{}); break;
        case DType::kBFloat16: f(TypeTag<__nv_bfloat16>{}); break;
        case DType::kFloat16: f(TypeTag<__half>{}); break;
    }
}

__host__ __device__ __forceinline__ int element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
    return __float2half_rn(x);
}

constexpr int kQuad = 4;  // elements a thread moves at once: 16 bytes of fp32, 8 bytes of bf16 or fp16

struct Quad {
    float x[kQuad];
};

// p is aligned to four elements.
__device__ __forceinline__ Quad load_quad(const float* p) {
    const float4 v = *reinterpret_cast<const float4*>(p);
    return {{v.x, v.y, v.z, v.w}};
}
template <typename T>
__device__ __forceinline__ Quad load_quad(const T* p) {
    static_assert(sizeof(T) == 2, "a quad of 16-bit elements is 8 bytes");
    const uint2 v = *reinterpret_cast<const uint2*>(p);
    T half[kQuad];
    memcpy(half, &v, sizeof v);
    return {{to_float(half[0]), to_float(half[1]), to_float(half[2]), to_float(half[3])}};
}

__device__ __forceinline__ void store_quad(float* p, const Quad& q) {
    *reinterpret_cast<float4*>(p) = make_float4(q.x[0], q.x[1], q.x[2], q.x[3]);
}
template <typename T>
__device__ __forceinline__ void store_quad(T* p, const Quad& q) {
    static_assert(sizeof(T) == 2, "a quad of 16-bit elements is 8 bytes");
    const T half[kQuad] = {from_float<T>(q.x[0]), from_float<T>(q.x[1]), from_float<T>(q.x[2]), from_float<T>(q.x[3])};
    uint2 v;
    memcpy(&v, half, sizeof v);
    *reinterpret_cast<uint2*>(p) = v;
}

// Whether quads may be used from p on.
__host__ __device__ __forceinline__ bool quad_aligned(const void* p, DType dtype) {
    return reinterpret_cast<uintptr_t>(p) % (kQuad * element_size(dtype)) == 0;
}

}  // namespace sensibert
