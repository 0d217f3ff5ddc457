// Columns of activations: the kept ones gathered, or spread to their positions with fill values between them.
//
//   x [M, K]   a b c d e f    index 0 2 3 5       out [M, k]   a c d f       A block owns a span of columns of out and
//              g h i j k l                                     g i j l       walks down the rows. A thread owns 16 bytes
//   x          a c d f        index 0 -1 1 2 -1 3   out        a . c d . f   of a row: it reads their index and fill
//              g i j l                                         g . i j . l   once, then has four rows in flight.
//
// Reads of a warp ascend and lie close together: L1 serves most from sectors that are on their way. Cost: the sectors of
// x that hold a named column read once, out written once. Elements are copied as integers: no bit of a NaN changes.
#include "take_columns.h"

namespace sensibert {
namespace {

constexpr int kThreads = 128;     // or fewer, where a span or its rows leave some over
constexpr int kStoreBytes = 16;   // of a thread and row, where every row of out starts at a multiple of it
constexpr int kRowsInFlight = 4;  // of a thread
constexpr int kLine = 128;        // bytes: the spans of a row start at multiples of it
static_assert(kThreads % 32 == 0 && kThreads * kStoreBytes % kLine == 0, "the widest span is whole warps, whole lines");

struct Args {
    const void* x;
    const int32_t* index;
    const void* fill;
    void* out;
    int64_t k, x_stride;     // x_stride and x_hop in bytes
    int64_t x_hop, out_hop;  // from one row of a thread to its next
    int64_t num_more;        // so many threads of a column have one row more than
    int num_rows;            // this
    uint32_t num_spans;      // of a row of out
    int width, rows;         // of a block: threads across its span, rows it has at a time
};

template <typename T, int kCount>
__device__ __forceinline__ void store(T* p, const T (&value)[kCount]) {
    if constexpr (kCount == 1) {
        *p = value[0];
    } else {
        static_assert(sizeof value == sizeof(uint4), "a thread stores 16 bytes or one element");
        uint4 words;
        memcpy(&words, value, sizeof words);
        *reinterpret_cast<uint4*>(p) = words;
    }
}

template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads) take_columns_kernel(const __grid_constant__ Args a) {
    const int across = int(threadIdx.x) % a.width, down = int(threadIdx.x) / a.width;
    const int64_t col = (int64_t(blockIdx.x % a.num_spans) * a.width + across) * kCount;
    if (down >= a.rows || col >= a.k) return;
    int32_t from[kCount];
    T fill[kCount];
    for (int j = 0; j < kCount; ++j) {
        from[j] = a.index[col + j];
        fill[j] = a.fill ? static_cast<const T*>(a.fill)[col + j] : T(0);
    }
    const int64_t row = int64_t(blockIdx.x / a.num_spans) * a.rows + down;
    const char* x = static_cast<const char*>(a.x) + row * a.x_stride;
    T* out = static_cast<T*>(a.out) + row * a.k + col;
    for (int left = a.num_rows + (row < a.num_more); left > 0; left -= kRowsInFlight) {
        T value[kRowsInFlight][kCount];
        for (int r = 0; r < kRowsInFlight; ++r) {
            const char* const source = x + (r < left ? r * a.x_hop : 0);  // past the end: the first again
            for (int j = 0; j < kCount; ++j)
                value[r][j] = from[j] < 0 ? fill[j] : __ldg(reinterpret_cast<const T*>(source) + uint32_t(from[j]));
        }
        for (int r = 0; r < kRowsInFlight; ++r)
            if (r < left) store(out + r * a.out_hop, value[r]);
        x += kRowsInFlight * a.x_hop, out += kRowsInFlight * a.out_hop;
    }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T, int kCount>
cudaError_t launch(const TakeProblem& q, cudaStream_t stream) {
    const int64_t across = q.k / kCount;  // threads for a row of out
    const int64_t num_spans = ceil_div(across, kThreads), in_line = kLine / int64_t(kCount * sizeof(T));
    const int width = int(num_spans == 1 ? across : ceil_div(ceil_div(across, num_spans), in_line) * in_line);
    const int rows = kThreads / width, threads = int(ceil_div(width * rows, 32)) * 32;
    auto* kernel = take_columns_kernel<T, kCount>;
    int resident = 0;
    if (cudaError_t error = resident_blocks(kernel, threads, 0, &resident)) return error;
    // As many rows in flight as there may be, unless that leaves the GPU with less than a quarter of its blocks.
    const int64_t all = ceil_div(q.M, rows), held = max(resident / num_spans, int64_t(1));
    const int64_t blocks = min(max(ceil_div(all, kRowsInFlight), held / 4), min(all, held));
    const int64_t step = blocks * rows, x_stride = q.x_stride * int64_t(sizeof(T));
    const Args args = {
        .x = q.x,
        .index = q.index,
        .fill = q.fill,
        .out = q.out,
        .k = q.k,
        .x_stride = x_stride,
        .x_hop = step * x_stride,
        .out_hop = step * q.k,
        .num_more = q.M % step,
        .num_rows = int(q.M / step),
        .num_spans = uint32_t(num_spans),
        .width = width,
        .rows = rows,
    };
    return SENSIBERT_LAUNCH(kernel, dim3(unsigned(blocks * num_spans)), dim3(unsigned(threads)), 0, stream, args);
}

template <typename T>
cudaError_t launch_for(const TakeProblem& q, cudaStream_t stream) {
    const bool aligned = q.k * int64_t(sizeof(T)) % kStoreBytes == 0 && uintptr_t(q.out) % kStoreBytes == 0;
    return aligned ? launch<T, kStoreBytes / sizeof(T)>(q, stream) : launch<T, 1>(q, stream);
}

}  // namespace

cudaError_t launch_take_columns(const TakeProblem& problem, cudaStream_t stream) {
    if (problem.M == 0 || problem.k == 0) return cudaSuccess;
    return element_size(problem.dtype) == 4 ? launch_for<uint32_t>(problem, stream)
                                            : launch_for<uint16_t>(problem, stream);
}

}  // namespace sensibert
