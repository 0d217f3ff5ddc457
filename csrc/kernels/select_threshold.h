// Keeps exactly the k largest of many score tensors; see select_threshold.cu. Launchers do not wait for the device.
#pragma once
#include "element.h"

namespace sensibert {

// One score tensor. Its size may be 0; then no pointer is read.
struct SelectTensor {
    const void* scores;  // [size]
    uint8_t* keep;       // [size], 0 or 1
    int64_t size;
    DType dtype;
};

struct SelectProblem {
    const SelectTensor* tensors;  // [num_tensors], read before the launcher returns
    int64_t num_tensors;
    int64_t k;         // in [0, sum of sizes]
    float* threshold;  // on the device, 1
    int64_t* num_nan;  // on the device, 1
};

// Bytes of device memory that the launcher needs, 16-byte aligned, not initialised.
cudaError_t select_threshold_scratch_bytes(const SelectProblem& problem, size_t* bytes);

// cudaErrorInvalidValue: k out of range, or more than 2^44 places.
cudaError_t launch_select_threshold(const SelectProblem& problem, void* scratch, cudaStream_t stream);

}  // namespace sensibert
