// sm_90a only. tests/native runs it on a CPU that emulates wgmma, TMA and barriers.
//
// y [M, N] = x [M, K] (W [N, K] * keep)^T + bias, keep in blocks of 64 x 64; with kByColumns W is [K, N] and
// y = x (W * keep), which is dx of the former. W lies dense in memory; what keep drops is neither loaded nor
// multiplied. A block of threads stays on its SM and takes output tiles of 128 tokens x kCols features:
//
//   warpgroup 0     one thread copies, per step of 64 input features, x [128, 64] and the kept bands of W [64, 64] into
//                   the next stage of a ring in shared memory
//   warpgroups 1,2  64 tokens each: first the steps that keep all bands, one wide wgmma a k16, always one step in
//                   flight; then the others, one narrow wgmma a band; then bias, rounding, and out through shared
//                   memory while the ring fills for the next tile
//
// The bias is added where the result is packed: added to the accumulators first, ptxas serializes the wgmmas (C7511).
// Narrow wgmmas exist at kCols = 192 only: with 128 accumulators ptxas serializes every wgmma of the kernel (C7511),
// as it does when narrow ones overlap in more than one way, or share one wait. At 256 a dropped band of a step that is
// needed at all arrives as zeros (no traffic) and is multiplied: right, and faster where whole steps drop.
// Cost: 2 * 128 * 64 * 64 a band, at 4096 FLOP a clock and SM; 16 KB of x and 8 KB a band from L2 a step.
// A sum has one order, set by the list: bitwise repeatable.
#include "masked_linear_tiles.h"

#include "masked_linear_hopper.h"

namespace sensibert {
namespace {

using namespace hopper;

constexpr int kRows = 128;  // tokens of a tile: two consumer warpgroups of 64
constexpr int kBand = 64;   // features that are kept or dropped together, and the width of a narrow wgmma
constexpr int kDepth = 64;  // input features of a step: 128 bytes, one row of the swizzle
constexpr int kConsumers = 2;
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kBandBytes = kBand * kDepth * 2, kXBytes = kRows * kDepth * 2;
static_assert(kDepth * 2 == 128, "a row of a box is one 128-byte swizzle row");
static_assert(kRows == 64 * kConsumers, "a consumer multiplies 64 tokens, the height of wgmma");

template <int kCols, int kStages, int kStoreBoxes>
struct Layout {  // of shared memory, in bytes from a multiple of kAtom
    static constexpr int kBands = kCols / kBand;
    static constexpr bool kNarrow = kCols == 192;
    static constexpr int kStage = kXBytes + kBands * kBandBytes;
    static constexpr int kStore = kStages * kStage;  // boxes [64 tokens, 64 features] on their way to y
    static constexpr int kBarriers = kStore + kConsumers * kStoreBoxes * kBandBytes;
    static constexpr int kKept = kBarriers + 2 * kStages * 8;  // the bands of each stage
    static constexpr int kBytes = kKept + kStages * 4 + kAtom;
    static_assert(kBytes <= 227 * 1024, "the ring and the store boxes fit the shared memory of an SM");
    static_assert(kBands <= 4, "an entry of the tile list has four bits for bands");
};

struct Problem {
    int M, N;
    int num_token_tiles, num_tiles;
    TileList list;
};

template <typename T, bool kByColumns, int kCols, int kStages, int kStoreBoxes>
__global__ void __launch_bounds__(kThreads, 1)
    masked_linear_tiles_kernel(const __grid_constant__ TensorMap x_map,  // [M, K], boxes of kRows
                               const __grid_constant__ TensorMap w_map,  // [N, K] or [K, N], boxes of 64
                               const __grid_constant__ TensorMap y_map,  // [M, N], boxes of 64
                               const T* __restrict__ bias,               // [N] or null
                               const __grid_constant__ Problem p) {
    using L = Layout<kCols, kStages, kStoreBoxes>;
    SENSIBERT_DYNAMIC_SHARED(unsigned char, raw);
    unsigned char* const shared = raw + (kAtom - shared_address(raw) % kAtom) % kAtom;
    uint64_t* const full = reinterpret_cast<uint64_t*>(shared + L::kBarriers);  // [kStages] the copies have landed
    uint64_t* const empty = full + kStages;                                     // [kStages] all have read
    uint32_t* const kept = reinterpret_cast<uint32_t*>(shared + L::kKept);      // [kStages]
    const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;

    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s) barrier_init(&full[s], 1), barrier_init(&empty[s], kConsumers * 4);
        barrier_init_done();
    }
    __syncthreads();

    Place<kStages> at;
    if (group == 0) {
        give_registers<40>();
        if (threadIdx.x != 0) return;
        prefetch_map(&x_map), prefetch_map(&w_map), prefetch_map(&y_map);
        for (int tile = blockIdx.x; tile < p.num_tiles; tile += gridDim.x) {
            const int n = p.list.order[tile / p.num_token_tiles], m = tile % p.num_token_tiles;
            const int last = p.list.offsets[2 * n + 2];
            for (int i = p.list.offsets[2 * n]; i < last; ++i, at.advance()) {
                const uint32_t entry = p.list.entries[i], bands = entry & 15;
                const int col = int(entry >> 4) * kDepth;
                unsigned char* const stage = shared + at.stage * L::kStage;
                barrier_wait(&empty[at.stage], at.parity ^ 1);
                kept[at.stage] = bands;  // the arrival below publishes it
                const int num_boxes = L::kNarrow ? __popc(bands) : L::kBands;
                barrier_arrive_expect(&full[at.stage], kXBytes + num_boxes * kBandBytes);
                load_box(&x_map, &full[at.stage], stage, col, m * kRows);
                for (int b = 0; b < L::kBands; ++b) {
                    const bool keep = bands >> b & 1;
                    if (L::kNarrow && !keep) continue;
                    const int feature = keep ? n * kCols + b * kBand : p.N;  // what lies beyond N arrives as 0
                    load_box(&w_map, &full[at.stage], stage + kXBytes + b * kBandBytes, kByColumns ? feature : col,
                             kByColumns ? col : feature);
                }
            }
        }
        return;
    }

    take_registers<232>();
    const int consumer = group - 1;
    unsigned char* const store = shared + L::kStore + consumer * kStoreBoxes * kBandBytes;
    // To the next 16 of k, in descriptor units of 16 bytes: 16 columns of a box, or 16 rows.
    constexpr int kXNext = 16 * 2 >> 4, kWNext = kByColumns ? 16 * 128 >> 4 : kXNext;
    float acc[kCols / 2];
    for (int tile = blockIdx.x; tile < p.num_tiles; tile += gridDim.x) {
        const int n = p.list.order[tile / p.num_token_tiles], m = tile % p.num_token_tiles;
        const int32_t* const offsets = p.list.offsets + 2 * n;
        const int num_steps = offsets[2] - offsets[0], num_wide = L::kNarrow ? offsets[1] - offsets[0] : num_steps;
#pragma unroll
        for (int i = 0; i < kCols / 2; ++i) acc[i] = 0.f;
        int before = 0;  // the stage of the step before, still being read
#pragma unroll 1
        for (int step = 0; step < num_wide; ++step) {
            const unsigned char* const stage = shared + at.stage * L::kStage;
            barrier_wait(&full[at.stage], at.parity);
            const uint64_t x = operand(stage + consumer * 64 * 128, 0), w = operand(stage + kXBytes, kBandBytes);
            matmul_begin();
#pragma unroll
            for (int k = 0; k < kDepth / 16; ++k) matmul<T, kCols, kByColumns>(acc, x + kXNext * k, w + kWNext * k);
            matmul_commit();
            matmul_wait<1>();
            if (step > 0 && lane == 0) barrier_arrive(&empty[before]);
            before = at.stage;
            at.advance();
        }
        matmul_wait<0>();
        pin_registers(acc);
        if (num_wide > 0 && lane == 0) barrier_arrive(&empty[before]);
        if constexpr (L::kNarrow) {
#pragma unroll 1
            for (int step = num_wide; step < num_steps; ++step, at.advance()) {
                const unsigned char* const stage = shared + at.stage * L::kStage;
                barrier_wait(&full[at.stage], at.parity);
                const uint64_t x = operand(stage + consumer * 64 * 128, 0), w = operand(stage + kXBytes, kBandBytes);
                const uint32_t bands = kept[at.stage];
#pragma unroll
                for (int b = 0; b < L::kBands; ++b) {
                    if (!(bands >> b & 1)) continue;
                    matmul_begin();
#pragma unroll
                    for (int k = 0; k < kDepth / 16; ++k)
                        matmul<T, kBand, kByColumns>(acc + b * (kBand / 2), x + kXNext * k,
                                                     w + b * (kBandBytes >> 4) + kWNext * k);
                    matmul_commit();
                    matmul_wait<0>();
                }
                __syncwarp();  // all lanes have read `bands`
                if (lane == 0) barrier_arrive(&empty[at.stage]);
            }
        }
        pin_registers(acc);

        const int row = m * kRows + consumer * 64;
        if (row >= p.M) continue;
#pragma unroll
        for (int b = 0; b < L::kBands; ++b) {
            const int col = n * kCols + b * kBand;
            if (col >= p.N) break;
            float* const band = acc + b * (kBand / 2);
            unsigned char* const box = store + b % kStoreBoxes * kBandBytes;
            if (warp == 0 && lane == 0) {
                if (b == 0)
                    store_wait_read<0>();  // the tile before may have ended with this box
                else
                    store_wait_read<kStoreBoxes - 1>();
            }
            group_sync(1 + consumer, 128);
#pragma unroll
            for (int c = 0; c < kBand / 8; ++c) {
                const int here = col + c * 8 + lane % 4 * 2;
                float add[2] = {0.f, 0.f};
                if (bias != nullptr && here < p.N) add[0] = to_float(bias[here]), add[1] = to_float(bias[here + 1]);
#pragma unroll
                for (int h = 0; h < 2; ++h) {  // r % 8 moves the 16-byte chunk: no bank is hit twice
                    const int r = warp * 16 + lane / 4 + h * 8;
                    const float* const d = band + c * 4 + h * 2;
                    unsigned char* const at = box + r * 128 + (c ^ r % 8) * 16 + lane % 4 * 4;
                    *reinterpret_cast<uint32_t*>(at) = pack<T>(d[0] + add[0], d[1] + add[1]);
                }
            }
            fence_shared_for_store();
            group_sync(1 + consumer, 128);
            if (warp == 0 && lane == 0) store_box(&y_map, box, col, row);
        }
    }
    if (warp == 0 && lane == 0) store_wait_read<0>();  // the boxes must outlive their stores
}

template <typename T, bool kByColumns, int kCols, int kStages, int kStoreBoxes>
cudaError_t launch(const TensorMap& x, const TensorMap& w, const TensorMap& y, const void* bias, const Problem& p,
                   cudaStream_t stream) {
    constexpr size_t kBytes = Layout<kCols, kStages, kStoreBoxes>::kBytes;
    auto* kernel = masked_linear_tiles_kernel<T, kByColumns, kCols, kStages, kStoreBoxes>;
    int num_blocks = 0;
    if (cudaError_t e = allow_shared_bytes(kernel, kBytes)) return e;
    if (cudaError_t e = resident_blocks(kernel, kThreads, kBytes, &num_blocks)) return e;
    num_blocks = num_blocks < p.num_tiles ? num_blocks : p.num_tiles;
    return SENSIBERT_LAUNCH(kernel, num_blocks, kThreads, kBytes, stream, x, w, y, static_cast<const T*>(bias), p);
}

template <typename T, bool kByColumns>
cudaError_t launch_width(const TensorMap& x, const TensorMap& w, const TensorMap& y, const void* bias, const Problem& p,
                         cudaStream_t stream) {
    if (p.list.tile_cols == 256) return launch<T, kByColumns, 256, 4, 2>(x, w, y, bias, p, stream);
    return launch<T, kByColumns, 192, 5, 1>(x, w, y, bias, p, stream);
}

}  // namespace

cudaError_t launch_masked_linear_tiles(const TilesProblem& q, const TileList& list, cudaStream_t stream) {
    if (q.M == 0 || q.N == 0) return cudaSuccess;
    const int64_t w_rows = q.by_columns ? q.K : q.N, w_cols = q.by_columns ? q.N : q.K;
    if (!(list.tile_cols == 192 || list.tile_cols == 256) || q.dtype == DType::kFloat32 || q.K == 0 || q.N % 8 != 0 ||
        q.K % 8 != 0 || !fits_a_map(q.x, q.M, q.K, q.x_stride) || !fits_a_map(q.w, w_rows, w_cols, q.w_stride) ||
        !fits_a_map(q.y, q.M, q.N, q.y_stride))
        return cudaErrorInvalidValue;
    const int64_t num_token_tiles = (q.M + kRows - 1) / kRows;
    const int64_t num_tiles = num_token_tiles * ((q.N + list.tile_cols - 1) / list.tile_cols);
    if (num_tiles >= int64_t(1) << 31) return cudaErrorInvalidValue;
    TensorMap x, w, y;
    if (cudaError_t e = make_tensor_map(&x, q.dtype, q.x, q.M, q.K, q.x_stride, kRows)) return e;
    if (cudaError_t e = make_tensor_map(&w, q.dtype, q.w, w_rows, w_cols, q.w_stride, kBand)) return e;
    if (cudaError_t e = make_tensor_map(&y, q.dtype, q.y, q.M, q.N, q.y_stride, 64)) return e;
    const Problem p{int(q.M), int(q.N), int(num_token_tiles), int(num_tiles), list};
    const bool half = q.dtype == DType::kFloat16;
    if (half && q.by_columns) return launch_width<__half, true>(x, w, y, q.bias, p, stream);
    if (half) return launch_width<__half, false>(x, w, y, q.bias, p, stream);
    if (q.by_columns) return launch_width<__nv_bfloat16, true>(x, w, y, q.bias, p, stream);
    return launch_width<__nv_bfloat16, false>(x, w, y, q.bias, p, stream);
}

}  // namespace sensibert
