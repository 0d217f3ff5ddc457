// One AdamW step over all tensors, in one pass over memory (Loshchilov and Hutter, 1711.05101):
//
//   g = grad * factor        m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
//   w = w (1 - lr decay) - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//   dropped elements: w = m = v = 0, whatever they held, and they are not read;  working copy = bf16(w), with maps compact:
//   copy[row_map[i]][col_map[j]] = bf16(w[i][j]) where both have a place
//   score of a block = finish(sum of reduce(w before the step, g)) over its survivors
//
// A tensor [N, K] is cut into tiles of 4,096 elements, a block of threads each; a thread moves quads (4 elements).
//
//        128 columns            Scores: a tile puts one term an element into shared memory, sums down the rows of each
//      +-------------+          score block, then along its columns. A score block inside one tile is final there, else
//   32 | tile 0 | 1  | ...      the tile leaves a partial sum in scratch and the finishing kernel adds the tiles of a
//      +-------------+          block in their order: no atomics, and the same bits whatever the machine.
//      | tile 2 | 3  | ...
//
// Small N or K: the tile is flatter or narrower. No mask, score, map: one row of N*K, so only the last quad is short.
// Cost: 28 bytes an fp32 element (read w, g, m, v, write w, m, v), + 2 for the working copy, + 1 / block for keep; 12 (+ 2)
// where a quad is dropped. All tensor entries are launch parameters: nothing is uploaded, so CUDA graphs work.
#include "masked_adamw.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

namespace sensibert {
namespace {

constexpr int kThreads = 256, kWarpSize = 32;
constexpr int kTileBits = 12, kTile = 1 << kTileBits;  // elements
constexpr int kWideBits = 7;                           // columns of a tile, where there are as many
constexpr int kMaxTensors = 236, kMaxExtras = 192;     // entries of one launch; more tensors: more launches
constexpr int kMaxSettings = 64;   // different settings of one launch, however many groups share them
constexpr int kTilesPerLane = 32;  // partial sums that a thread of the finishing kernel adds
constexpr int64_t kMaxAxis = (int64_t(1) << 31) - kTile;  // so that row and column fit 32 bits inside a tile's reach
static_assert(kTile % (kThreads * kQuad) == 0, "every thread moves the same number of quads");

struct Entry {
    void* param;
    const void* grad;
    void* exp_avg;
    void* exp_avg_sq;
    const float* step;
    int64_t cols;
    uint32_t rows;
    uint32_t first_tile;  // counted over the tensors of this launch
    int16_t extra;        // index of its Extra, or -1
    uint16_t group;
    uint8_t settings;
    DType dtype;
    uint8_t col_bits;  // log2 of the tile's columns
    bool quads;        // whether full quads may be moved at once
};

struct Extra {
    const uint8_t* keep;
    __nv_bfloat16* copy;
    float* score;
    float* partial;                                         // of this tensor, [tile][block rows][block columns]
    uint32_t keep_rows, keep_cols, score_rows, score_cols;  // block sizes, the whole axis spelt out
    uint32_t first_finisher;  // first block of the finishing kernel that works for this tensor
    uint8_t keep_quads;       // 1: a quad lies in one keep block, 4: it is four of them, aligned; 0: neither
    bool final_in_tile : 1;   // no score block reaches beyond its tile
    bool copy_quads : 1;      // whether a row of the compact working copy takes full quads
    uint16_t lanes;           // threads of the finishing kernel a score block
    const int32_t* row_map;
    const int32_t* col_map;
    uint32_t copy_rows, copy_cols;  // of the compact working copy; no row where there is no map
};

struct Settings {
    float beta1, beta2, rest1, rest2;  // rest = 1 - beta
    float log_beta1, log_beta2;
    float eps, weight_decay;
};

struct Args {
    Entry entries[kMaxTensors];
    Extra extras[kMaxExtras];
    Settings settings[kMaxSettings];
    const float* lr;
    const float* grad_factor;
    int num_entries, num_extras, num_settings;
    Reduce reduce;
    Finish finish;
    float decay, scale;
};
static_assert(sizeof(Args) <= 32764, "kernel parameters end at 32,764 bytes");

__host__ __device__ __forceinline__ uint32_t ceil_div(int64_t a, int64_t b) { return uint32_t((a + b - 1) / b); }

// Score blocks that a tile of `tile` elements along an axis can touch, whatever its place.
__host__ __device__ __forceinline__ uint32_t blocks_in_tile(uint32_t block, uint32_t tile) {
    if (block % tile == 0) return 1;
    return tile % block == 0 ? tile / block : (tile - 1) / block + 2;
}

__device__ __forceinline__ Quad score_terms(Reduce reduce, const Quad& w, const Quad& g) {
    Quad t;
    for (int j = 0; j < kQuad; ++j) t.x[j] = w.x[j] * g.x[j];
    switch (reduce) {
        case Reduce::kSigned: break;
        case Reduce::kAbs:
            for (int j = 0; j < kQuad; ++j) t.x[j] = fabsf(t.x[j]);
            break;
        case Reduce::kSquare:
            for (int j = 0; j < kQuad; ++j) t.x[j] *= t.x[j];
            break;
        case Reduce::kGradSquare:
            for (int j = 0; j < kQuad; ++j) t.x[j] = g.x[j] * g.x[j];
            break;
        case Reduce::kWeightSquare:
            for (int j = 0; j < kQuad; ++j) t.x[j] = w.x[j] * w.x[j];
            break;
    }
    return t;
}

__device__ __forceinline__ void write_score(const Args& args, float* score, float total) {
    if (args.finish == Finish::kSquare) total *= total;
    if (args.finish == Finish::kAbs) total = fabsf(total);
    *score = args.scale * total + (args.decay != 0.f ? args.decay * *score : 0.f);  // decay 0 ignores the old value
}

struct Rates {
    float beta1, beta2, rest1, rest2, eps;
    float shrink, step_size, root2;  // 1 - lr decay; lr / (1 - beta1^t); 1 / sqrt(1 - beta2^t)
    float factor;
};

__device__ __forceinline__ Rates rates_of(const Args& args, const Entry& e) {
    const Settings& s = args.settings[e.settings];
    const float t = *e.step, lr = args.lr[e.group];
    Rates r;
    r.beta1 = s.beta1, r.beta2 = s.beta2, r.rest1 = s.rest1, r.rest2 = s.rest2, r.eps = s.eps;
    r.shrink = 1.f - lr * s.weight_decay;
    r.step_size = lr / -expm1f(t * s.log_beta1);  // 1 - beta^t without the cancellation
    r.root2 = 1.f / sqrtf(-expm1f(t * s.log_beta2));
    r.factor = args.grad_factor ? *args.grad_factor : 1.f;
    return r;
}

__device__ __forceinline__ void adamw(const Rates& r, float g, float& w, float& m, float& v) {
    m = fmaf(r.beta1, m, r.rest1 * g);
    v = fmaf(r.beta2, v, r.rest2 * g * g);
    w = fmaf(-r.step_size, m / fmaf(sqrtf(v), r.root2, r.eps), w * r.shrink);
}

template <typename T>
__device__ __forceinline__ Quad load_some(const T* p, int n) {
    Quad q{};
    for (int j = 0; j < kQuad; ++j)
        if (j < n) q.x[j] = to_float(p[j]);
    return q;
}
template <typename T>
__device__ __forceinline__ void store_some(T* p, const Quad& q, int n) {
    for (int j = 0; j < kQuad; ++j)
        if (j < n) p[j] = from_float<T>(q.x[j]);
}

// One bit an element: which of the quad at (row, col) survive.
__device__ __forceinline__ unsigned survivors(const Extra& x, int64_t cols, uint32_t row, uint32_t col, int n) {
    const uint8_t* const keep = x.keep + int64_t(row / x.keep_rows) * ceil_div(cols, x.keep_cols);
    if (x.keep_quads == 1) return keep[col / x.keep_cols] ? 15u : 0u;
    unsigned bits = 0;
    if (x.keep_quads == 4) {
        const uint32_t four = *reinterpret_cast<const uint32_t*>(keep + col);
        for (int j = 0; j < kQuad; ++j) bits |= (four >> 8 * j & 1) << j;
        return bits;
    }
    for (int j = 0; j < kQuad; ++j)
        if (j < n) bits |= unsigned(keep[(col + j) / x.keep_cols] != 0) << j;
    return bits;
}

// Writes what has a place in the compact working copy. Unsigned, -1 lies beyond every axis.
__device__ __forceinline__ void store_compact(const Extra& x, uint32_t row, uint32_t col, const Quad& q, int n) {
    const uint32_t to = x.row_map ? uint32_t(x.row_map[row]) : row;
    if (to >= x.copy_rows) return;
    __nv_bfloat16* const out = x.copy + int64_t(to) * x.copy_cols;
    if (!x.col_map && n == kQuad && x.copy_quads) return store_quad(out + col, q);
    for (int j = 0; j < kQuad; ++j) {
        if (j >= n) continue;
        const uint32_t c = x.col_map ? uint32_t(x.col_map[col + j]) : col + j;
        if (c < x.copy_cols) out[c] = from_float<__nv_bfloat16>(q.x[j]);
    }
}

// Updates the tile at (row0, col0); terms[element of the tile] receives the score terms, 0 where there is none.
template <typename T>
__device__ __forceinline__ void step_tile(const Args& args, const Entry& e, const Extra* x, const Rates& r,
                                          uint32_t row0, int64_t col0, float* terms) {
    const uint32_t quad_mask = (1u << e.col_bits) / kQuad - 1;
    for (int i = 0; i < kTile / kQuad / kThreads; ++i) {
        const uint32_t quad = i * kThreads + threadIdx.x;
        const uint32_t row = row0 + (quad >> (e.col_bits - 2));
        const int64_t col = col0 + (quad & quad_mask) * kQuad;
        float* const term = terms ? terms + quad * kQuad : nullptr;
        if (row >= e.rows || col >= e.cols) {
            if (term) store_quad(term, Quad{});
            continue;
        }
        const int n = int(min(int64_t(kQuad), e.cols - col));
        const bool whole = e.quads && n == kQuad;
        const int64_t at = int64_t(row) * e.cols + col;
        const unsigned alive = x && x->keep ? survivors(*x, e.cols, row, uint32_t(col), n) : 15u;
        T* const param = static_cast<T*>(e.param) + at;
        const T* const grad = static_cast<const T*>(e.grad) + at;
        T* const exp_avg = static_cast<T*>(e.exp_avg) + at;
        T* const exp_avg_sq = static_cast<T*>(e.exp_avg_sq) + at;
        Quad w{}, g{}, m{}, v{}, score{};
        if (alive) {
            if (whole) {  // one branch: all four are under way before the first is used
                w = load_quad(param), g = load_quad(grad), m = load_quad(exp_avg), v = load_quad(exp_avg_sq);
            } else {
                w = load_some(param, n), g = load_some(grad, n);
                m = load_some(exp_avg, n), v = load_some(exp_avg_sq, n);
            }
            for (int j = 0; j < kQuad; ++j) g.x[j] *= r.factor;
            if (term) score = score_terms(args.reduce, w, g);
            for (int j = 0; j < kQuad; ++j) {
                adamw(r, g.x[j], w.x[j], m.x[j], v.x[j]);
                if (!(alive >> j & 1)) w.x[j] = m.x[j] = v.x[j] = score.x[j] = 0.f;
            }
        }
        if (term) store_quad(term, score);
        const bool compact = x && x->copy_rows;
        __nv_bfloat16* const copy = x && x->copy && !compact ? x->copy + at : nullptr;
        Quad stored;  // an fp16 weight is rounded twice, as casting the parameter would
        for (int j = 0; j < kQuad; ++j) stored.x[j] = to_float(from_float<T>(w.x[j]));
        if (whole) {
            store_quad(param, w), store_quad(exp_avg, m), store_quad(exp_avg_sq, v);
            if (copy) store_quad(copy, stored);
        } else {
            store_some(param, w, n), store_some(exp_avg, m, n), store_some(exp_avg_sq, v, n);
            if (copy) store_some(copy, stored, n);
        }
        if (compact) store_compact(*x, row, uint32_t(col), stored, n);
    }
}

// terms -> the sums of the tile's share of each score block. All threads of the block take part.
__device__ void reduce_tile(const Args& args, const Entry& e, const Extra& x, uint32_t tile, uint32_t row0,
                            uint32_t col0, float* terms) {
    const uint32_t tile_cols = 1u << e.col_bits, tile_rows = kTile >> e.col_bits;
    const uint32_t num_rows = min(tile_rows, e.rows - row0), num_cols = min(tile_cols, uint32_t(e.cols) - col0);
    const uint32_t top = row0 / x.score_rows, left = col0 / x.score_cols;  // the first score block
    const uint32_t block_rows = (row0 + num_rows - 1) / x.score_rows - top + 1;
    const uint32_t block_cols = (col0 + num_cols - 1) / x.score_cols - left + 1;
    // Rows and columns of score block b inside the tile: from, and up to.
    const auto row_from = [&](uint32_t b) { return b ? (top + b) * x.score_rows - row0 : 0; };
    const auto row_to = [&](uint32_t b) { return b + 1 < block_rows ? row_from(b + 1) : num_rows; };
    const auto col_from = [&](uint32_t b) { return b ? (left + b) * x.score_cols - col0 : 0; };
    const auto col_to = [&](uint32_t b) { return b + 1 < block_cols ? col_from(b + 1) : num_cols; };

    __syncthreads();
    if (x.score_rows > 1) {  // down the rows: each column's sum ends in the first row of the block
        for (uint32_t u = threadIdx.x; u < block_rows << e.col_bits; u += kThreads) {
            const uint32_t b = u >> e.col_bits, col = u & (tile_cols - 1);
            float* const first = terms + (row_from(b) << e.col_bits) + col;
            const uint32_t height = row_to(b) - row_from(b);
            float sum = *first;
            for (uint32_t r = 1; r < height; ++r) sum += first[r << e.col_bits];
            *first = sum;
        }
    }
    __syncthreads();
    uint32_t lanes = 1;  // threads a block along the columns
    while (lanes < kWarpSize && lanes * kQuad < min(x.score_cols, tile_cols)) lanes *= 2;
    const uint32_t num_blocks = block_rows * block_cols, lane = threadIdx.x % lanes;
    for (uint32_t first = 0; first < num_blocks;
         first += kThreads / lanes) {  // the same turns for all: shuffles inside
        const uint32_t u = first + threadIdx.x / lanes, b = u / block_cols, c = u % block_cols;
        float sum = 0.f;
        if (u < num_blocks) {
            const float* const sums = terms + (row_from(b) << e.col_bits);
            for (uint32_t col = col_from(c) + lane; col < col_to(c); col += lanes) sum += sums[col];
        }
        for (uint32_t d = lanes / 2; d; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
        if (u >= num_blocks || lane) continue;
        if (x.final_in_tile) {
            write_score(args, x.score + int64_t(top + b) * ceil_div(e.cols, x.score_cols) + left + c, sum);
        } else {
            const uint32_t most_rows = blocks_in_tile(x.score_rows, tile_rows);
            const uint32_t most_cols = blocks_in_tile(x.score_cols, tile_cols);
            x.partial[(int64_t(tile) * most_rows + b) * most_cols + c] = sum;
        }
    }
}

// 64 registers at most: the loads in flight come from 4 resident blocks, not from unrolling.
__global__ void __launch_bounds__(kThreads, 4) masked_adamw_kernel(const __grid_constant__ Args args) {
    __shared__ __align__(16) float terms[kTile];
    int entry = 0;
    for (int above = args.num_entries; above - entry > 1;) {  // the last one that starts at or before this tile
        const int middle = (entry + above) / 2;
        (args.entries[middle].first_tile <= blockIdx.x ? entry : above) = middle;
    }
    const Entry& e = args.entries[entry];
    const Extra* const x = e.extra < 0 ? nullptr : &args.extras[e.extra];
    const uint32_t tile = blockIdx.x - e.first_tile, tiles_across = ceil_div(e.cols, int64_t(1) << e.col_bits);
    const uint32_t row0 = tile / tiles_across << (kTileBits - e.col_bits);
    const int64_t col0 = int64_t(tile % tiles_across) << e.col_bits;
    const Rates rates = rates_of(args, e);
    const bool scored = x && x->score;
    dispatch_dtype(e.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        step_tile<T>(args, e, x, rates, row0, col0, scored ? terms : nullptr);
    });
    if (scored) reduce_tile(args, e, *x, tile, row0, uint32_t(col0), terms);
}

// Adds the partial sums of each score block that spans tiles: `lanes` threads a block, each every lanes-th tile.
__global__ void __launch_bounds__(kThreads) masked_adamw_finish_kernel(const __grid_constant__ Args args) {
    __shared__ float sums[kThreads];
    int entry = -1;
    for (int t = 0; t < args.num_entries; ++t) {  // entries without partial sums start where the next one does
        const int extra = args.entries[t].extra;
        if (extra < 0 || !args.extras[extra].partial) continue;
        if (args.extras[extra].first_finisher <= blockIdx.x) entry = t;
    }
    const Entry& e = args.entries[entry];
    const Extra& x = args.extras[e.extra];
    const uint32_t tile_cols = 1u << e.col_bits, tile_rows = kTile >> e.col_bits;
    const uint32_t most_rows = blocks_in_tile(x.score_rows, tile_rows);
    const uint32_t most_cols = blocks_in_tile(x.score_cols, tile_cols);
    const uint32_t tiles_across = ceil_div(e.cols, tile_cols), across = ceil_div(e.cols, x.score_cols);
    const uint32_t num_blocks = ceil_div(e.rows, x.score_rows) * across;
    const uint32_t block = (blockIdx.x - x.first_finisher) * (kThreads / x.lanes) + threadIdx.x / x.lanes;
    const uint32_t lane = threadIdx.x % x.lanes;
    float sum = 0.f;
    if (block < num_blocks) {
        const uint32_t b = block / across, c = block % across;
        const uint32_t row_to = uint32_t(min(int64_t(e.rows), (int64_t(b) + 1) * x.score_rows));
        const uint32_t col_to = uint32_t(min(e.cols, (int64_t(c) + 1) * x.score_cols));
        const uint32_t top = b * x.score_rows / tile_rows, left = c * x.score_cols / tile_cols;
        const uint32_t high = (row_to - 1) / tile_rows - top + 1, wide = (col_to - 1) / tile_cols - left + 1;
        for (uint32_t i = lane; i < high * wide; i += x.lanes) {
            const uint32_t tr = top + i / wide, tc = left + i % wide;
            const uint32_t inside_row = b - tr * tile_rows / x.score_rows,
                           inside_col = c - tc * tile_cols / x.score_cols;
            const int64_t tile = int64_t(tr) * tiles_across + tc;
            sum += x.partial[(tile * most_rows + inside_row) * most_cols + inside_col];
        }
    }
    sums[threadIdx.x] = sum;
    for (uint32_t d = x.lanes / 2; d; d /= 2) {  // a tree inside each group of lanes
        __syncthreads();
        if (lane < d) sums[threadIdx.x] = sum += sums[threadIdx.x + d];
    }
    if (block < num_blocks && lane == 0) write_score(args, x.score + block, sum);
}

// ---- host: the tensors as the kernels see them ----

uint8_t log2_up(int64_t x, int most) {
    int bits = 0;
    while (bits < most && (int64_t(1) << bits) < x) ++bits;
    return uint8_t(bits);
}

struct Planned {
    Entry entry{};
    Extra extra{};
    bool has_extra = false, fits = true;
    int64_t num_tiles = 0, num_partials = 0, num_finishers = 0;
};

Planned plan(const AdamWTensor& t) {
    Planned p;
    int64_t rows = t.N, cols = t.K, keep_rows = t.keep_rows, keep_cols = t.keep_cols;
    int64_t score_rows = t.score_rows, score_cols = t.score_cols, copy_rows = t.copy_rows;
    int64_t copy_cols = t.copy_cols;
    const int32_t *row_map = t.row_map, *col_map = t.col_map;
    if (rows == 0 || cols == 0) return p;
    const bool mapped = t.copy && (t.row_map || t.col_map), blocks = t.keep || t.score || mapped;
    if (!blocks) cols *= rows, rows = 1;
    if (cols == 1) {  // a vector is processed as a row; its blocks are transposed too
        std::swap(rows, cols);
        keep_cols = keep_rows, keep_rows = 1;
        score_cols = score_rows, score_rows = 1;
        std::swap(row_map, col_map);
        std::swap(copy_rows, copy_cols);
    }
    p.fits = rows < kMaxAxis && (!blocks || cols < kMaxAxis);
    const auto size_of = [](int64_t block, int64_t axis) { return uint32_t(block && block < axis ? block : axis); };

    Entry& e = p.entry;
    e.param = t.param, e.grad = t.grad, e.exp_avg = t.exp_avg, e.exp_avg_sq = t.exp_avg_sq, e.step = t.step;
    e.rows = uint32_t(rows), e.cols = cols;
    e.extra = -1, e.group = uint16_t(t.group), e.dtype = t.dtype;
    e.col_bits = log2_up(cols, kWideBits) < 2 ? 2 : log2_up(cols, kWideBits);
    while (e.col_bits < kTileBits && (kTile >> e.col_bits) / 2 >= rows) ++e.col_bits;  // few rows: more columns
    e.quads = rows == 1 || cols % kQuad == 0;
    const void* const pointers[] = {t.param, t.grad, t.exp_avg, t.exp_avg_sq};
    for (const void* pointer : pointers) e.quads = e.quads && quad_aligned(pointer, t.dtype);
    e.quads = e.quads && (mapped || quad_aligned(t.copy, DType::kBFloat16));
    const uint32_t tile_cols = 1u << e.col_bits, tile_rows = kTile >> e.col_bits;
    p.num_tiles = int64_t(ceil_div(rows, tile_rows)) * ((cols + tile_cols - 1) / tile_cols);

    Extra& x = p.extra;
    p.has_extra = blocks || t.copy;
    x.keep = t.keep, x.copy = t.copy, x.score = t.score;
    if (!blocks || !p.fits) return p;
    if (mapped) {
        p.fits = copy_rows < kMaxAxis && copy_cols < kMaxAxis;
        x.row_map = row_map, x.col_map = col_map;
        x.copy_rows = uint32_t(copy_rows), x.copy_cols = uint32_t(copy_cols);
        x.copy_quads = copy_cols % kQuad == 0 && quad_aligned(t.copy, DType::kBFloat16);
        if (copy_rows == 0 || copy_cols == 0) x.copy = nullptr, x.copy_rows = 0;
    }
    x.keep_rows = size_of(keep_rows, rows), x.keep_cols = size_of(keep_cols, cols);
    x.score_rows = size_of(score_rows, rows), x.score_cols = size_of(score_cols, cols);
    const bool elements = x.keep_cols == 1 && cols % kQuad == 0 && reinterpret_cast<uintptr_t>(t.keep) % kQuad == 0;
    x.keep_quads = x.keep_cols == uint32_t(cols) || x.keep_cols % kQuad == 0 ? 1 : elements ? 4 : 0;
    if (!t.score) return p;
    x.final_in_tile =
        (rows <= tile_rows || tile_rows % x.score_rows == 0) && (cols <= tile_cols || tile_cols % x.score_cols == 0);
    if (x.final_in_tile) return p;
    p.num_partials = p.num_tiles * blocks_in_tile(x.score_rows, tile_rows) * blocks_in_tile(x.score_cols, tile_cols);
    const int64_t num_blocks = int64_t(ceil_div(rows, x.score_rows)) * ceil_div(cols, x.score_cols);
    const int64_t high = x.score_rows / tile_rows + 1, wide = x.score_cols / tile_cols + 1;
    x.lanes = uint16_t(1 << log2_up(high * wide / kTilesPerLane, 8));
    p.num_finishers = (num_blocks + kThreads / x.lanes - 1) / (kThreads / x.lanes);
    p.fits = num_blocks < kMaxAxis;
    return p;
}

Settings settings_of(const AdamWGroup& g) {
    return {float(g.beta1),           float(g.beta2),           float(1 - g.beta1), float(1 - g.beta2),
            float(std::log(g.beta1)), float(std::log(g.beta2)), float(g.eps),       float(g.weight_decay)};
}

// The position of `settings` in the table, where it is added if it is new; -1: the table is full.
int place_settings(Args& args, const Settings& settings) {
    for (int i = 0; i < args.num_settings; ++i)
        if (memcmp(&args.settings[i], &settings, sizeof settings) == 0) return i;
    if (args.num_settings == kMaxSettings) return -1;
    args.settings[args.num_settings] = settings;
    return args.num_settings++;
}

cudaError_t launch(Args& args, int64_t num_tiles, int64_t num_finishers, cudaStream_t stream) {
    if (args.num_entries == 0) return cudaSuccess;
    auto* kernel = masked_adamw_kernel;
    cudaError_t error = SENSIBERT_LAUNCH(kernel, dim3(unsigned(num_tiles)), dim3(kThreads), 0, stream, args);
    if (error != cudaSuccess || num_finishers == 0) return error;
    auto* finish = masked_adamw_finish_kernel;
    return SENSIBERT_LAUNCH(finish, dim3(unsigned(num_finishers)), dim3(kThreads), 0, stream, args);
}

}  // namespace

size_t masked_adamw_scratch_bytes(const AdamWProblem& problem) {
    int64_t floats = 0;
    for (int64_t t = 0; t < problem.num_tensors; ++t) floats += plan(problem.tensors[t]).num_partials;
    return size_t(floats) * sizeof(float);
}

cudaError_t launch_masked_adamw(const AdamWProblem& problem, float* scratch, cudaStream_t stream) {
    if (problem.num_groups > std::numeric_limits<uint16_t>::max()) return cudaErrorInvalidValue;
    Args args{};
    args.lr = problem.lr, args.grad_factor = problem.grad_factor;
    args.reduce = problem.reduce, args.finish = problem.finish, args.decay = problem.decay, args.scale = problem.scale;
    int64_t num_tiles = 0, num_finishers = 0;
    for (int64_t t = 0; t < problem.num_tensors; ++t) {
        Planned p = plan(problem.tensors[t]);
        if (!p.fits) return cudaErrorInvalidValue;
        if (p.num_tiles == 0) continue;
        const Settings settings = settings_of(problem.groups[p.entry.group]);
        const bool full = args.num_entries == kMaxTensors || args.num_extras + p.has_extra > kMaxExtras ||
                          place_settings(args, settings) < 0 || num_tiles + p.num_tiles >= kMaxAxis ||
                          num_finishers + p.num_finishers >= kMaxAxis;
        if (full) {
            if (cudaError_t error = launch(args, num_tiles, num_finishers, stream)) return error;
            args.num_entries = args.num_extras = args.num_settings = 0;
            num_tiles = num_finishers = 0;
        }
        p.entry.settings = uint8_t(place_settings(args, settings));
        p.entry.first_tile = uint32_t(num_tiles);
        if (p.has_extra) {
            p.entry.extra = int16_t(args.num_extras);
            p.extra.first_finisher = uint32_t(num_finishers);
            if (p.num_partials) p.extra.partial = scratch, scratch += p.num_partials;
            args.extras[args.num_extras++] = p.extra;
        }
        args.entries[args.num_entries++] = p.entry;
        num_tiles += p.num_tiles, num_finishers += p.num_finishers;
    }
    return launch(args, num_tiles, num_finishers, stream);
}

}  // namespace sensibert
