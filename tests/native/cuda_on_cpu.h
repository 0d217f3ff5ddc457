// Runs CUDA kernels on the CPU, for tests at small sizes. The threads of a block are fibers of one host thread: they
// run in a fixed order (forward, or backward with CUDA_ON_CPU_BACKWARD=1) and switch only at barriers and warp
// operations, so a run is repeatable, a divergent barrier is an error and no hang, and a block costs microseconds.
// ThreadSanitizer is told of each fiber and of exactly the order that __syncthreads and __syncwarp give, no more: it
// reports a missing barrier although nothing runs in parallel. AddressSanitizer is told of the stacks.
// Serves: __shared__ static and dynamic, __syncthreads, __syncwarp, warp shuffles and votes, integer atomics, 16-byte
// vectors, bf16 and fp16. Not: tensor cores, TMA, clusters, waiting for a block that comes later, order between blocks
// beyond what running them backward shows.
#pragma once
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define CUDA_ON_CPU_TSAN(...) __VA_ARGS__
#else
#define CUDA_ON_CPU_TSAN(...)
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define CUDA_ON_CPU_ASAN(...) __VA_ARGS__
#else
#define CUDA_ON_CPU_ASAN(...)
#endif
#define CUDA_ON_CPU_HIDDEN __attribute__((noinline, no_sanitize_thread))  // the scheduler is not what is under test
#define CUDA_ON_CPU_UNSEEN __attribute__((noinline, no_sanitize_thread, no_sanitize_address, no_sanitize_undefined))

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static  // one block runs at a time

using std::max;
using std::min;

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorNoKernelImageForDevice = 209,
};
using cudaStream_t = void*;
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
    memset(p, value, bytes);
    return cudaSuccess;
}

namespace cuda_on_cpu {

constexpr unsigned kWarp = 32, kFullMask = 0xffffffffu;
constexpr size_t kStackBytes = 256 << 10, kSharedBytes = 227 << 10;

enum class State { kReady, kAtWarp, kAtBlock, kSpinning, kDone };

using Place = void* [5];  // of __builtin_setjmp

struct Fiber {
    unsigned char* stack = nullptr;
    Place place;  // where it goes on
    bool begun = false;
    dim3 thread;
    unsigned linear = 0;
    State state = State::kDone;
    unsigned mask = 0;               // of the warp operation it waits at
    uint64_t offer = 0;              // its operand there
    uint64_t* seen;                  // the operands of its warp, once all have arrived, until the next operation
    const uint32_t* word = nullptr;  // what it spins on: it goes on once *word & bits is not `value`
    uint32_t bits = 0, value = 0;
    unsigned syncs = 0;       // __syncthreads passed
    unsigned warp_syncs = 0;  // __syncwarp passed
    char gate[2];             // of __syncwarp, by parity: a lane may reach the next before all have left the last
    void* tsan = nullptr;
    void* fake_stack = nullptr;
};

struct Machine {
    Fiber fibers[1024];
    uint64_t seen[1024];
    Place scheduler;
    Fiber* running = nullptr;
    std::function<void()> body;
    std::vector<uint64_t> dynamic_shared;
    dim3 block_dim, grid_dim, block_index;
    char start_gate, end_gate, block_gate[2];
    void* scheduler_tsan = nullptr;
    const void* main_stack = nullptr;
    size_t main_stack_bytes = 0;
    void* main_fake_stack = nullptr;
    bool backward = getenv("CUDA_ON_CPU_BACKWARD") != nullptr;
    bool moved = false;  // something happened that a spinning thread may wait for (hopper_on_cpu.h)
};
inline Machine machine;

CUDA_ON_CPU_HIDDEN inline Fiber& self() { return *machine.running; }

// From one stack to the other, as swapcontext does, but without its two system calls.
[[noreturn]] CUDA_ON_CPU_UNSEEN inline void go(Place& to) { __builtin_longjmp(to, 1); }
CUDA_ON_CPU_UNSEEN inline void jump(Place& from, Place& to) {
    if (!__builtin_setjmp(from)) go(to);
}

CUDA_ON_CPU_HIDDEN inline void to_scheduler(State state) {
    Fiber& f = self();
    f.state = state;
    CUDA_ON_CPU_ASAN(__sanitizer_start_switch_fiber(&f.fake_stack, machine.main_stack, machine.main_stack_bytes);)
    CUDA_ON_CPU_TSAN(__tsan_switch_to_fiber(machine.scheduler_tsan, __tsan_switch_to_fiber_no_sync);)
    jump(f.place, machine.scheduler);
    CUDA_ON_CPU_ASAN(__sanitizer_finish_switch_fiber(f.fake_stack, nullptr, nullptr);)
}

// Runs one thread after the other: of each block the one of its place.
CUDA_ON_CPU_HIDDEN inline void fiber_main() {
    CUDA_ON_CPU_ASAN(__sanitizer_finish_switch_fiber(nullptr, &machine.main_stack, &machine.main_stack_bytes);)
    for (;;) {
        CUDA_ON_CPU_TSAN(__tsan_acquire(&machine.start_gate);)
        machine.body();
        CUDA_ON_CPU_TSAN(__tsan_release(&machine.end_gate);)
        to_scheduler(State::kDone);
    }
}

CUDA_ON_CPU_UNSEEN inline void begin(Fiber& f, Place& from) {
    if (__builtin_setjmp(from)) return;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = f.stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, fiber_main, 0);
    setcontext(&context);
}

CUDA_ON_CPU_HIDDEN inline void resume(Fiber& f) {
    machine.running = &f;
    CUDA_ON_CPU_ASAN(__sanitizer_start_switch_fiber(&machine.main_fake_stack, f.stack, kStackBytes);)
    CUDA_ON_CPU_TSAN(__tsan_switch_to_fiber(f.tsan, __tsan_switch_to_fiber_no_sync);)
    if (f.begun)
        jump(machine.scheduler, f.place);
    else
        f.begun = true, begin(f, machine.scheduler);
    CUDA_ON_CPU_ASAN(__sanitizer_finish_switch_fiber(machine.main_fake_stack, nullptr, nullptr);)
}

[[noreturn]] CUDA_ON_CPU_HIDDEN inline void stuck(unsigned num_threads) {
    const dim3& b = machine.block_index;
    fprintf(stderr, "cuda_on_cpu: block (%u, %u, %u) is stuck:\n", b.x, b.y, b.z);
    for (unsigned t = 0; t < num_threads; ++t) {
        const Fiber& f = machine.fibers[t];
        if (f.state == State::kAtBlock) fprintf(stderr, "  thread %u waits at __syncthreads number %u\n", t, f.syncs);
        if (f.state == State::kAtWarp) fprintf(stderr, "  thread %u waits for lanes 0x%08x of its warp\n", t, f.mask);
        if (f.state == State::kSpinning) fprintf(stderr, "  thread %u waits for a barrier in shared memory\n", t);
        if (f.state == State::kDone) fprintf(stderr, "  thread %u has left the kernel\n", t);
    }
    abort();
}

// Lets the lanes of one warp run until each waits for the block or is done.
CUDA_ON_CPU_HIDDEN inline void run_warp(unsigned first, unsigned last) {
    Fiber* const lanes = &machine.fibers[first];
    const unsigned n = last - first;
    for (bool moved = true; moved;) {
        moved = false;
        for (unsigned i = 0; i < n; ++i) {
            Fiber& f = lanes[machine.backward ? n - 1 - i : i];
            if (f.state != State::kReady) continue;
            if (f.word && (*f.word & f.bits) == f.value)
                f.state = State::kSpinning;
            else
                resume(f), moved = true;
        }
        for (unsigned i = 0; i < n; ++i) {  // release the groups of lanes that are complete
            const unsigned mask = lanes[i].mask;
            if (lanes[i].state != State::kAtWarp) continue;
            bool complete = (mask >> i & 1) && (n == kWarp || mask >> n == 0);
            for (unsigned j = 0; j < n; ++j)
                if (mask >> j & 1) complete = complete && lanes[j].state == State::kAtWarp && lanes[j].mask == mask;
            if (!complete) continue;
            for (unsigned j = 0; j < n; ++j) {
                if (!(mask >> j & 1)) continue;
                lanes[j].seen[j] = lanes[j].offer;
                lanes[j].state = State::kReady;
            }
            moved = true;
        }
    }
}

CUDA_ON_CPU_HIDDEN inline void start(Fiber& f, unsigned t) {
    const dim3& d = machine.block_dim;
    f.linear = t;
    f.seen = machine.seen + t / kWarp * kWarp;
    f.thread = dim3(t % d.x, t / d.x % d.y, t / (d.x * d.y));
    f.state = State::kReady;
    f.syncs = f.warp_syncs = 0;
    f.word = nullptr;
    if (!f.stack) {  // its memory comes page by page, as it is touched
        void* const stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (stack == MAP_FAILED) abort();
        f.stack = static_cast<unsigned char*>(stack);
        CUDA_ON_CPU_TSAN(f.tsan = __tsan_create_fiber(0);)
    }
}

CUDA_ON_CPU_HIDDEN inline void run_block(unsigned num_threads) {
    for (unsigned t = 0; t < num_threads; ++t) start(machine.fibers[t], t);
    CUDA_ON_CPU_TSAN(machine.scheduler_tsan = __tsan_get_current_fiber(); __tsan_release(&machine.start_gate);)
    for (unsigned done = 0; done < num_threads;) {
        const unsigned num_warps = (num_threads + kWarp - 1) / kWarp;
        for (unsigned w = 0; w < num_warps; ++w) {
            const unsigned warp = machine.backward ? num_warps - 1 - w : w;
            run_warp(warp * kWarp, min(num_threads, (warp + 1) * kWarp));
        }
        unsigned waiting = 0;
        done = 0;
        for (unsigned t = 0; t < num_threads; ++t) {
            waiting += machine.fibers[t].state == State::kAtBlock;
            done += machine.fibers[t].state == State::kDone;
        }
        if (done == num_threads) break;
        if (machine.moved) {
            for (unsigned t = 0; t < num_threads; ++t)
                if (machine.fibers[t].state == State::kSpinning) machine.fibers[t].state = State::kReady;
            machine.moved = false;
            continue;
        }
        if (waiting != num_threads) stuck(num_threads);
        for (unsigned t = 0; t < num_threads; ++t) machine.fibers[t].state = State::kReady;
    }
    CUDA_ON_CPU_TSAN(__tsan_acquire(&machine.end_gate);)
}

template <class... Parameters, class... Args>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Args&&... args) {
    const unsigned num_threads = block.x * block.y * block.z;
    const uint64_t num_blocks = uint64_t(grid.x) * grid.y * grid.z;
    if (num_threads == 0 || num_threads > 1024 || num_blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
        grid.z > 65535 || shared_bytes > kSharedBytes)
        return cudaErrorInvalidConfiguration;
    machine.block_dim = block;
    machine.grid_dim = grid;
    machine.body = [&] { kernel(args...); };
    for (uint64_t i = 0; i < num_blocks; ++i) {
        const uint64_t b = machine.backward ? num_blocks - 1 - i : i;
        machine.block_index = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
        machine.dynamic_shared.assign((shared_bytes + 7) / 8 + 2, ~uint64_t(0));  // NaN, and -1: not written yet
        run_block(num_threads);
    }
    return cudaSuccess;
}

inline unsigned char* dynamic_shared() {
    const uintptr_t p = reinterpret_cast<uintptr_t>(machine.dynamic_shared.data());
    return reinterpret_cast<unsigned char*>((p + 15) / 16 * 16);
}

// Hands v to the warp and returns what `lane` handed over, once all lanes of the mask have come.
template <class T>
CUDA_ON_CPU_HIDDEN inline T exchange(unsigned mask, T v, unsigned lane) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    Fiber& f = self();
    f.mask = mask;
    f.offer = 0;
    memcpy(&f.offer, &v, sizeof v);
    to_scheduler(State::kAtWarp);
    T result;
    memcpy(&result, &f.seen[lane], sizeof result);
    return result;
}
CUDA_ON_CPU_HIDDEN inline unsigned lane_id() { return self().linear % kWarp; }

template <class T, class Combine>
CUDA_ON_CPU_HIDDEN inline T reduce(unsigned mask, T v, Combine combine) {
    exchange(mask, v, 0);
    bool first = true;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
        if (!(mask >> lane & 1)) continue;
        T other;
        memcpy(&other, &self().seen[lane], sizeof other);
        v = first ? other : combine(v, other);
        first = false;
    }
    return v;
}

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::self().thread)
#define blockIdx (cuda_on_cpu::machine.block_index)
#define blockDim (cuda_on_cpu::machine.block_dim)
#define gridDim (cuda_on_cpu::machine.grid_dim)
#define warpSize 32
#define SENSIBERT_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    ((void)(stream), cuda_on_cpu::launch(kernel, grid, block, shared_bytes, __VA_ARGS__))
#define SENSIBERT_DYNAMIC_SHARED(T, name) T* const name = reinterpret_cast<T*>(cuda_on_cpu::dynamic_shared())

namespace sensibert {
template <typename Kernel>  // few and odd, so that every block loops and none divides the work evenly
cudaError_t resident_blocks(Kernel*, int, size_t, int* num_blocks) {
    const char* forced = getenv("CUDA_ON_CPU_BLOCKS");
    *num_blocks = forced ? atoi(forced) : 3;
    return cudaSuccess;
}
}  // namespace sensibert

CUDA_ON_CPU_HIDDEN inline void __syncthreads() {
    [[maybe_unused]] char* gate = &cuda_on_cpu::machine.block_gate[cuda_on_cpu::self().syncs++ % 2];
    CUDA_ON_CPU_TSAN(__tsan_release(gate);)
    cuda_on_cpu::to_scheduler(cuda_on_cpu::State::kAtBlock);
    CUDA_ON_CPU_TSAN(__tsan_acquire(gate);)
}
CUDA_ON_CPU_HIDDEN inline void __syncwarp(unsigned mask = cuda_on_cpu::kFullMask) {
    cuda_on_cpu::Fiber& f = cuda_on_cpu::self();
    [[maybe_unused]] cuda_on_cpu::Fiber* const lanes = &f - f.linear % cuda_on_cpu::kWarp;
    const unsigned parity = f.warp_syncs++ % 2;
    CUDA_ON_CPU_TSAN(__tsan_release(&f.gate[parity]);)
    cuda_on_cpu::exchange(mask, parity, 0);
    CUDA_ON_CPU_TSAN(for (unsigned lane = 0; lane < 32; ++lane) if (mask >> lane & 1)
                         __tsan_acquire(&lanes[lane].gate[f.seen[lane]]);)
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32) {
    const unsigned lane = cuda_on_cpu::lane_id();
    return cuda_on_cpu::exchange(mask, v, lane / width * width + unsigned(source) % width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32) {
    const unsigned lane = cuda_on_cpu::lane_id(), other = lane ^ bits;
    return cuda_on_cpu::exchange(mask, v, other / width <= lane / width ? other : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32) {
    const unsigned lane = cuda_on_cpu::lane_id();
    return cuda_on_cpu::exchange(mask, v, lane % width + delta < unsigned(width) ? lane + delta : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32) {
    const unsigned lane = cuda_on_cpu::lane_id();
    return cuda_on_cpu::exchange(mask, v, lane % width >= delta ? lane - delta : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    return cuda_on_cpu::reduce(mask, predicate ? 1u << cuda_on_cpu::lane_id() : 0u, std::bit_or<unsigned>());
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
template <class T>
unsigned __match_any_sync(unsigned mask, T v) {
    unsigned same = 0;
    for (unsigned lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1) same |= unsigned(__shfl_sync(mask, v, lane) == v) << lane;
    return same;
}
template <class T>
T __reduce_add_sync(unsigned mask, T v) {
    return cuda_on_cpu::reduce(mask, v, std::plus<T>());
}

// Atomics: integers only, since a float sum in arrival order differs from run to run. Relaxed, as on the GPU.
#define CUDA_ON_CPU_ATOMIC(name, builtin)                                                                  \
    template <class T>                                                                                     \
    T name(T* p, std::type_identity_t<T> v) {                                                              \
        static_assert(std::is_integral_v<T>, "float atomics are not deterministic, and not allowed here"); \
        return builtin(p, v, __ATOMIC_RELAXED);                                                            \
    }
CUDA_ON_CPU_ATOMIC(atomicAdd, __atomic_fetch_add)
CUDA_ON_CPU_ATOMIC(atomicSub, __atomic_fetch_sub)
CUDA_ON_CPU_ATOMIC(atomicOr, __atomic_fetch_or)
CUDA_ON_CPU_ATOMIC(atomicAnd, __atomic_fetch_and)
CUDA_ON_CPU_ATOMIC(atomicExch, __atomic_exchange_n)
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> desired) {
    __atomic_compare_exchange_n(p, &expected, desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
}
template <class T, class Better>
T cuda_on_cpu_atomic_best(T* p, T v, Better better) {
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (better(v, old) && !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> v) {
    return cuda_on_cpu_atomic_best(p, v, std::greater<T>());
}
template <class T>
T atomicMin(T* p, std::type_identity_t<T> v) {
    return cuda_on_cpu_atomic_best(p, v, std::less<T>());
}

// Bits, arithmetic with a fixed rounding, cached loads and stores.
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
template <class To, class From>
To cuda_on_cpu_bits(From v) {
    static_assert(sizeof(To) == sizeof(From));
    To r;
    memcpy(&r, &v, sizeof r);
    return r;
}
inline unsigned __float_as_uint(float v) { return cuda_on_cpu_bits<unsigned>(v); }
inline int __float_as_int(float v) { return cuda_on_cpu_bits<int>(v); }
inline float __uint_as_float(unsigned v) { return cuda_on_cpu_bits<float>(v); }
inline float __int_as_float(int v) { return cuda_on_cpu_bits<float>(v); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float rsqrtf(float a) { return 1.f / sqrtf(a); }
template <class T>
T __ldg(const T* p) {
    return *p;
}
template <class T>
T __ldcs(const T* p) {
    return *p;
}
template <class T>
void __stcs(T* p, T v) {
    *p = v;
}

// Vectors keep the GPU's alignment, so that UBSan reports a misaligned access the GPU would trap on.
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// 16-bit floats: storage and the conversions, round to nearest even.
struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 v) { return __uint_as_float(unsigned(v.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
    const unsigned u = __float_as_uint(v);
    if (std::isnan(v)) return {0x7fff};
    return {uint16_t((u + 0x7fffu + (u >> 16 & 1)) >> 16)};
}
inline float __half2float(__half v) {
    const unsigned sign = unsigned(v.bits & 0x8000) << 16, exponent = v.bits >> 10 & 31, mantissa = v.bits & 1023;
    if (exponent == 0) return __uint_as_float(sign | __float_as_uint(float(mantissa) * 0x1p-24f));
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
    return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}
inline __half __float2half_rn(float v) {
    const uint16_t sign = __float_as_uint(v) >> 16 & 0x8000;
    const float size = std::fabs(v);
    if (std::isnan(v)) return {0x7fff};
    if (size >= 65520.f) return {uint16_t(sign | 0x7c00)};
    if (size < 0x1p-14f) return {uint16_t(sign | uint16_t(std::nearbyint(size * 0x1p24f)))};
    const unsigned u = __float_as_uint(size);
    return {uint16_t(sign | (((u + 0xfffu + (u >> 13 & 1)) >> 13) - (112 << 10)))};
}
