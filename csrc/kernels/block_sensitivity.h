// One number per block of every tensor of a model, in one launch and at most one finishing launch.
#pragma once
#include "element.h"

namespace sensibert {

enum class Reduce : uint8_t { kSigned, kAbs, kSquare, kGradSquare, kWeightSquare };
enum class Finish : uint8_t { kNone, kSquare, kAbs };

struct BlockSensitivityTensor {
    const void* weight;  // [rows, cols], contiguous
    const void* grad;    // the same; not read for kWeightSquare
    float* out;          // [ceil(rows / block_rows), ceil(cols / block_cols)]
    int64_t rows, cols;
    int64_t block_rows, block_cols;  // 0 = the whole axis
    DType weight_dtype, grad_dtype;
};

// How a tensor is read. A block of whole rows is one contiguous segment.
enum class Walk : uint8_t { kElement, kWarpSegment, kBlockSegment, kTile };

struct BlockSensitivityEntry {
    const void* a;  // the two factors of a term
    const void* b;
    float* out;
    int64_t rows, cols;              // both at least 1
    int64_t block_rows, block_cols;  // 1 .. rows, 1 .. cols
    int64_t partial;                 // where its partial sums start in scratch
    int32_t chunk_end, finish_end;   // chunks and finishing blocks of this and all earlier tensors
    DType a_dtype, b_dtype;
    Walk walk;
    bool quads;  // four elements at a time are aligned
};

constexpr int kBlockSensitivityMaxTensors = 400;  // BERT-large has 393

struct BlockSensitivityPlan {
    int64_t num_partials;  // floats of scratch
    int32_t num_tensors, num_chunks, num_finish;
    Reduce reduce;
    Finish finish;
    BlockSensitivityEntry entries[kBlockSensitivityMaxTensors];
};
static_assert(sizeof(BlockSensitivityPlan) + 64 <= 32764, "a plan travels by value, as a kernel parameter");

// Fills `plan` with the first kBlockSensitivityMaxTensors of `tensors`, those without elements left out, and returns
// how many it took; 0 where count > 0 means that the next has more blocks than 32 bits count.
int plan_block_sensitivity(const BlockSensitivityTensor* tensors, int count, Reduce reduce, Finish finish,
                           BlockSensitivityPlan* plan);

// out = decay * out + scale * finish(total) for every block of the plan; with decay 0, out is not read.
cudaError_t launch_block_sensitivity(const BlockSensitivityPlan& plan, float* scratch, float decay, float scale,
                                     cudaStream_t stream);

}  // namespace sensibert
