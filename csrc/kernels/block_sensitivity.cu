// total[block] = sum over the block of w g | |w g| | (w g)^2 | g^2 | w^2;  out = decay out + scale finish(total).
//
// Every tensor is cut into chunks of about 16,384 elements, by its shape and grid alone, and the chunks of all tensors
// are dealt to the resident blocks in turn:
//   element   block (1, 1):            a thread reads four elements and writes four totals
//   segment   whole rows, contiguous:  a warp a segment up to 4,096 elements, above it a block a piece of 16,384
//   tile      all other grids:         128 rows x 128 columns; a lane owns four columns and walks down the rows, its
//                                      warp reads 512 bytes of a row at once; then the sums of the warps are added,
//                                      then those of the columns of a block
// A block in several chunks leaves a partial sum a chunk, which a second launch adds up. Every sum has one order, given
// by the shape: results are bitwise the same for any number of resident blocks and any alignment.
// Cost: reads w and g once; bandwidth bound, with about 9 instructions an element.
#include "block_sensitivity.h"

namespace sensibert {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kChunk = 16384;  // elements of a segment's piece
constexpr int kLongestWarpSegment = 4096;
constexpr int kTileRows = 128, kTileCols = 32 * kQuad;
constexpr int kSharedRows = 17;  // a block of so many rows is read by all warps together, a smaller one by one warp
constexpr int kUnroll = 4;       // quads in flight a thread and operand
constexpr unsigned kAll = 0xffffffffu;

struct Geometry {                // the plan refuses what 32 bits do not count
    int block_rows, block_cols;  // number of blocks along the axes
    int row_pieces, col_pieces;  // pieces a block is cut into
    int strips, strip_blocks;    // tile: column strips of the tensor, blocks side by side in one
    int segments;                // warp segment: segments a chunk
    __host__ __device__ int64_t pieces() const { return int64_t(row_pieces) * col_pieces; }
    __host__ __device__ int64_t blocks() const { return int64_t(block_rows) * block_cols; }
};

__host__ __device__ __forceinline__ int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many blocks of the grid lie side by side in a strip of at most kTileCols columns: together a multiple of four
// columns if some number of blocks is, so that every strip starts aligned.
__host__ __device__ __forceinline__ int blocks_in_strip(int64_t block_cols) {
    if (block_cols > kTileCols) return 1;
    const int most = kTileCols / int(block_cols), step = block_cols % 4 == 0 ? 1 : block_cols % 2 == 0 ? 2 : 4;
    return most < step ? most : most / step * step;
}

__host__ __device__ __forceinline__ Geometry geometry(const BlockSensitivityEntry& e) {
    Geometry g{int(ceil_div(e.rows, e.block_rows)), int(ceil_div(e.cols, e.block_cols)), 1, 1, 0, 0, 0};
    if (e.walk == Walk::kWarpSegment) {
        g.segments = max(kChunk / int(e.block_rows * e.cols) / kWarps, 1) * kWarps;
    } else if (e.walk == Walk::kBlockSegment) {
        g.row_pieces = int(ceil_div(e.block_rows * e.cols, kChunk));
    } else if (e.walk == Walk::kTile) {
        g.strip_blocks = blocks_in_strip(e.block_cols);
        if (e.block_rows >= kSharedRows) g.row_pieces = int(ceil_div(e.block_rows, kTileRows));
        if (e.block_cols > kTileCols) g.col_pieces = int(ceil_div(e.block_cols, kTileCols));
        g.strips = (g.block_cols + g.strip_blocks - 1) / g.strip_blocks * g.col_pieces;
    }
    return g;
}

int64_t count_chunks(const BlockSensitivityEntry& e, const Geometry& g) {
    switch (e.walk) {
        case Walk::kElement: return ceil_div(e.rows * e.cols, kChunk);
        case Walk::kWarpSegment: return ceil_div(g.block_rows, g.segments);
        case Walk::kBlockSegment: return int64_t(g.block_rows) * g.row_pieces;
        default: break;
    }
    return (e.block_rows >= kSharedRows ? int64_t(g.block_rows) * g.row_pieces : ceil_div(g.block_rows, kWarps)) *
           g.strips;
}

// Totals that one block of the finishing launch adds up: neighbours in scratch share a warp.
__host__ __device__ __forceinline__ int finish_width(int64_t blocks) {
    int width = 1;
    while (width < 32 && width < blocks) width *= 2;
    return width;
}

// ---- terms ----

// acc += w g, |w g| or (w g)^2 without a branch: the bits of w g under `keep_bits`, times itself or one.
struct Term {
    unsigned keep_bits;
    bool square;
    __device__ __forceinline__ explicit Term(Reduce reduce)
        : keep_bits(reduce == Reduce::kAbs ? 0x7fffffffu : kAll), square(reduce == Reduce::kSquare) {}
    __device__ __forceinline__ void add(float& acc, float a, float b) const {
        const float p = __uint_as_float(__float_as_uint(a * b) & keep_bits);
        acc = fmaf(p, square ? p : 1.f, acc);
    }
};

__device__ __forceinline__ float load_one(const void* p, DType dtype, int64_t i) {
    float x = 0.f;
    dispatch_dtype(dtype, [&](auto tag) { x = to_float(static_cast<const typename decltype(tag)::type*>(p)[i]); });
    return x;
}

// acc[j] += the terms of element j of `count` quads, `stride` apart, from `offset` on. All quads whole and aligned.
template <typename A, typename B>
__device__ __forceinline__ void add_quads(const A* __restrict__ a, const B* __restrict__ b, int64_t offset,
                                          int64_t stride, int count, Term term, Quad& acc) {
    for (int i = 0; i < count; i += kUnroll) {
        Quad x[kUnroll], y[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {  // all loads first, so that they are in flight together
            x[u] = y[u] = {{0.f, 0.f, 0.f, 0.f}};
            if (i + u < count) {
                x[u] = load_quad(a + offset + (i + u) * stride);
                y[u] = load_quad(b + offset + (i + u) * stride);
            }
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
#pragma unroll
            for (int j = 0; j < kQuad; ++j) term.add(acc.x[j], x[u].x[j], y[u].x[j]);
    }
}

// The same, `valid` elements of each quad, in the same order, one by one.
__device__ __noinline__ Quad add_elements(const BlockSensitivityEntry& e, int64_t offset, int64_t stride, int count,
                                          int valid, Reduce reduce, Quad acc) {
    const Term term(reduce);
    for (int i = 0; i < count; ++i)
        for (int j = 0; j < kQuad; ++j) {
            const int64_t at = offset + i * stride + j;
            if (j < valid) term.add(acc.x[j], load_one(e.a, e.a_dtype, at), load_one(e.b, e.b_dtype, at));
        }
    return acc;
}

__device__ __forceinline__ Quad add(const BlockSensitivityEntry& e, int64_t offset, int64_t stride, int count,
                                    int valid, Reduce reduce, Quad acc) {
    if (count <= 0 || valid <= 0) return acc;
    if (!e.quads || valid < kQuad) return add_elements(e, offset, stride, count, valid, reduce, acc);
    const Term term(reduce);
    dispatch_dtype(e.a_dtype, [&](auto a) {
        dispatch_dtype(e.b_dtype, [&](auto b) {
            using A = typename decltype(a)::type;
            using B = typename decltype(b)::type;
            add_quads(static_cast<const A*>(e.a), static_cast<const B*>(e.b), offset, stride, count, term, acc);
        });
    });
    return acc;
}

// ---- results ----

struct Result {
    Finish finish;
    float decay, scale;
    __device__ __forceinline__ float operator()(float total, float old) const {
        const float value = finish == Finish::kSquare ? total * total : finish == Finish::kAbs ? fabsf(total) : total;
        return decay == 0.f ? scale * value : fmaf(decay, old, scale * value);
    }
    __device__ __forceinline__ void write(float* out, float total) const {
        *out = (*this)(total, decay == 0.f ? 0.f : *out);
    }
};

struct Sink {  // where the totals of neighbouring blocks, or of their piece, go
    float* at;
    bool whole;
    __device__ __forceinline__ Sink(const BlockSensitivityEntry& e, const Geometry& g, float* scratch, int block_row,
                                    int block_col, int piece)
        : whole(g.pieces() == 1) {
        const int64_t index = (block_row * g.pieces() + piece) * g.block_cols + block_col;
        at = whole ? e.out + index : scratch + e.partial + index;
    }
    __device__ __forceinline__ void put(int i, float total, Result result) const {
        if (whole)
            result.write(at + i, total);
        else
            at[i] = total;
    }
};

__device__ __forceinline__ float warp_sum(float x) {
    for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(kAll, x, d);
    return x;
}

__device__ __forceinline__ float quad_sum(const Quad& q) { return (q.x[0] + q.x[1]) + (q.x[2] + q.x[3]); }

// ---- walks ----

__device__ __forceinline__ void element_chunk(const BlockSensitivityEntry& e, int chunk, Reduce reduce, Result result) {
    const int64_t begin = int64_t(chunk) * kChunk, end = min(begin + kChunk, e.rows * e.cols);
    for (int64_t i = begin + threadIdx.x * kQuad; i < end; i += kThreads * kQuad) {
        Quad acc{{0.f, 0.f, 0.f, 0.f}}, old = acc;
        const int valid = int(min(end - i, int64_t(kQuad)));
        const bool whole = e.quads && valid == kQuad;
        if (whole && result.decay != 0.f) old = load_quad(e.out + i);
        acc = add(e, i, 0, 1, valid, reduce, acc);
        for (int j = 0; j < kQuad; ++j) {
            if (!whole && j < valid) result.write(e.out + i + j, acc.x[j]);
            acc.x[j] = result(acc.x[j], old.x[j]);
        }
        if (whole) store_quad(e.out + i, acc);
    }
}

// What thread `lane` of a team of `team` adds of [begin, end).
__device__ __forceinline__ float segment_sum(const BlockSensitivityEntry& e, int64_t begin, int64_t end, int lane,
                                             int team, Reduce reduce) {
    Quad acc{{0.f, 0.f, 0.f, 0.f}};
    const int quads = int((end - begin) / kQuad), tail = int((end - begin) % kQuad);
    const int count = (quads - lane + team - 1) / team;
    acc = add(e, begin + lane * kQuad, team * kQuad, count, kQuad, reduce, acc);
    if (lane == quads % team) acc = add(e, begin + quads * kQuad, 0, 1, tail, reduce, acc);
    return quad_sum(acc);
}

__device__ __forceinline__ void warp_segment_chunk(const BlockSensitivityEntry& e, const Geometry& g, int chunk,
                                                   Reduce reduce, Result result) {
    const int64_t length = e.block_rows * e.cols;
    const int first = chunk * g.segments, last = first + min(g.segments, g.block_rows - first);
    for (int s = first + threadIdx.x / 32; s < last; s += kWarps) {
        const int64_t begin = s * length, end = min(begin + length, e.rows * e.cols);
        const float total = warp_sum(segment_sum(e, begin, end, threadIdx.x % 32, 32, reduce));
        if (threadIdx.x % 32 == 0) result.write(e.out + s, total);
    }
}

__device__ __forceinline__ void block_segment_chunk(const BlockSensitivityEntry& e, const Geometry& g, int chunk,
                                                    Reduce reduce, float* shared, float* scratch, Result result) {
    const int s = chunk / g.row_pieces, piece = chunk % g.row_pieces;
    const Sink sink(e, g, scratch, s, 0, piece);
    const int64_t length = e.block_rows * e.cols, segment_end = min((s + 1) * length, e.rows * e.cols);
    const int64_t begin = min(s * length + int64_t(piece) * kChunk, segment_end);
    const int64_t end = min(begin + kChunk, segment_end);
    const float sum = warp_sum(segment_sum(e, begin, end, threadIdx.x, kThreads, reduce));
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        float total = shared[0];
        for (int w = 1; w < kWarps; ++w) total += shared[w];
        sink.put(0, total, result);
    }
}

// row[0 .. width) summed in groups of block_cols neighbours by the threads `rank`, rank + team, ...
__device__ __forceinline__ void put_groups(const float* row, int width, int block_cols, int num_blocks, int rank,
                                           int team, const Sink& sink, Result result) {
    for (int q = rank; q < num_blocks; q += team) {
        float total = 0.f;
        for (int c = q * block_cols; c < min((q + 1) * block_cols, width); ++c) total += row[c];
        sink.put(q, total, result);
    }
}

__device__ __forceinline__ void tile_chunk(const BlockSensitivityEntry& e, const Geometry& g, int chunk, Reduce reduce,
                                           float* shared,  // [kWarps][kTileCols]
                                           float* scratch, Result result) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const bool together = e.block_rows >= kSharedRows;
    const int strip = chunk % g.strips, row_chunk = chunk / g.strips;

    // Columns: strip_blocks whole blocks, or one piece of a wide one.
    const int first_block = strip / g.col_pieces * g.strip_blocks, col_piece = strip % g.col_pieces;
    const int num_blocks = min(g.strip_blocks, g.block_cols - first_block);
    const int64_t col_begin = first_block * e.block_cols + int64_t(col_piece) * kTileCols;
    const int64_t col_end = min(min(col_begin + kTileCols, (first_block + num_blocks) * e.block_cols), e.cols);
    const int width = int(max(col_end - col_begin, int64_t(0)));  // the last block may be short of its last pieces

    // Rows: a piece of one block that all warps share, or a block of its own for each warp.
    const int block_row = together ? row_chunk / g.row_pieces : row_chunk * kWarps + warp;
    const int row_piece = together ? row_chunk % g.row_pieces : 0, row_step = together ? kWarps : 1;
    const int64_t block_begin = block_row * e.block_rows, row_begin = block_begin + int64_t(row_piece) * kTileRows;
    const int64_t row = row_begin + (together ? warp : 0);
    const int64_t row_end = min(min(row_begin + kTileRows, block_begin + e.block_rows), e.rows);

    const Sink sink(e, g, scratch, block_row, first_block, row_piece * g.col_pieces + col_piece);
    Quad acc{{0.f, 0.f, 0.f, 0.f}};
    const int count = int(max(row_end - row + row_step - 1, int64_t(0)) / row_step);
    const int valid = min(width - lane * kQuad, kQuad);
    acc = add(e, row * e.cols + col_begin + lane * kQuad, row_step * e.cols, count, valid, reduce, acc);
    store_quad(shared + warp * kTileCols + lane * kQuad, acc);

    const int block_cols = int(min(e.block_cols, int64_t(kTileCols)));
    if (!together) {
        __syncwarp();
        if (row < e.rows) put_groups(shared + warp * kTileCols, width, block_cols, num_blocks, lane, 32, sink, result);
        return;
    }
    __syncthreads();
    if (threadIdx.x < kTileCols) {  // the rows of a column, over the warps
        float sum = shared[threadIdx.x];
        for (int w = 1; w < kWarps; ++w) sum += shared[w * kTileCols + threadIdx.x];
        shared[threadIdx.x] = sum;
    }
    __syncthreads();
    if (block_cols < 32) {
        put_groups(shared, width, block_cols, num_blocks, threadIdx.x, kThreads, sink, result);
        return;
    }
    for (int q = warp; q < num_blocks; q += kWarps) {  // few wide blocks: a warp each
        float total = 0.f;
        for (int c = q * block_cols + lane; c < min((q + 1) * block_cols, width); c += 32) total += shared[c];
        total = warp_sum(total);
        if (lane == 0) sink.put(q, total, result);
    }
}

// The tensor that owns item i; Ends is a member of the entry that counts items up to and including it.
__device__ __forceinline__ int owner(const BlockSensitivityPlan& plan, int32_t BlockSensitivityEntry::* ends, int i) {
    int low = 0, high = plan.num_tensors - 1;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (i < plan.entries[middle].*ends)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

__global__ void __launch_bounds__(kThreads, 4)
    block_sensitivity_kernel(const __grid_constant__ BlockSensitivityPlan plan, float* __restrict__ scratch,
                             float decay, float scale) {
    __shared__ __align__(16) float shared[kWarps * kTileCols];
    const Result result{plan.finish, decay, scale};
    for (int i = blockIdx.x; i < plan.num_chunks; i += gridDim.x) {
        const int t = owner(plan, &BlockSensitivityEntry::chunk_end, i);
        const BlockSensitivityEntry& e = plan.entries[t];
        const int chunk = i - (t > 0 ? plan.entries[t - 1].chunk_end : 0);
        const Geometry g = geometry(e);
        switch (e.walk) {
            case Walk::kElement: element_chunk(e, chunk, plan.reduce, result); break;
            case Walk::kWarpSegment: warp_segment_chunk(e, g, chunk, plan.reduce, result); break;
            case Walk::kBlockSegment: block_segment_chunk(e, g, chunk, plan.reduce, shared, scratch, result); break;
            case Walk::kTile: tile_chunk(e, g, chunk, plan.reduce, shared, scratch, result); break;
        }
        __syncthreads();  // the next chunk reuses `shared`
    }
}

// A block adds the pieces of `width` totals: thread (x, y) those y, y + height, ... of total x, then the y by a tree.
__global__ void __launch_bounds__(kThreads)
    block_sensitivity_finish_kernel(const __grid_constant__ BlockSensitivityPlan plan,
                                    const float* __restrict__ scratch, float decay, float scale) {
    __shared__ float shared[kThreads];
    const int t = owner(plan, &BlockSensitivityEntry::finish_end, blockIdx.x);
    const BlockSensitivityEntry& e = plan.entries[t];
    const Geometry g = geometry(e);
    const int width = finish_width(g.blocks()), height = kThreads / width;
    const int x = threadIdx.x % width, y = threadIdx.x / width;
    const int64_t total_index = int64_t(blockIdx.x - (t > 0 ? plan.entries[t - 1].finish_end : 0)) * width + x;
    const int64_t block_row = total_index / g.block_cols, block_col = total_index % g.block_cols, pieces = g.pieces();
    float sum = 0.f;
    if (total_index < g.blocks())
#pragma unroll 4
        for (int64_t p = y; p < pieces; p += height)
            sum += scratch[e.partial + (block_row * pieces + p) * g.block_cols + block_col];
    shared[threadIdx.x] = sum;
    for (int half = height / 2; half > 0; half /= 2) {
        __syncthreads();
        if (y < half) shared[threadIdx.x] += shared[threadIdx.x + half * width];
    }
    if (y == 0 && total_index < g.blocks())  // the same thread wrote shared[x] last
        Result{plan.finish, decay, scale}.write(e.out + total_index, shared[x]);
}

Walk walk_of(const BlockSensitivityEntry& e) {
    if (e.block_rows == 1 && e.block_cols == 1) return Walk::kElement;
    if (e.block_cols < e.cols) return Walk::kTile;
    return e.block_rows * e.cols <= kLongestWarpSegment ? Walk::kWarpSegment : Walk::kBlockSegment;
}

// Whether every quad that the walk reads starts at a multiple of four elements.
bool starts_aligned(const BlockSensitivityEntry& e) {
    if (!quad_aligned(e.a, e.a_dtype) || !quad_aligned(e.b, e.b_dtype)) return false;
    if (e.walk == Walk::kElement) return quad_aligned(e.out, DType::kFloat32);
    if (e.walk == Walk::kTile) return e.cols % kQuad == 0 && blocks_in_strip(e.block_cols) * e.block_cols % kQuad == 0;
    return e.block_rows == e.rows || e.block_rows * e.cols % kQuad == 0;
}

}  // namespace

int plan_block_sensitivity(const BlockSensitivityTensor* tensors, int count, Reduce reduce, Finish finish,
                           BlockSensitivityPlan* plan) {
    plan->num_partials = 0;
    plan->num_tensors = plan->num_chunks = plan->num_finish = 0;
    plan->reduce = reduce;
    plan->finish = finish;
    int taken = 0;
    int64_t chunks = 0, finishing = 0;
    for (; taken < count && plan->num_tensors < kBlockSensitivityMaxTensors; ++taken) {
        const BlockSensitivityTensor& t = tensors[taken];
        if (t.rows == 0 || t.cols == 0) continue;
        BlockSensitivityEntry& e = plan->entries[plan->num_tensors];
        const bool twice_w = reduce == Reduce::kWeightSquare, twice_g = reduce == Reduce::kGradSquare;
        e.a = twice_g ? t.grad : t.weight;
        e.b = twice_w ? t.weight : t.grad;
        e.a_dtype = twice_g ? t.grad_dtype : t.weight_dtype;
        e.b_dtype = twice_w ? t.weight_dtype : t.grad_dtype;
        e.out = t.out;
        e.rows = t.rows;
        e.cols = t.cols;
        e.block_rows = t.block_rows > 0 ? min(t.block_rows, t.rows) : t.rows;
        e.block_cols = t.block_cols > 0 ? min(t.block_cols, t.cols) : t.cols;
        e.walk = walk_of(e);
        e.quads = starts_aligned(e);
        const bool countable =
            e.walk == Walk::kElement || max(ceil_div(e.rows, e.block_rows), e.cols / e.block_cols) < INT32_MAX;
        const Geometry g = geometry(e);
        e.partial = plan->num_partials;
        if (g.pieces() > 1) {
            plan->num_partials += g.blocks() * g.pieces();
            finishing += ceil_div(g.blocks(), finish_width(g.blocks()));
        }
        chunks += count_chunks(e, g);
        if (!countable || chunks > INT32_MAX || finishing > INT32_MAX) break;
        e.chunk_end = int32_t(chunks);
        e.finish_end = int32_t(finishing);
        plan->num_chunks = e.chunk_end;
        plan->num_finish = e.finish_end;
        ++plan->num_tensors;
    }
    return taken;
}

cudaError_t launch_block_sensitivity(const BlockSensitivityPlan& plan, float* scratch, float decay, float scale,
                                     cudaStream_t stream) {
    if (plan.num_chunks == 0) return cudaSuccess;
    int resident = 0;
    if (cudaError_t e = resident_blocks(block_sensitivity_kernel, kThreads, 0, &resident)) return e;
    const dim3 grid(unsigned(min(plan.num_chunks, resident)));
    if (cudaError_t e =
            SENSIBERT_LAUNCH(block_sensitivity_kernel, grid, dim3(kThreads), 0, stream, plan, scratch, decay, scale))
        return e;
    if (plan.num_finish == 0) return cudaSuccess;
    const dim3 finish_grid(unsigned(plan.num_finish));
    return SENSIBERT_LAUNCH(block_sensitivity_finish_kernel, finish_grid, dim3(kThreads), 0, stream, plan, scratch,
                            decay, scale);
}

}  // namespace sensibert
