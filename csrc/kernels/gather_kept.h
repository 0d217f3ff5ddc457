// The kept rows and columns of many weights, each as a smaller matrix, in one launch; see gather_kept.cu.
#pragma once
#include "element.h"

namespace sensibert {

// out[i][j] = weight[rows[i]][cols[j]], 0 where bits[i][j] is 0. All row-major without gaps; n*k may be 0.
// An index outside its axis reads nothing and gives NaN.
struct GatherTensor {
    const void* weight;   // [N, K]
    const int64_t* rows;  // [n]; nullptr: n = N, all of them
    const int64_t* cols;  // [k]; nullptr: k = K, all of them
    const int8_t* bits;   // [n, k]; nullptr: no hole
    void* out;            // [n, k]
    int64_t N, K, n, k;   // below 2^31
    DType dtype, out_dtype;
};

// cudaErrorInvalidValue: an axis of 2^31, or n, k that are not N, K without rows, cols.
cudaError_t launch_gather_kept(const GatherTensor* tensors, int64_t num_tensors, cudaStream_t stream);

}  // namespace sensibert
