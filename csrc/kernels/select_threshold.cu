// Exactly the k largest of many score tensors: larger first, then the earlier tensor, then the lower index, NaN last.
//
// A float becomes a 32-bit key of the same order, and an element's place (chunk after chunk, tensor after tensor) makes
// it unique: value = key << place_bits | (last place - place). The k-th largest value is found digit by digit, from the
// top: count the values that share the digits found so far by their next digit, step down from the largest bin until k
// are passed, go on inside that bin. Integer counts in any order are the same counts: exact, deterministic, and never
// more or fewer than k, however many scores tie.
//
//   scores  [chunk 0 | chunk 1 | ...]  a chunk is 16,384 scores of one tensor; block b takes chunks b, b + grid, ...
//   sample  reads up to a million scores, guesses a narrow window of keys around the k-th largest
//   split   reads all, writes keep for keys above and below the window, counts them, lists the values inside
//   first   where the guess was wrong or its window too full: reads all, counts them by the upper 13 bits of the key
//   next..  counts the next 13 bits of the listed values (a percent of all); of all scores while there is no list, and
//           lists as soon as a list can hold them: unfavourable data cost time, not correctness
//   apply   sets keep for listed values at or above the k-th; without a list, writes keep for all
// Cost: with a right guess 4 or 2 bytes read and 1 written a score; each further pass over all, one more read.
#include "select_threshold.h"

#include <algorithm>

#ifndef SENSIBERT_SELECT_THREADS
#define SENSIBERT_SELECT_THREADS 512  // fewer in tests: the CPU machine runs them in sequence
#endif

namespace sensibert {
namespace {

using Count = unsigned long long;  // the type that CUDA's 64-bit atomics take

constexpr int kThreads = SENSIBERT_SELECT_THREADS, kBlocksPerSm = 2;
constexpr int kChunkBits = 14, kChunk = 1 << kChunkBits;
constexpr int kDigitBits = 13, kBins = 1 << kDigitBits;  // 32 KB of counters in shared memory
constexpr int kBinsPerThread = kBins / kThreads;
constexpr int kLowBits = 32 - kDigitBits;               // of the key, below its first digit
constexpr unsigned kGuessWidth = 1u << (kLowBits - 1);  // 1/32 of an octave: about a percent of usual scores
constexpr int kMaxPlaceBits = 44;
constexpr int kSampleBits = 20;       // at most 2^20 scores are sampled; 2^19 place a quantile to 0.07 %
constexpr int kInFlight = 4;          // quads a thread loads before it looks at the first
constexpr int64_t kMinRegion = 2048;  // list entries of a block
constexpr int64_t kListShare = 8;     // the list holds one value in 8
constexpr int kTableRows = 400;       // rows a launch can carry by value
constexpr unsigned kZeroKey = 0x80000000u, kInfKey = 0xff800000u;
static_assert(kLowBits + kMaxPlaceBits < 64, "a value inside its window of keys is shifted as 64 bits");
static_assert(kInfKey < 0u - (1u << kLowBits), "the end of a window does not wrap around");
static_assert(kBins % kThreads == 0, "each thread scans the same number of bins");

struct Row {
    SelectTensor tensor;
    int64_t first_chunk;  // where its chunks start, counted over all tensors
};

struct Table {
    Row rows[kTableRows];
};
static_assert(sizeof(Table) <= 32764 - 32, "kernel parameters end at 32,764 bytes");

// The values still in question: their keys lie in [base, base + width), and (key - base) << place_bits | (last place -
// place) starts with the digits in `prefix`.
struct State {
    unsigned base, width;  // after `sample` a guess, width 0: none worth a list
    Count prefix;
    Count rank;                            // how many of them are kept,
    Count num_alike;                       // of how many
    Count cut;                             // the least that is kept, as far as its digits are known
    Count num_above, num_inside, num_nan;  // counts of the split pass
    unsigned listed;                       // the list holds all values in question
    unsigned done;                         // rank == num_alike: nothing is left to find
    unsigned num_overflows, num_arrived;   // blocks whose list was too short; blocks at the end of this pass
};

struct Work {
    const Row* rows;
    int64_t num_rows, num_chunks, num_scores, k;
    int place_bits, stratum_bits;  // 2^stratum_bits scores, one of them sampled
    Count last_place;
    State* state;
    Count* hist;           // [kBins]
    unsigned* num_listed;  // [num_blocks]
    Count* list;           // [num_blocks, region]
    int64_t region;
    float* threshold;
    int64_t* num_nan;
};

// Larger float, larger key; -0.0 as 0.0; any NaN 0, which is below -inf.
__device__ __forceinline__ unsigned key_of(float x) {
    const unsigned bits = __float_as_uint(x + 0.f);  // -0.f + 0.f is 0.f
    const unsigned key = bits ^ (unsigned(int(bits) >> 31) | 0x80000000u);
    return x == x ? key : 0;
}

__device__ __forceinline__ float float_of(unsigned key) {
    return __uint_as_float(key == 0 ? 0x7fc00000u : key >> 31 ? key & 0x7fffffffu : ~key);
}

// A value inside its window.
__device__ __forceinline__ Count rest_of(const Work& w, unsigned key, unsigned base, Count place) {
    return Count(key - base) << w.place_bits | (w.last_place - place);
}

// The row that a chunk, counted over all tensors, belongs to.
__device__ __forceinline__ const Row& row_of(const Work& w, int64_t chunk) {
    int64_t low = 0, high = w.num_rows;  // rows[low].first_chunk <= chunk < rows[high].first_chunk
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (w.rows[middle].first_chunk <= chunk ? low : high) = middle;
    }
    return w.rows[low];
}

// p is not shared memory, which the compiler cannot know of a pointer out of a table; global loads are cheaper.
template <typename T>
__device__ __forceinline__ T* global(T* p) {
#ifdef __CUDA_ARCH__
    __builtin_assume(__isGlobal(p));
#endif
    return p;
}

// Calls visit(key, place) once for every score of the chunk; where `store`, keeps what it returns.
template <typename Visit>
__device__ __forceinline__ void visit_chunk(const Work& w, int64_t chunk, bool store, Visit&& visit) {
    const Row& row = row_of(w, chunk);
    const int64_t begin = (chunk - row.first_chunk) * kChunk;
    const int count = int(min(row.tensor.size - begin, int64_t(kChunk)));
    const Count place = Count(chunk) << kChunkBits;
    uint8_t* const keep = global(row.tensor.keep) + begin;
    dispatch_dtype(row.tensor.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const T* const scores = global(static_cast<const T*>(row.tensor.scores)) + begin;
        const bool quads = quad_aligned(scores, row.tensor.dtype) && reinterpret_cast<uintptr_t>(keep) % kQuad == 0;
        const int end = quads ? count / kQuad * kQuad : 0, step = kThreads * kQuad;
        for (int at = threadIdx.x * kQuad; at < end; at += kInFlight * step) {
            Quad quad[kInFlight] = {};
#pragma unroll
            for (int f = 0; f < kInFlight; ++f)
                if (at + f * step < end) quad[f] = load_quad(scores + at + f * step);
#pragma unroll
            for (int f = 0; f < kInFlight; ++f) {
                const int i = at + f * step;
                if (i >= end) break;
                unsigned kept = 0;
#pragma unroll
                for (int j = 0; j < kQuad; ++j) kept |= unsigned(visit(key_of(quad[f].x[j]), place + i + j)) << 8 * j;
                if (store) *reinterpret_cast<unsigned*>(keep + i) = kept;
            }
        }
        for (int i = end + threadIdx.x; i < count; i += kThreads) {
            const bool kept = visit(key_of(to_float(scores[i])), place + i);
            if (store) keep[i] = kept;
        }
    });
}

// Counts digits in shared memory. Equal neighbours are added up first: a constant tensor would make every thread wait
// for the same counter.
struct Tally {
    unsigned* hist;  // [kBins]
    unsigned digit = 0, run = 0;
    __device__ __forceinline__ void add(unsigned d) {
        if (d != digit) {
            flush();
            digit = d;
            run = 0;
        }
        ++run;
    }
    __device__ __forceinline__ void flush() const {
        if (run) atomicAdd(&hist[digit], run);
    }
};

// True in the last block to come, whose threads then see what every block wrote before.
__device__ bool arrive(const Work& w) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(&w.state->num_arrived, 1u) == gridDim.x - 1;
    __syncthreads();
    return last;
}

// Adds the block's counts of digits to the total.
__device__ void add_counts(const Work& w, const unsigned* hist) {
    __syncthreads();
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads)
        if (hist[bin]) atomicAdd(&w.hist[bin], Count(hist[bin]));
}

// The part of the list that this block writes and reads.
struct List {
    Count* entries;
    int64_t room;
    unsigned* size;  // in shared memory; also counts values that do not fit

    __device__ __forceinline__ void append(Count rest) const {
        const unsigned slot = atomicAdd(size, 1u);
        if (slot < room) entries[slot] = rest;
    }
    // After a __syncthreads.
    __device__ __forceinline__ void close(const Work& w) const {
        if (threadIdx.x != 0) return;
        w.num_listed[blockIdx.x] = *size;
        if (*size > room) atomicAdd(&w.state->num_overflows, 1u);
    }
};

__device__ __forceinline__ List list_of(const Work& w, unsigned* size) {
    return {w.list + blockIdx.x * w.region, w.region, size};
}

struct Pick {
    unsigned bin;
    Count above, inside;  // counts of the larger bins, and of this one
};

// Sums of the total counts, largest bin first: sums[t] ends with bin kBins - (t + 1) * kBinsPerThread.
__device__ void scan_bins(const Work& w, Count* sums) {
    const int t = threadIdx.x;
    Count sum = 0;
    for (int j = 0; j < kBinsPerThread; ++j) sum += atomicAdd(&w.hist[kBins - 1 - t * kBinsPerThread - j], Count(0));
    sums[t] = sum;
    for (int d = 1; d < kThreads; d *= 2) {
        __syncthreads();
        const Count left = t >= d ? sums[t - d] : 0;
        __syncthreads();
        sums[t] += left;
    }
    __syncthreads();
}

// The bin that holds the rank-th largest, 1 <= rank <= sums[kThreads - 1]; clears the counts for the next pass.
__device__ Pick pick_bin(const Work& w, const Count* sums, Count rank) {
    __shared__ Pick pick;
    const int t = threadIdx.x, first = kBins - 1 - t * kBinsPerThread;
    Count above = t ? sums[t - 1] : 0;
    if (above < rank && rank <= sums[t]) {
        for (int j = 0; j < kBinsPerThread; ++j) {
            const Count inside = atomicAdd(&w.hist[first - j], Count(0));
            if (rank <= above + inside) {
                pick = {unsigned(first - j), above, inside};
                break;
            }
            above += inside;
        }
    }
    for (int j = 0; j < kBinsPerThread; ++j) w.hist[first - j] = 0;
    __syncthreads();
    return pick;
}

__global__ void select_threshold_table_kernel(const __grid_constant__ Table table, Row* rows, int num_rows) {
    for (int r = threadIdx.x; r < num_rows; r += kThreads) rows[r] = table.rows[r];
}

// Guesses the key of the k-th largest from one score of every stratum, at a place that a hash chooses: a fixed stride
// would see only some columns of a matrix.
__global__ void __launch_bounds__(kThreads) select_threshold_sample_kernel(const __grid_constant__ Work w) {
    __shared__ unsigned hist[kBins];
    __shared__ Count sums[kThreads];
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) hist[bin] = 0;
    __syncthreads();
    const int per_chunk_bits = kChunkBits - w.stratum_bits;
    const int64_t num_strata = w.num_chunks << per_chunk_bits;
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < num_strata; i += int64_t(gridDim.x) * kThreads) {
        const Row& row = row_of(w, i >> per_chunk_bits);
        const int64_t stratum = i - (row.first_chunk << per_chunk_bits);
        const unsigned hash = unsigned(i) * 2654435761u >> 16;
        const int64_t at = (stratum << w.stratum_bits) + (hash & ((1u << w.stratum_bits) - 1));
        if (at >= row.tensor.size) continue;
        dispatch_dtype(row.tensor.dtype, [&](auto tag) {
            using T = typename decltype(tag)::type;
            const unsigned key = key_of(to_float(static_cast<const T*>(row.tensor.scores)[at]));
            atomicAdd(&hist[key >> kLowBits], 1u);
        });
    }
    add_counts(w, hist);
    if (!arrive(w)) return;
    scan_bins(w, sums);
    const double num_samples = double(sums[kThreads - 1]), share = num_samples / double(w.num_scores);
    const bool any = num_samples > 0 && w.k > 0;
    const double rank = (double(w.k) - 0.5) * share;
    const Pick pick = pick_bin(w, sums, any ? Count(rank) + 1 : 1);
    if (threadIdx.x != 0) return;
    w.state->num_arrived = 0;
    const double room = 0.75 * double(w.region) * gridDim.x;  // a sample errs, and blocks differ
    if (!any || double(pick.inside) > room * share) return;
    const double height = 1 - (rank - double(pick.above)) / double(pick.inside);  // in the bin, were its keys even
    const unsigned key = (pick.bin << kLowBits) + unsigned(fmax(height, 0.) * (1u << kLowBits));
    w.state->base = min(max(key, kGuessWidth / 2) - kGuessWidth / 2, kInfKey);
    w.state->width = kGuessWidth;
}

__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    select_threshold_split_kernel(const __grid_constant__ Work w) {
    __shared__ unsigned num_listed;
    __shared__ Count num_above, num_nan;
    const unsigned base = w.state->base, width = w.state->width, above = base + width;
    if (width == 0) return;
    if (threadIdx.x == 0) {
        num_listed = 0;
        num_above = num_nan = 0;
    }
    __syncthreads();
    const List list = list_of(w, &num_listed);
    unsigned my_above = 0, my_nan = 0;
    for (int64_t chunk = blockIdx.x; chunk < w.num_chunks; chunk += gridDim.x)
        visit_chunk(w, chunk, true, [&](unsigned key, Count place) {
            if (key - base < width) list.append(rest_of(w, key, base, place));
            const bool kept = key >= above;
            my_above += kept;
            my_nan += key == 0;
            return kept;
        });
    if (my_above) atomicAdd(&num_above, Count(my_above));
    if (my_nan) atomicAdd(&num_nan, Count(my_nan));
    __syncthreads();
    list.close(w);
    if (threadIdx.x == 0) {
        atomicAdd(&w.state->num_above, num_above);
        atomicAdd(&w.state->num_inside, Count(num_listed));
        atomicAdd(&w.state->num_nan, num_nan);
    }
    if (!arrive(w) || threadIdx.x != 0) return;
    const Count all_above = atomicAdd(&w.state->num_above, Count(0));
    const Count inside = atomicAdd(&w.state->num_inside, Count(0));
    *w.num_nan = int64_t(atomicAdd(&w.state->num_nan, Count(0)));
    w.state->rank = Count(w.k) - all_above;
    w.state->num_alike = inside;
    const bool fits = atomicExch(&w.state->num_overflows, 0u) == 0;
    w.state->listed = fits && all_above < Count(w.k) && Count(w.k) <= all_above + inside;
    w.state->num_arrived = 0;
}

// kFirst counts the first digits of all keys; else the digit [shift, high) of the values in question.
template <bool kFirst>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    select_threshold_count_kernel(const __grid_constant__ Work w, int high, int shift) {
    __shared__ unsigned hist[kBins], num_listed;
    __shared__ Count sums[kThreads];
    const bool listed = w.state->listed;
    if (kFirst ? listed : bool(w.state->done)) return;
    const unsigned base = w.state->base, width = w.state->width, above = base + width;
    const Count prefix = w.state->prefix;
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) hist[bin] = 0;
    if (threadIdx.x == 0) num_listed = 0;
    __syncthreads();

    const List list = list_of(w, &num_listed);
    const unsigned digit_mask = (1u << (high - shift)) - 1;
    const bool collect = !kFirst && !listed && w.state->num_alike <= Count(w.region) * gridDim.x;
    Tally tally{hist};
    if constexpr (kFirst) {
        unsigned num_zeros = 0;  // a mask's worth of exact zeros is common: not through one counter
        for (int64_t chunk = blockIdx.x; chunk < w.num_chunks; chunk += gridDim.x)
            visit_chunk(w, chunk, false, [&](unsigned key, Count) {
                if (key == kZeroKey) {
                    ++num_zeros;
                } else {
                    tally.add(key >> kLowBits);
                }
                return false;
            });
        if (num_zeros) atomicAdd(&hist[kZeroKey >> kLowBits], num_zeros);
    } else if (listed) {
        for (unsigned i = threadIdx.x; i < w.num_listed[blockIdx.x]; i += kThreads)
            if (list.entries[i] >> high == prefix) tally.add(unsigned(list.entries[i] >> shift) & digit_mask);
    } else {
        for (int64_t chunk = blockIdx.x; chunk < w.num_chunks; chunk += gridDim.x)
            visit_chunk(w, chunk, collect, [&](unsigned key, Count place) {
                if (key - base >= width) return key >= above;
                const Count rest = rest_of(w, key, base, place), head = rest >> high;
                if (head == prefix) {
                    tally.add(unsigned(rest >> shift) & digit_mask);
                    if (collect) list.append(rest);
                }
                return head > prefix;
            });
    }
    tally.flush();
    __syncthreads();
    if (collect) list.close(w);
    add_counts(w, hist);
    if (!arrive(w)) return;

    scan_bins(w, sums);
    if (kFirst && threadIdx.x == 0) *w.num_nan = int64_t(atomicAdd(&w.hist[0], Count(0)));  // only NaN has a key so low
    __syncthreads();
    const Count rank = kFirst ? Count(w.k) : w.state->rank;
    const Pick pick = pick_bin(w, sums, rank);
    if (threadIdx.x != 0) return;
    State next = *w.state;
    const bool fits = atomicAdd(&w.state->num_overflows, 0u) == 0;
    next.num_overflows = next.num_arrived = 0;
    next.rank = rank - pick.above;
    next.num_alike = pick.inside;
    if (collect) next.listed = fits;
    if (kFirst) {
        next.base = pick.bin << kLowBits;
        next.width = 1u << kLowBits;
    } else {
        next.prefix = prefix << (high - shift) | pick.bin;
        next.cut = next.prefix << shift;
    }
    if (!kFirst && shift <= w.place_bits) {  // the key is complete
        *w.threshold = float_of(base + unsigned(next.prefix >> (w.place_bits - shift)));
        next.done = next.rank == next.num_alike;
    }
    if (kFirst && rank == 0) {
        next.base = kInfKey + 1;  // nothing reaches it
        next.done = 1;
        *w.threshold = float_of(kInfKey);
    }
    *w.state = next;
}

__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    select_threshold_apply_kernel(const __grid_constant__ Work w) {
    const unsigned base = w.state->base, width = w.state->width, above = base + width;
    const Count cut = w.state->cut;
    if (w.state->listed) {
        const Count* const entries = w.list + blockIdx.x * w.region;
        for (unsigned i = threadIdx.x; i < w.num_listed[blockIdx.x]; i += kThreads) {
            if (entries[i] < cut) continue;
            const Count place = w.last_place - (entries[i] & w.last_place);
            const Row& row = row_of(w, int64_t(place >> kChunkBits));
            row.tensor.keep[int64_t(place) - (row.first_chunk << kChunkBits)] = 1;
        }
        return;
    }
    for (int64_t chunk = blockIdx.x; chunk < w.num_chunks; chunk += gridDim.x)
        visit_chunk(w, chunk, true, [&](unsigned key, Count place) {
            return key - base < width ? rest_of(w, key, base, place) >= cut : key >= above;
        });
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sizes everything. Pointers into scratch are set from `scratch`; *bytes is where they end.
cudaError_t plan(const SelectProblem& p, char* scratch, Work* work, int* num_blocks, size_t* bytes) {
    Work w = {};
    for (int64_t i = 0; i < p.num_tensors; ++i) {
        const SelectTensor& t = p.tensors[i];
        w.num_scores += t.size;
        w.num_rows += t.size != 0;
        w.num_chunks += ceil_div(t.size, kChunk);
    }
    w.k = p.k;
    w.threshold = p.threshold;
    w.num_nan = p.num_nan;
    while ((int64_t(1) << w.place_bits) < w.num_chunks * kChunk && w.place_bits <= kMaxPlaceBits) ++w.place_bits;
    w.stratum_bits = std::clamp(w.place_bits - kSampleBits, 0, kChunkBits);
    w.last_place = (Count(1) << w.place_bits) - 1;
    if (w.k < 0 || w.k > w.num_scores || w.place_bits > kMaxPlaceBits) return cudaErrorInvalidValue;
    auto* kernel = select_threshold_count_kernel<true>;
    if (cudaError_t error = resident_blocks(kernel, kThreads, 0, num_blocks)) return error;
    *num_blocks = int(std::clamp<int64_t>(w.num_chunks, 1, *num_blocks));
    w.region = std::max(kMinRegion, ceil_div(w.num_scores, kListShare * *num_blocks));

    size_t at = 0;
    const auto take = [&](auto*& pointer, int64_t count) {
        pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(scratch + at);
        at += (count * sizeof *pointer + 15) / 16 * 16;
    };
    take(w.state, 1);
    take(w.hist, kBins);  // directly after the state, so that both are cleared together
    take(w.num_listed, *num_blocks);
    take(w.list, *num_blocks * w.region);
    take(w.rows, w.num_rows);
    *bytes = at;
    *work = w;
    return cudaSuccess;
}

// Copies the rows to the device as kernel parameters, which a CUDA graph keeps; host memory it would read at replay.
cudaError_t write_table(const SelectProblem& p, const Work& w, cudaStream_t stream) {
    Table table;
    int64_t chunk = 0, written = 0;
    int filled = 0;
    for (int64_t i = 0; i <= p.num_tensors; ++i) {
        if (filled == kTableRows || (i == p.num_tensors && filled)) {
            Row* const rows = const_cast<Row*>(w.rows) + written;
            if (cudaError_t error = SENSIBERT_LAUNCH(select_threshold_table_kernel, dim3(1), dim3(kThreads), 0, stream,
                                                     table, rows, filled))
                return error;
            written += filled;
            filled = 0;
        }
        if (i == p.num_tensors || p.tensors[i].size == 0) continue;
        const SelectTensor& t = p.tensors[i];
        table.rows[filled++] = {t, chunk};
        chunk += ceil_div(t.size, kChunk);
    }
    return cudaSuccess;
}

}  // namespace

cudaError_t select_threshold_scratch_bytes(const SelectProblem& problem, size_t* bytes) {
    Work work;
    int num_blocks;
    return plan(problem, nullptr, &work, &num_blocks, bytes);
}

cudaError_t launch_select_threshold(const SelectProblem& problem, void* scratch, cudaStream_t stream) {
    Work w;
    int num_blocks;
    size_t bytes;
    if (cudaError_t error = plan(problem, static_cast<char*>(scratch), &w, &num_blocks, &bytes)) return error;
    const size_t cleared = reinterpret_cast<char*>(w.hist + kBins) - reinterpret_cast<char*>(w.state);
    if (cudaError_t error = cudaMemsetAsync(w.state, 0, cleared, stream)) return error;
    if (cudaError_t error = write_table(problem, w, stream)) return error;
    const auto launch = [&](auto* kernel, int64_t num_items, auto... args) {
        const dim3 grid(unsigned(std::min<int64_t>(num_blocks, num_items)));
        return SENSIBERT_LAUNCH(kernel, grid, dim3(kThreads), 0, stream, w, args...);
    };
    if (cudaError_t error = launch(select_threshold_sample_kernel, num_blocks)) return error;
    if (cudaError_t error = launch(select_threshold_split_kernel, num_blocks)) return error;
    if (cudaError_t error = launch(select_threshold_count_kernel<true>, num_blocks, kDigitBits, 0)) return error;
    for (int high = kLowBits + w.place_bits; high > 0; high -= kDigitBits) {
        const int shift = std::max(0, high - kDigitBits);
        if (cudaError_t error = launch(select_threshold_count_kernel<false>, num_blocks, high, shift)) return error;
    }
    return launch(select_threshold_apply_kernel, num_blocks);
}

}  // namespace sensibert
