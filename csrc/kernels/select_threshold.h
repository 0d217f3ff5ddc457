// Keeps exactly the k largest of many score tensors; see select_threshold.cu. Launchers do not wait for the device.
#pragma once
#include "element.h"

namespace sensibert {

// One score tensor. N*K may be 0; then no pointer is read.
struct SelectTensor {
    const void* scores;  // [N, K] row-major
    uint8_t* keep;       // [N, K], 0 or 1
    uint8_t* bits;       // [N, ceil(K / 8)], or nullptr: not wanted
    uint8_t* occupancy;  // [ceil(N / tile_rows), ceil(K / tile_cols)], or nullptr: not wanted
    int64_t N, K;
    DType dtype;
};

struct SelectProblem {
    const SelectTensor* tensors;  // [num_tensors], read before the launcher returns
    int64_t num_tensors;
    int64_t k;                     // in [0, sum of N*K]
    int64_t tile_rows, tile_cols;  // at least 1 where occupancy is wanted
    float* threshold;              // on the device, 1
    int64_t* num_nan;              // on the device, 1
};

// Bytes of device memory that the launcher needs, 16-byte aligned, not initialised.
cudaError_t select_threshold_scratch_bytes(const SelectProblem& problem, size_t* bytes);

// cudaErrorInvalidValue: k out of range, or more than 2^44 places.
cudaError_t launch_select_threshold(const SelectProblem& problem, void* scratch, cudaStream_t stream);

}  // namespace sensibert
