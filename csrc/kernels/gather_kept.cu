// The kept rows and columns of many weights, copied into smaller matrices and into the dtype to compute with.
//
//   weight [N, K]         out [n, k]            out is cut into tiles of 4,096 elements; a block takes tiles one after
//     x . x x . x           x x x x             the other, whichever weight they are of; a thread moves quads.
//     . . . . . .    ->     x 0 x x             All columns kept: a quad is one read. Else four reads, ascending and
//     x . o x . x                               close together, so that a warp still finds them in few sectors.
//
// Cost: what is kept is read once and written once, + 1 byte an element for the holes (o). All entries are launch
// parameters: nothing is uploaded, so CUDA graphs work.
#include "gather_kept.h"

namespace sensibert {
namespace {

constexpr int kThreads = 256;
constexpr int kTileBits = 12, kTile = 1 << kTileBits;  // elements
constexpr int kWideBits = 8;                           // columns of a tile, where there are as many
constexpr int kMaxTensors = 448;                       // entries of one launch; more tensors: more launches
constexpr int64_t kMaxAxis = (int64_t(1) << 31) - kTile;
static_assert(kTile % (kThreads * kQuad) == 0, "every thread moves the same number of quads");

struct Entry {
    const void* weight;
    const int64_t* rows;
    const int64_t* cols;
    const int8_t* bits;
    void* out;
    uint32_t N, K, n, k;
    uint32_t first_tile;  // counted over the tensors of this launch
    DType dtype, out_dtype;
    uint8_t col_bits;          // log2 of the tile's columns
    bool quads_in, quads_out;  // whether a full quad may be read, written at once
    bool quads_bits;           // likewise, of bits
};

struct Args {
    Entry entries[kMaxTensors];
    int num_entries;
    uint32_t num_tiles;
};
static_assert(sizeof(Args) <= 32764, "kernel parameters end at 32,764 bytes");

// Four bytes of bits at `at`, or as many as there are: byte j is 0 in a hole.
__device__ __forceinline__ uint32_t load_bits(const Entry& e, int64_t at, int count) {
    if (e.quads_bits && count == kQuad) return *reinterpret_cast<const uint32_t*>(e.bits + at);
    uint32_t bits = 0;
    for (int j = 0; j < kQuad; ++j)
        if (j < count) bits |= uint32_t(uint8_t(e.bits[at + j])) << 8 * j;
    return bits;
}

template <typename In, typename Out>
__device__ __forceinline__ void gather_tile(const Entry& e, uint32_t row0, uint32_t col0) {
    const float nan = nanf("");
    const uint32_t quad_mask = (1u << e.col_bits) / kQuad - 1;
    for (int i = 0; i < kTile / kQuad / kThreads; ++i) {
        const uint32_t quad = i * kThreads + threadIdx.x;
        const uint32_t row = row0 + (quad >> (e.col_bits - 2)), col = col0 + (quad & quad_mask) * kQuad;
        if (row >= e.n || col >= e.k) continue;
        const int count = int(min(uint32_t(kQuad), e.k - col));
        const uint64_t from = e.rows ? uint64_t(e.rows[row]) : row;  // unsigned: below 0 is beyond N
        Quad q{{nan, nan, nan, nan}};
        if (from < e.N) {
            const In* const source = static_cast<const In*>(e.weight) + int64_t(from) * e.K;
            if (e.quads_in && count == kQuad) {
                q = load_quad(source + col);
            } else {
                for (int j = 0; j < kQuad; ++j) {
                    if (j >= count) continue;
                    const uint64_t c = e.cols ? uint64_t(e.cols[col + j]) : col + j;
                    if (c < e.K) q.x[j] = to_float(source[c]);
                }
            }
        }
        const int64_t at = int64_t(row) * e.k + col;
        if (e.bits) {
            const uint32_t bits = load_bits(e, at, count);
            for (int j = 0; j < kQuad; ++j)
                if (!(bits >> 8 * j & 255)) q.x[j] = 0.f;
        }
        Out* const out = static_cast<Out*>(e.out) + at;
        if (e.quads_out && count == kQuad) {
            store_quad(out, q);
        } else {
            for (int j = 0; j < kQuad; ++j)
                if (j < count) out[j] = from_float<Out>(q.x[j]);
        }
    }
}

__global__ void __launch_bounds__(kThreads) gather_kept_kernel(const __grid_constant__ Args args) {
    for (uint32_t tile = blockIdx.x; tile < args.num_tiles; tile += gridDim.x) {
        int entry = 0;
        for (int above = args.num_entries; above - entry > 1;) {  // the last one that starts at or before this tile
            const int middle = (entry + above) / 2;
            (args.entries[middle].first_tile <= tile ? entry : above) = middle;
        }
        const Entry& e = args.entries[entry];
        const uint32_t across = ((e.k - 1) >> e.col_bits) + 1, inside = tile - e.first_tile;
        const uint32_t row0 = inside / across << (kTileBits - e.col_bits), col0 = inside % across << e.col_bits;
        dispatch_dtype(e.dtype, [&](auto in) {
            dispatch_dtype(e.out_dtype, [&](auto out) {
                gather_tile<typename decltype(in)::type, typename decltype(out)::type>(e, row0, col0);
            });
        });
    }
}

uint8_t col_bits_of(int64_t n, int64_t k) {
    int bits = 2;
    while (bits < kWideBits && (int64_t(1) << bits) < k) ++bits;
    while (bits < kTileBits && (kTile >> bits) / 2 >= n) ++bits;  // few rows: more columns
    return uint8_t(bits);
}

cudaError_t launch(Args& args, cudaStream_t stream) {
    if (args.num_tiles == 0) return cudaSuccess;
    auto* kernel = gather_kept_kernel;
    int num_blocks = 0;
    if (cudaError_t error = resident_blocks(kernel, kThreads, 0, &num_blocks)) return error;
    num_blocks = int(min(uint32_t(num_blocks), args.num_tiles));
    return SENSIBERT_LAUNCH(kernel, dim3(unsigned(num_blocks)), dim3(kThreads), 0, stream, args);
}

}  // namespace

cudaError_t launch_gather_kept(const GatherTensor* tensors, int64_t num_tensors, cudaStream_t stream) {
    for (int64_t t = 0; t < num_tensors; ++t) {
        const GatherTensor& g = tensors[t];
        if (g.N >= kMaxAxis || g.K >= kMaxAxis || g.n >= kMaxAxis || g.k >= kMaxAxis) return cudaErrorInvalidValue;
        if (g.n == 0 || g.k == 0) continue;  // an empty index may have no storage
        if ((!g.rows && g.n != g.N) || (!g.cols && g.k != g.K)) return cudaErrorInvalidValue;
    }
    Args args{};
    for (int64_t t = 0; t < num_tensors; ++t) {
        const GatherTensor& g = tensors[t];
        if (g.n == 0 || g.k == 0) continue;
        Entry e{};
        e.weight = g.weight, e.rows = g.rows, e.cols = g.cols, e.bits = g.bits, e.out = g.out;
        e.N = uint32_t(g.N), e.K = uint32_t(g.K), e.n = uint32_t(g.n), e.k = uint32_t(g.k);
        e.dtype = g.dtype, e.out_dtype = g.out_dtype, e.col_bits = col_bits_of(g.n, g.k);
        e.quads_in = !g.cols && g.K % kQuad == 0 && quad_aligned(g.weight, g.dtype);
        e.quads_out = g.k % kQuad == 0 && quad_aligned(g.out, g.out_dtype);
        e.quads_bits = g.k % kQuad == 0 && reinterpret_cast<uintptr_t>(g.bits) % kQuad == 0;
        const int64_t tile_rows = kTile >> e.col_bits, tile_cols = int64_t(1) << e.col_bits;
        const int64_t tiles = ((g.n + tile_rows - 1) / tile_rows) * ((g.k + tile_cols - 1) / tile_cols);
        if (tiles >= kMaxAxis) return cudaErrorInvalidValue;  // 2^43 elements
        if (args.num_entries == kMaxTensors || int64_t(args.num_tiles) + tiles >= kMaxAxis) {
            if (cudaError_t error = launch(args, stream)) return error;
            args.num_entries = 0, args.num_tiles = 0;
        }
        e.first_tile = args.num_tiles;
        args.entries[args.num_entries++] = e;
        args.num_tiles += uint32_t(tiles);
    }
    return launch(args, stream);
}

}  // namespace sensibert
