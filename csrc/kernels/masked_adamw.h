// One AdamW step over many tensors, with masks, a bf16 working copy and sensitivities; see masked_adamw.cu.
#pragma once
#include "block_sensitivity.h"  // Reduce, Finish

namespace sensibert {

// One parameter [N, K], row-major, with its gradient and moments in the same dtype and layout. N*K may be 0.
// Block sizes: 0 = the whole axis. N and K are below 2^31 where keep, score or a map is wanted.
struct AdamWTensor {
    void* param;
    const void* grad;
    void* exp_avg;
    void* exp_avg_sq;
    const float* step;  // the number of this step, 1 for the first
    int64_t N, K;
    DType dtype;
    int group;

    const uint8_t* keep;  // [ceil(N / keep_rows), ceil(K / keep_cols)], 0 or 1; nullptr: all survive
    int64_t keep_rows, keep_cols;
    __nv_bfloat16* copy;  // [N, K], or [copy_rows, copy_cols] where there is a map; nullptr: not wanted
    float* score;         // [ceil(N / score_rows), ceil(K / score_cols)]; nullptr: not wanted
    int64_t score_rows, score_cols;

    const int32_t* row_map;  // [N]: the row of the working copy that each row has, or -1; nullptr: its own
    const int32_t* col_map;  // [K]: likewise
    int64_t copy_rows, copy_cols;
};

struct AdamWGroup {
    double beta1, beta2, eps, weight_decay;
};

struct AdamWProblem {
    const AdamWTensor* tensors;  // [num_tensors], read before the launcher returns
    int64_t num_tensors;
    const AdamWGroup* groups;  // [num_groups], read before the launcher returns
    int64_t num_groups;        // below 2^16
    const float* lr;           // on the device, [num_groups]
    const float* grad_factor;  // on the device, 1; nullptr: 1
    Reduce reduce;
    Finish finish;
    float decay, scale;
};

// Bytes of device memory that the launcher needs, not initialised: partial sums of the scores.
size_t masked_adamw_scratch_bytes(const AdamWProblem& problem);

// cudaErrorInvalidValue: 2^16 groups, or a keep, score or map on an axis of 2^31.
cudaError_t launch_masked_adamw(const AdamWProblem& problem, float* scratch, cudaStream_t stream);

}  // namespace sensibert
