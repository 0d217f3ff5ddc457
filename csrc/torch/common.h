// What every binding needs: dtypes, the current stream, and launch errors as exceptions. LibTorch stable ABI only.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "../kernels/element.h"

namespace sensibert {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// fp32, bf16 or fp16 of `name`[index], or nothing: the kernels take no other dtype.
inline DType dtype_of(const Tensor& t, const char* op, const char* name, size_t index) {
    switch (t.scalar_type()) {
        case ScalarType::Float: return DType::kFloat32;
        case ScalarType::BFloat16: return DType::kBFloat16;
        case ScalarType::Half: return DType::kFloat16;
        default: break;
    }
    STD_TORCH_CHECK(false, op, ": ", name, "[", index, "] is of a dtype the CUDA kernel does not take, want float32, ",
                    "bfloat16 or float16");
    return DType::kFloat32;
}

inline cudaStream_t current_stream(int32_t device) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    return static_cast<cudaStream_t>(stream);
}

inline void check_launch(cudaError_t error, const char* op) {
    STD_TORCH_CHECK(error == cudaSuccess, op, ": the launch failed: ", cudaGetErrorString(error),
                    error == cudaErrorNoKernelImageForDevice
                        ? "; build for this GPU with SENSIBERT_CUDA_ARCHS, or set SENSIBERT_NO_NATIVE=1"
                        : "");
}

// The enumerator whose place `word` has among `words`.
template <typename Word>
Word parse_word(const char* op, const char* argument, const std::string& word,
                std::initializer_list<const char*> words) {
    int code = 0;
    for (const char* known : words) {
        if (word == known) return Word(code);
        ++code;
    }
    STD_TORCH_CHECK(false, op, ": ", argument, " is ", word, ", which the kernel does not know");
    return Word(0);
}

// A matrix as TMA reads it: dense rows from 16-byte aligned addresses on. A copy where `t` is not.
inline Tensor aligned_rows(const Tensor& t) {
    const bool aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
    if (aligned && t.stride(1) == 1 && t.stride(0) % 8 == 0 && t.stride(0) >= t.size(1)) return t;
    return t.is_contiguous() ? torch::stable::clone(t) : torch::stable::contiguous(t);
}

inline const int32_t* int32_list(const Tensor& t, const char* op, const char* name) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.is_contiguous(), op, ": ", name,
                    " is not contiguous int32");
    return static_cast<const int32_t*>(t.const_data_ptr());
}

}  // namespace sensibert
