// sm_90a only. tests/native runs it on a CPU that emulates wgmma, TMA and barriers.
//
// y [M, N] = x [M, K] (W [N, K] * keep)^T + bias, keep one bit a weight; with kByColumns W is [K, N] and y = x (W * keep),
// which is dx of the former. W lies dense in memory and is no operand of wgmma from shared memory: it passes through
// registers, where the bits are applied, so that y is computed as y^T [N, M] = (W * keep) x^T. A block of threads stays on
// its SM and takes output tiles of 128 features x kCols tokens:
//
//   warpgroup 0     one thread copies, per step of 64 input features, x [kCols, 64], W [128, 64] and the bits of W into the
//                   next stage of a ring in shared memory
//   warpgroups 1,2  64 features each: per k16 of a step, W from shared memory to registers (ldmatrix, transposing if
//                   kByColumns), AND with the spread bits, one wgmma; two products are always in flight meanwhile. Then
//                   bias, rounding, and out through shared memory (stmatrix, transposing) while the ring fills again
//
// Bits: a thread's 32 weights of a step lie in two rows, 64 bits each. Two shifts of a word bring the bits of its even and
// odd columns to the tops of bytes, one prmt spreads a pair of tops over two 16-bit elements, one AND applies them: 8 + 16
// + 16 instructions for 32 weights. AND, not a product: what a dropped weight holds, NaN included, is gone.
// Cost: 2 * 128 * 64 * kCols a step, at 4096 FLOP a clock and SM; 16 KB of W, kCols / 8 KB of x and 2 KB of bits from L2.
// A sum has one order: bitwise repeatable.
#include "masked_linear_bits.h"

#include "masked_linear_hopper.h"

namespace sensibert {
namespace {

using namespace hopper;

constexpr int kRows = 128;  // features of a tile: two consumer warpgroups of 64, the height of wgmma
constexpr int kDepth = 64;  // input features of a step: 128 bytes, one row of the swizzle
constexpr int kBlocks = kDepth / 16;
constexpr int kConsumers = 2;
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kWBytes = 64 * kDepth * 2;  // of one consumer
constexpr int kBitsBytes = kRows * 16;    // 16 bytes a row, the least TMA copies: this step and a neighbour
constexpr int kStoreRows = 32;            // tokens of a box on its way to y
constexpr int kStoreBytes = kStoreRows * 128, kStoreBoxes = 2;
static_assert(kDepth * 2 == 128, "a row of a box is one 128-byte swizzle row");
static_assert(kRows == 64 * kConsumers, "a consumer multiplies 64 features, the height of wgmma");

template <int kCols>
struct Layout {  // of shared memory, in bytes from a multiple of kAtom
    static constexpr int kStages = 4;
    static constexpr int kW = kCols * kDepth * 2;  // in a stage: x first
    static constexpr int kBits = kW + kConsumers * kWBytes;
    static constexpr int kStage = kBits + kBitsBytes;
    static constexpr int kStore = kStages * kStage;  // boxes [kStoreRows tokens, 64 features]
    static constexpr int kBarriers = kStore + kConsumers * kStoreBoxes * kStoreBytes;
    static constexpr int kBytes = kBarriers + 2 * kStages * 8 + kAtom;
    static_assert(kBytes <= 227 * 1024, "the ring and the store boxes fit the shared memory of an SM");
    static_assert(kStage % kAtom == 0 && kBits % 128 == 0, "boxes are aligned in every stage");
};

struct Problem {
    int M, N, K;
    int num_feature_tiles, num_tiles;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t count_tiles(const BitsProblem& q, int tile_cols) { return ceil_div(q.N, kRows) * ceil_div(q.M, tile_cols); }

// 32 consecutive bits of a row of weights, as a thread needs them: its columns are 8 j + 2 q and 8 j + 2 q + 1.
struct Spread {
    uint32_t odd, even;  // bit 8 j + 7: of column 8 j + 2 q + 1, of the one before
    __device__ __forceinline__ Spread(uint32_t word, int q) : odd(word << (6 - 2 * q)), even(odd << 1) {}
    // All ones for a kept element: two 16-bit elements, columns 8 kByte + 2 q and the next.
    template <int kByte>
    __device__ __forceinline__ uint32_t mask() const {
        return spread_signs<0xcc88 + 0x1111 * kByte>(even, odd);
    }
};

// The four 8 x 8 matrices of a k16: rows r and r + 8 of columns 8 j + .., then of the next 8 columns.
template <int kHalf>
__device__ __forceinline__ void apply(uint32_t (&a)[4], const Spread& top, const Spread& bottom) {
    a[0] &= top.mask<2 * kHalf>();
    a[1] &= bottom.mask<2 * kHalf>();
    a[2] &= top.mask<2 * kHalf + 1>();
    a[3] &= bottom.mask<2 * kHalf + 1>();
}

template <typename T, bool kByColumns, int kCols>
__global__ void __launch_bounds__(kThreads, 1)
    masked_linear_bits_kernel(const __grid_constant__ TensorMap x_map,     // [M, K], boxes of kCols
                              const __grid_constant__ TensorMap w_map,     // [N, K] or [K, N], boxes of 64
                              const __grid_constant__ TensorMap bits_map,  // [N, ceil(K / 8)], boxes of kRows
                              const __grid_constant__ TensorMap y_map,     // [M, N], boxes of kStoreRows
                              const T* __restrict__ bias,                  // [N] or null
                              const __grid_constant__ Problem p) {
    using L = Layout<kCols>;
    SENSIBERT_DYNAMIC_SHARED(unsigned char, raw);
    unsigned char* const shared = raw + (kAtom - shared_address(raw) % kAtom) % kAtom;
    uint64_t* const full = reinterpret_cast<uint64_t*>(shared + L::kBarriers);  // [kStages] the copies have landed
    uint64_t* const empty = full + L::kStages;                                  // [kStages] all have read
    const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int num_steps = (p.K + kDepth - 1) / kDepth;

    if (threadIdx.x == 0) {
        for (int s = 0; s < L::kStages; ++s) barrier_init(&full[s], 1), barrier_init(&empty[s], kConsumers * 4);
        barrier_init_done();
    }
    __syncthreads();

    uint32_t at = 0;  // steps so far, of all tiles: stage at % kStages, round at / kStages
    if (group == 0) {
        give_registers<24>();
        if (threadIdx.x != 0) return;
        prefetch_map(&x_map), prefetch_map(&w_map), prefetch_map(&bits_map), prefetch_map(&y_map);
        for (int tile = blockIdx.x; tile < p.num_tiles; tile += gridDim.x) {
            const int row = tile % p.num_feature_tiles * kRows, token = tile / p.num_feature_tiles * kCols;
            for (int step = 0; step < num_steps; ++step, ++at) {
                unsigned char* const stage = shared + at % L::kStages * L::kStage;
                uint64_t* const landed = &full[at % L::kStages];
                barrier_wait(&empty[at % L::kStages], (at / L::kStages & 1) ^ 1);
                barrier_arrive_expect(landed, L::kStage);
                load_box(&x_map, landed, stage, step * kDepth, token);
                for (int c = 0; c < kConsumers; ++c)
                    load_box(&w_map, landed, stage + L::kW + c * kWBytes, kByColumns ? row + c * 64 : step * kDepth,
                             kByColumns ? step * kDepth : row + c * 64);
                load_box(&bits_map, landed, stage + L::kBits, step / 2 * 16, row);
            }
        }
        return;
    }

    take_registers<240>();
    const int consumer = group - 1;
    unsigned char* const store = shared + L::kStore + consumer * kStoreBoxes * kStoreBytes;
    // Which 16 bytes of a box this lane points ldmatrix to, at k16 number 0: features of this warp, 16 x 16.
    const int box_row = kByColumns ? lane % 8 + lane / 16 * 8 : warp * 16 + lane % 16;
    const int chunk = kByColumns ? warp * 2 + lane / 8 % 2 : lane / 16;
    const int bits_at = L::kBits + (consumer * 64 + warp * 16 + lane / 4) * 16;
    const int box_at = L::kW + consumer * kWBytes + box_row * 128;
    float acc[kCols / 2];
    for (int tile = blockIdx.x; tile < p.num_tiles; tile += gridDim.x) {
        const int feature = tile % p.num_feature_tiles * kRows + consumer * 64,
                  token = tile / p.num_feature_tiles * kCols;
#pragma unroll
        for (int i = 0; i < kCols / 2; ++i) acc[i] = 0.f;
        uint32_t a[kBlocks][4];
#pragma unroll 1
        for (int step = 0; step < num_steps; ++step, ++at) {
            const unsigned char* const stage = shared + at % L::kStages * L::kStage;
            const auto load = [&](int b) {
                if constexpr (kByColumns)
                    load_matrices<true>(a[b], stage + box_at + b * 16 * 128 + (chunk ^ (lane % 8)) * 16);
                else
                    load_matrices<false>(a[b], stage + box_at + ((chunk + 2 * b) ^ (lane % 8)) * 16);
            };
            barrier_wait(&full[at % L::kStages], at / L::kStages & 1);
            const uint2 top = *reinterpret_cast<const uint2*>(stage + bits_at + step % 2 * 8);
            const uint2 bottom = *reinterpret_cast<const uint2*>(stage + bits_at + 8 * 16 + step % 2 * 8);
            const Spread tops[2] = {{top.x, lane % 4}, {top.y, lane % 4}};
            const Spread bottoms[2] = {{bottom.x, lane % 4}, {bottom.y, lane % 4}};
            const uint64_t x = operand(stage, 0);
            load(0);
#pragma unroll
            for (int b = 0; b < kBlocks; ++b) {
                matmul_wait<2>();  // the product that read a[b + 1] is done
                if (b == 2 && step > 0 && lane == 0) barrier_arrive(&empty[(at - 1) % L::kStages]);
                if (b + 1 < kBlocks) load(b + 1);
                b % 2 ? apply<1>(a[b], tops[b / 2], bottoms[b / 2]) : apply<0>(a[b], tops[b / 2], bottoms[b / 2]);
                matmul_begin();
                matmul<T, kCols>(acc, a[b], x + (16 * 2 >> 4) * b);
                matmul_commit();
            }
        }
        matmul_wait<0>();
        pin_registers(acc);
        if (lane == 0) barrier_arrive(&empty[(at - 1) % L::kStages]);

        if (feature >= p.N) continue;
        float add[2] = {0.f, 0.f};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int here = feature + warp * 16 + lane / 4 + h * 8;
            if (bias != nullptr && here < p.N) add[h] = to_float(bias[here]);
        }
#pragma unroll
        for (int s = 0; s < kCols / kStoreRows; ++s) {
            if (token + s * kStoreRows >= p.M) break;
            unsigned char* const box = store + s % kStoreBoxes * kStoreBytes;
            if (warp == 0 && lane == 0) {
                if (s == 0)
                    store_wait_read<0>();  // the tile before may have ended with this box
                else
                    store_wait_read<kStoreBoxes - 1>();
            }
            group_sync(1 + consumer, 128);
#pragma unroll
            for (int c = 0; c < kStoreRows / 8; c += 2) {
                uint32_t out[4];  // matrices: features 0-7 and 8-15 of 8 tokens, then of the next 8
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float* const d = acc + s * (kStoreRows / 2) + (c + i / 2) * 4 + i % 2 * 2;
                    out[i] = pack<T>(d[0] + add[i % 2], d[1] + add[i % 2]);
                }
                const int r = (c + lane / 16) * 8 + lane % 8;
                store_matrices_transposed(box + r * 128 + ((warp * 2 + lane / 8 % 2) ^ (lane % 8)) * 16, out);
            }
            fence_shared_for_store();
            group_sync(1 + consumer, 128);
            if (warp == 0 && lane == 0) store_box(&y_map, box, feature, token + s * kStoreRows);
        }
    }
    if (warp == 0 && lane == 0) store_wait_read<0>();  // the boxes must outlive their stores
}

template <typename T, bool kByColumns, int kCols>
cudaError_t launch(const BitsProblem& q, cudaStream_t stream) {
    auto* kernel = masked_linear_bits_kernel<T, kByColumns, kCols>;
    constexpr size_t kBytes = Layout<kCols>::kBytes;
    const int64_t w_rows = kByColumns ? q.K : q.N, w_cols = kByColumns ? q.N : q.K;
    TensorMap x, w, bits, y;
    if (cudaError_t e = make_tensor_map(&x, q.dtype, q.x, q.M, q.K, q.x_stride, kCols)) return e;
    if (cudaError_t e = make_tensor_map(&w, q.dtype, q.w, w_rows, w_cols, q.w_stride, 64)) return e;
    if (cudaError_t e = make_byte_map(&bits, q.bits, q.N, q.K / 8, q.bits_stride, kRows)) return e;
    if (cudaError_t e = make_tensor_map(&y, q.dtype, q.y, q.M, q.N, q.y_stride, kStoreRows)) return e;
    int num_blocks = 0;
    if (cudaError_t e = allow_shared_bytes(kernel, kBytes)) return e;
    if (cudaError_t e = resident_blocks(kernel, kThreads, kBytes, &num_blocks)) return e;
    const int num_tiles = int(count_tiles(q, kCols));
    num_blocks = num_blocks < num_tiles ? num_blocks : num_tiles;
    const Problem p{int(q.M), int(q.N), int(q.K), int(ceil_div(q.N, kRows)), num_tiles};
    return SENSIBERT_LAUNCH(kernel, num_blocks, kThreads, kBytes, stream, x, w, bits, y, static_cast<const T*>(q.bias),
                            p);
}

// The width whose rounds over the GPU take less time; at a tie the wider, which reads W less often.
template <typename T, bool kByColumns>
cudaError_t launch_width(const BitsProblem& q, cudaStream_t stream) {
    int num_blocks = 1, tile_cols = q.tile_cols;
    auto* wide = masked_linear_bits_kernel<T, kByColumns, 256>;
    if (tile_cols == 0) {
        if (cudaError_t e = allow_shared_bytes(wide, Layout<256>::kBytes)) return e;
        if (cudaError_t e = resident_blocks(wide, kThreads, Layout<256>::kBytes, &num_blocks)) return e;
        const int64_t rounds_192 = ceil_div(count_tiles(q, 192), num_blocks);
        tile_cols = rounds_192 * 192 < ceil_div(count_tiles(q, 256), num_blocks) * 256 ? 192 : 256;
    }
    if (tile_cols == 192) return launch<T, kByColumns, 192>(q, stream);
    return launch<T, kByColumns, 256>(q, stream);
}

}  // namespace

cudaError_t launch_masked_linear_bits(const BitsProblem& q, cudaStream_t stream) {
    if (q.M == 0 || q.N == 0) return cudaSuccess;
    const int64_t w_rows = q.by_columns ? q.K : q.N, w_cols = q.by_columns ? q.N : q.K;
    if (!(q.tile_cols == 0 || q.tile_cols == 192 || q.tile_cols == 256) || q.dtype == DType::kFloat32 || q.K == 0 ||
        q.N % 8 != 0 || q.K % 8 != 0 || !fits_a_map(q.x, q.M, q.K, q.x_stride, 8) ||
        !fits_a_map(q.w, w_rows, w_cols, q.w_stride, 8) || !fits_a_map(q.y, q.M, q.N, q.y_stride, 8) ||
        !fits_a_map(q.bits, q.N, q.K / 8, q.bits_stride, 16))
        return cudaErrorInvalidValue;
    if (count_tiles(q, 192) * ceil_div(q.K, kDepth) >= int64_t(1) << 31) return cudaErrorInvalidValue;  // int counters
    const bool half = q.dtype == DType::kFloat16;
    if (half && q.by_columns) return launch_width<__half, true>(q, stream);
    if (half) return launch_width<__half, false>(q, stream);
    if (q.by_columns) return launch_width<__nv_bfloat16, true>(q, stream);
    return launch_width<__nv_bfloat16, false>(q, stream);
}

}  // namespace sensibert
