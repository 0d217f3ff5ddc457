// Columns of activations by index, -1 for a column that is not there; see take_columns.cu.
#pragma once
#include "element.h"

namespace sensibert {

// out[m][j] = x[m][index[j]], or fill[j] where index[j] is below 0. No index may be K or more: x is read there. M*k may
// be 0, and K where no index names a column.
struct TakeProblem {
    const void* x;         // [M, K], rows x_stride elements apart
    const int32_t* index;  // [k]
    const void* fill;      // [k]; nullptr: 0
    void* out;             // [M, k] without gaps
    int64_t M, k, x_stride;
    DType dtype;  // of x, fill and out
};

cudaError_t launch_take_columns(const TakeProblem& problem, cudaStream_t stream);

}  // namespace sensibert
