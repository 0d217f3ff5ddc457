// sm_90a only. tests/native runs it on a CPU that emulates wgmma, TMA and barriers.
//
// dW [N, K] = (dY [M, N]^T X [M, K]) * keep, keep in blocks of 64 x 64. A product of a warpgroup is 64 rows of dW high,
// so it takes one row of blocks, and of that row up to four kept blocks, wherever they lie: dropped ones cost nothing,
// at any pattern. An output tile is two such rows. The bands of X that both keep lie between those of the one and those
// of the other: loaded once, and side by side for each. The tokens are cut into chunks; a block of threads stays on its
// SM and takes (tile, chunk)s:
//
//   warpgroup 0     two threads copy, per step of 32 tokens, two bands of dY and the tile's bands of X, [32, 64] each,
//                   into the next stage of a ring in shared memory; two warps write the dropped blocks of dW
//   warpgroups 1,2  a row of blocks each, one wgmma a k16 as wide as its bands (both operands lie by depth), one step
//                   in flight; then rounding and out
//
// With several chunks, each writes its partial sums to scratch, and the last to finish adds them up in the order of the
// chunks: no block waits, and the result does not depend on the order of arrival or the number of blocks.
// Cost: 2 * 64 * 64 * 32 a block and step, at 4096 FLOP a clock and SM: 512 clocks a step of eight; 4 KB a band from
// L2, that is 48 bytes a clock where all is kept (as much as a dense tile of 128 x 256), about 60 where random halves
// are, which L2 may not give. A chunk: 128 KB to scratch and back.
#include "masked_linear_dweight.h"

#include "masked_linear_hopper.h"

namespace sensibert {
namespace {

using namespace hopper;

constexpr int kBand = 64;   // the side of a block of dW
constexpr int kDepth = 32;  // tokens of a step
constexpr int kConsumers = 2, kBandsEach = kDweightBands;
constexpr int kLoaders = 2;  // threads that copy, each a band of dY and every other of X
static_assert(kLoaders == kConsumers, "a loader copies the band of dY of one consumer");
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kBox = kDepth * kBand * 2;  // bytes
constexpr int kStages = 5, kStage = kConsumers * (1 + kBandsEach) * kBox;
constexpr int kBarriers = kStages * kStage, kLast = kBarriers + 2 * kStages * 8;
constexpr int kBytes = kLast + kConsumers * 4 + kAtom;  // of shared memory
constexpr int kPartial = kBand * kBandsEach * kBand;    // floats that a consumer leaves in scratch
constexpr int kSms = 132, kMostChunks = 16;
static_assert(kBand * 2 == 128 && kBox % kAtom == 0, "a row of a box is one 128-byte swizzle row");
static_assert(kBytes <= 227 * 1024, "the ring fits the shared memory of an SM");

struct Problem {
    int N, K;
    int num_steps, num_chunks, num_items;
    BlockList list;
    int32_t* arrived;  // [num_tiles, kConsumers] chunks in scratch
    float* partials;   // [num_tiles, num_chunks, kConsumers, kPartial]
};

struct Item {
    int tile, chunk, first_step, last_step;
    const int32_t* words;  // of the tile
    __device__ __forceinline__ Item(const Problem& p, int item) {
        tile = item % p.list.num_tiles, chunk = item / p.list.num_tiles;  // at one time, one part of dY and X: L2
        words = p.list.tiles + int64_t(tile) * kDweightTileWords;
        first_step = int(int64_t(p.num_steps) * chunk / p.num_chunks);
        last_step = int(int64_t(p.num_steps) * (chunk + 1) / p.num_chunks);
    }
    __device__ __forceinline__ int row(int consumer) const { return words[consumer]; }
    __device__ __forceinline__ int num_rows() const { return words[0] == words[1] ? 1 : 2; }
    __device__ __forceinline__ int num_bands() const { return words[2] + words[3] + words[4]; }
    __device__ __forceinline__ int first_band(int consumer) const { return consumer ? words[2] : 0; }
    __device__ __forceinline__ int width(int consumer) const { return words[3] + words[consumer ? 4 : 2]; }
    __device__ __forceinline__ int col(int band) const { return words[5 + band]; }
};

// The steps of one item: acc [64, 64 kWidth] += dY^T X from the stages, from box `dy_box` of each and from `x_box` on.
template <typename T, int kWidth>
__device__ __forceinline__ void multiply(float (&acc)[kBandsEach * kBand / 2], const unsigned char* shared,
                                         uint64_t* full, uint64_t* empty, Place<kStages>& at, int num_steps, int dy_box,
                                         int x_box) {
    constexpr int kNext = 16 * 128 >> 4;  // to the next 16 tokens, in descriptor units of 16 bytes
    const bool leads = threadIdx.x % 32 == 0;
    int before = 0;  // the stage of the step before, still being read
#pragma unroll 1
    for (int step = 0; step < num_steps; ++step) {
        const unsigned char* const stage = shared + at.stage * kStage;
        barrier_wait(&full[at.stage], at.parity);
        const uint64_t dy = operand(stage + dy_box * kBox, kBox), x = operand(stage + x_box * kBox, kBox);
        matmul_begin();
#pragma unroll
        for (int k = 0; k < kDepth / 16; ++k) matmul<T, kWidth * kBand, true, true>(acc, dy + kNext * k, x + kNext * k);
        matmul_commit();
        matmul_wait<1>();
        if (step > 0 && leads) barrier_arrive(&empty[before]);
        before = at.stage;
        at.advance();
    }
    matmul_wait<0>();
    pin_registers(acc);
    if (num_steps > 0 && leads) barrier_arrive(&empty[before]);
}

// Dropped blocks: 0 into dW. The warps of the first group that do not load.
template <typename T>
__device__ __forceinline__ void write_dropped(T* dw, const Problem& p) {
    const int blocks_across = (p.K + kBand - 1) / kBand;
    for (int i = blockIdx.x; i < p.list.num_dropped; i += gridDim.x) {
        const int block = p.list.dropped[i];
        const int row = block / blocks_across * kBand, col = block % blocks_across * kBand;
        for (int j = int(threadIdx.x) - 32 * kLoaders; j < kBand * kBand / 8; j += 128 - 32 * kLoaders) {
            const int r = row + j / 8, c = col + j % 8 * 8;
            if (r < p.N && c < p.K) *reinterpret_cast<uint4*>(dw + int64_t(r) * p.K + c) = make_uint4(0, 0, 0, 0);
        }
    }
}

// Hands the sums over; true for the last to come, whose acc then holds the sum of all chunks.
__device__ __forceinline__ bool add_chunks(float (&acc)[kBandsEach * kBand / 2], const Problem& p, const Item& item,
                                           int width, int consumer, uint32_t* last) {
    const int thread = threadIdx.x % 128;
    const int64_t stride = kConsumers * kPartial;  // from chunk to chunk
    float* const first =
        p.partials + (int64_t(item.tile) * p.num_chunks * kConsumers + consumer) * kPartial + thread * 4;
#pragma unroll
    for (int i = 0; i < kBandsEach * kBand / 2; i += 4)
        if (i < width * (kBand / 2))
            store_quad(first + item.chunk * stride + i * 128, {{acc[i], acc[i + 1], acc[i + 2], acc[i + 3]}});
    __threadfence();
    group_sync(1 + consumer, 128);
    if (thread == 0) last[consumer] = atomicAdd(&p.arrived[item.tile * kConsumers + consumer], 1) == p.num_chunks - 1;
    group_sync(1 + consumer, 128);
    if (!last[consumer]) return false;
    __threadfence();
#pragma unroll
    for (int i = 0; i < kBandsEach * kBand / 2; ++i) acc[i] = 0.f;
#pragma unroll 1
    for (int chunk = 0; chunk < p.num_chunks; ++chunk)
#pragma unroll
        for (int i = 0; i < kBandsEach * kBand / 2; i += 4) {
            if (i >= width * (kBand / 2)) continue;
            const Quad more = load_quad(first + chunk * stride + i * 128);
#pragma unroll
            for (int j = 0; j < 4; ++j) acc[i + j] += more.x[j];
        }
    return true;
}

// acc into the blocks of dW that it is.
template <typename T>
__device__ __forceinline__ void write_blocks(const float (&acc)[kBandsEach * kBand / 2], T* dw, const Problem& p,
                                             const Item& item, int consumer) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int width = item.width(consumer), top = item.row(consumer) * kBand + warp * 16 + lane / 4;
#pragma unroll
    for (int b = 0; b < kBandsEach; ++b) {
        if (b >= width) continue;
        const int left = item.col(item.first_band(consumer) + b) * kBand + lane % 4 * 2;
#pragma unroll
        for (int c = 0; c < kBand / 8; ++c) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int r = top + h * 8, here = left + c * 8;
                if (r >= p.N || here >= p.K) continue;
                const float* const d = acc + b * (kBand / 2) + c * 4 + h * 2;
                *reinterpret_cast<uint32_t*>(dw + int64_t(r) * p.K + here) = pack<T>(d[0], d[1]);
            }
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    masked_linear_dweight_kernel(const __grid_constant__ TensorMap dy_map,  // [M, N], boxes of kDepth
                                 const __grid_constant__ TensorMap x_map,   // [M, K], boxes of kDepth
                                 T* __restrict__ dw, const __grid_constant__ Problem p) {
    SENSIBERT_DYNAMIC_SHARED(unsigned char, raw);
    unsigned char* const shared = raw + (kAtom - shared_address(raw) % kAtom) % kAtom;
    uint64_t* const full = reinterpret_cast<uint64_t*>(shared + kBarriers);  // [kStages] the copies have landed
    uint64_t* const empty = full + kStages;                                  // [kStages] all have read
    uint32_t* const last = reinterpret_cast<uint32_t*>(shared + kLast);      // [kConsumers]
    const int group = threadIdx.x / 128;

    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s) barrier_init(&full[s], kLoaders), barrier_init(&empty[s], kConsumers * 4);
        barrier_init_done();
    }
    __syncthreads();

    if (group == 0) {
        give_registers<40>();
        // By shuffle: ptxas then keeps the coordinates in uniform registers, where TMA wants them.
        const int loader = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
        if (loader >= kLoaders) write_dropped(dw, p);
        if (loader >= kLoaders || threadIdx.x % 32 != 0 || p.num_steps == 0) return;
        prefetch_map(&dy_map), prefetch_map(&x_map);
        Place<kStages> at;
        for (int i = blockIdx.x; i < p.num_items; i += gridDim.x) {
            const Item item(p, i);
            const bool loads_row = loader < item.num_rows();
            const int num_bands = (item.num_bands() + kLoaders - 1 - loader) / kLoaders, row = item.row(loader) * kBand;
            int cols[kBandsEach];  // in registers: a box every 50 clocks leaves no time to read the list
#pragma unroll
            for (int b = 0; b < kBandsEach; ++b) cols[b] = b < num_bands ? item.col(b * kLoaders + loader) * kBand : 0;
#pragma unroll 1
            for (int step = item.first_step; step < item.last_step; ++step, at.advance()) {
                unsigned char* const stage = shared + at.stage * kStage;
                unsigned char* const bands = stage + (kConsumers + loader) * kBox;
                barrier_wait(&empty[at.stage], at.parity ^ 1);
                barrier_arrive_expect(&full[at.stage], (loads_row + num_bands) * kBox);
                if (loads_row) load_box(&dy_map, &full[at.stage], stage + loader * kBox, row, step * kDepth);
#pragma unroll
                for (int b = 0; b < kBandsEach; ++b)
                    if (b < num_bands)
                        load_box(&x_map, &full[at.stage], bands + b * kLoaders * kBox, cols[b], step * kDepth);
            }
        }
        return;
    }

    take_registers<232>();
    Place<kStages> at;
    const int consumer = group - 1;
    float acc[kBandsEach * kBand / 2];
    for (int i = blockIdx.x; i < p.num_items; i += gridDim.x) {
        const Item item(p, i);
        const int width = item.width(consumer), num_steps = item.last_step - item.first_step;
        const int dy_box = consumer < item.num_rows() ? consumer : 0;
        const int x_box = kConsumers + (width ? item.first_band(consumer) : 0);
#pragma unroll
        for (int j = 0; j < kBandsEach * kBand / 2; ++j) acc[j] = 0.f;
        if (width == 4)
            multiply<T, 4>(acc, shared, full, empty, at, num_steps, dy_box, x_box);
        else if (width == 3)
            multiply<T, 3>(acc, shared, full, empty, at, num_steps, dy_box, x_box);
        else if (width == 2)
            multiply<T, 2>(acc, shared, full, empty, at, num_steps, dy_box, x_box);
        else  // without a block it multiplies one of the other's and drops the result: it has to release stages
            multiply<T, 1>(acc, shared, full, empty, at, num_steps, dy_box, x_box);
        if (width == 0 || (p.num_chunks > 1 && !add_chunks(acc, p, item, width, consumer, last))) continue;
        write_blocks(acc, dw, p, item, consumer);
    }
}

template <typename T>
cudaError_t launch(const TensorMap& dy, const TensorMap& x, void* dw, const Problem& p, cudaStream_t stream) {
    auto* kernel = masked_linear_dweight_kernel<T>;
    int num_blocks = 0;
    if (cudaError_t e = allow_shared_bytes(kernel, kBytes)) return e;
    if (cudaError_t e = resident_blocks(kernel, kThreads, kBytes, &num_blocks)) return e;
    const int wanted = max(p.num_items, p.list.num_dropped);
    return SENSIBERT_LAUNCH(kernel, min(num_blocks, wanted), kThreads, kBytes, stream, dy, x, static_cast<T*>(dw), p);
}

int64_t counter_bytes(int64_t num_tiles) { return (num_tiles * kConsumers * 4 + 15) / 16 * 16; }

}  // namespace

// The fewest steps of 64 tokens for the busiest SM of a GPU of kSms; handing a chunk over takes about three of
// them, adding it up at the end three more.
int dweight_chunks(int64_t num_tokens, int64_t num_tiles) {
    const int64_t num_steps = (num_tokens + 63) / 64;
    int best = 1;
    int64_t least = 0;
    for (int64_t chunks = 1; chunks <= kMostChunks && (chunks == 1 || chunks * 8 <= num_steps); ++chunks) {
        const int64_t rounds = (num_tiles * chunks + kSms - 1) / kSms, steps = (num_steps + chunks - 1) / chunks;
        const int64_t cost = chunks == 1 ? rounds * steps : rounds * (steps + 3) + 3 * chunks;
        if (chunks == 1 || cost < least) least = cost, best = int(chunks);
    }
    return best;
}

int64_t dweight_scratch_bytes(int64_t num_tiles, int num_chunks) {
    return num_chunks == 1 ? 0 : counter_bytes(num_tiles) + num_tiles * num_chunks * kConsumers * kPartial * 4;
}

cudaError_t launch_masked_linear_dweight(const DweightProblem& q, const BlockList& list, void* scratch,
                                         cudaStream_t stream) {
    if (q.N == 0 || q.K == 0) return cudaSuccess;
    const int64_t num_steps = (q.M + kDepth - 1) / kDepth, num_items = int64_t(list.num_tiles) * q.num_chunks;
    if (q.dtype == DType::kFloat32 || q.N % 8 != 0 || q.K % 8 != 0 || q.num_chunks < 1 || q.num_chunks > kMostChunks ||
        num_items >= int64_t(1) << 31 || !fits_a_map(q.dy, q.M, q.N, q.dy_stride) ||
        !fits_a_map(q.x, q.M, q.K, q.x_stride) || reinterpret_cast<uintptr_t>(q.dw) % 16 != 0 ||
        reinterpret_cast<uintptr_t>(scratch) % 16 != 0 || num_items + list.num_dropped == 0)
        return cudaErrorInvalidValue;
    TensorMap dy{}, x{};
    if (q.M > 0) {
        if (cudaError_t e = make_tensor_map(&dy, q.dtype, q.dy, q.M, q.N, q.dy_stride, kDepth)) return e;
        if (cudaError_t e = make_tensor_map(&x, q.dtype, q.x, q.M, q.K, q.x_stride, kDepth)) return e;
    }
    Problem p{int(q.N), int(q.K), int(num_steps), q.num_chunks, int(num_items), list, nullptr, nullptr};
    if (q.num_chunks > 1 && num_items > 0) {
        p.arrived = static_cast<int32_t*>(scratch);
        p.partials = reinterpret_cast<float*>(static_cast<char*>(scratch) + counter_bytes(list.num_tiles));
        if (cudaError_t e = cudaMemsetAsync(p.arrived, 0, counter_bytes(list.num_tiles), stream)) return e;
    }
    if (q.dtype == DType::kFloat16) return launch<__half>(dy, x, q.dw, p, stream);
    return launch<__nv_bfloat16>(dy, x, q.dw, p, stream);
}

}  // namespace sensibert
