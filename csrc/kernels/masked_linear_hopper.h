// The features of Hopper that a matmul uses: barriers that count bytes, box copies (TMA), asynchronous matrix
// products (wgmma). One PTX instruction a function. In tests, tests/native/hopper_on_cpu.h emulates them.
#pragma once
#include "element.h"

#ifdef SENSIBERT_CUDA_ON_CPU
#include "hopper_on_cpu.h"
#else
#include <cuda.h>  // CUtensorMap only: nothing here links against libcuda

namespace sensibert::hopper {

using TensorMap = CUtensorMap;

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// ---- Barriers: a phase ends when `count` arrivals and all expected bytes have come. Parities alternate from 0.
__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_init_done() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void barrier_arrive_expect(uint64_t* barrier, uint32_t num_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(num_bytes)
                 : "memory");
}
// Returns once the phase of this parity has ended; the parity before the first phase counts as ended.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\nwait_%=:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra wait_%=;\n}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}
// Among `num_threads` threads of the block; id 0 is __syncthreads.
__device__ __forceinline__ void group_sync(uint32_t id, uint32_t num_threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

// ---- Box copies between a matrix in global memory and 128-byte swizzled rows in shared memory. What lies outside of
// the matrix arrives as 0, and is not written back. `box` is 1024-byte aligned.
__device__ __forceinline__ void load_box(const TensorMap* map, uint64_t* barrier, void* box, int32_t col, int32_t row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
        "[%2];" ::"r"(shared_address(box)),
        "l"(map), "r"(shared_address(barrier)), "r"(col), "r"(row)
        : "memory");
}
__device__ __forceinline__ void store_box(const TensorMap* map, const void* box, int32_t col, int32_t row) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
                 "r"(shared_address(box)), "r"(col), "r"(row)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until all but the last kPending stores of this thread have read their box.
template <int kPending>
__device__ __forceinline__ void store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// Plain writes to shared memory become visible to store_box.
__device__ __forceinline__ void fence_shared_for_store() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// ---- Registers move between warpgroups: all four warps of one execute this.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- Matrix products of a warpgroup: d [64, kCols] += a [64, 16] b [16, kCols], from swizzled rows of 64 elements:
// a in boxes [rows of d, k], or with kAByDepth [k, rows of d]; b in boxes [columns of d, k], or with kByDepth
// [k, columns of d].
// Thread t holds of d: row 16 (t / 32) + t % 32 / 4 + 8 h, column 8 c + 2 (t % 4) + i in d[4 c + 2 h + i].
__device__ __forceinline__ void matmul_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void matmul_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void matmul_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving reads or writes of d across.
template <int kSize>
__device__ __forceinline__ void pin_registers(float (&d)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Operand descriptor: address, 1024 bytes from one group of 8 rows to the next, 128-byte swizzle. PTX ISA, "wgmma matrix
// descriptor". box_bytes is the way to the next 64 columns of d in boxes [k, columns of d]; in the others it means nothing.
__device__ __forceinline__ uint64_t operand(const void* p, uint32_t box_bytes) {
    return uint64_t((shared_address(p) & 0x3ffff) >> 4) | uint64_t(box_bytes >> 4) << 16 | uint64_t(1024 >> 4) << 32 |
           uint64_t(1) << 62;
}

#define TEN(a) "%" #a "0,%" #a "1,%" #a "2,%" #a "3,%" #a "4,%" #a "5,%" #a "6,%" #a "7,%" #a "8,%" #a "9,"
#define OUT8(i)                                                                                                 \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define OUT32(i) OUT8(i), OUT8(i + 8), OUT8(i + 16), OUT8(i + 24)
#define LIST32 TEN() TEN(1) TEN(2) "%30,%31"
#define LIST64 TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) "%60,%61,%62,%63"
#define LIST96 TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) TEN(6) TEN(7) TEN(8) "%90,%91,%92,%93,%94,%95"
#define LIST128 \
    TEN()       \
    TEN(1)      \
    TEN(2) TEN(3) TEN(4) TEN(5) TEN(6) TEN(7) TEN(8) TEN(9) TEN(10) TEN(11) "%120,%121,%122,%123,%124,%125,%126,%127"
#define MATMUL(shape, type, list, a_place, b_place, a_across, across, ...)                                           \
    asm volatile("wgmma.mma_async.sync.aligned." shape "k16.f32." type "." type " {" list "}, " a_place ", " b_place \
                 ", 1, 1, 1, " a_across ", " across ";"                                                              \
                 : __VA_ARGS__                                                                                       \
                 : "l"(a), "l"(b))
#define MATMULS_OF(type, shape, list, a_place, b_place, ...)                                         \
    if constexpr (kAByDepth) {                                                                       \
        if constexpr (kByDepth) MATMUL(shape, type, list, a_place, b_place, "1", "1", __VA_ARGS__);  \
        if constexpr (!kByDepth) MATMUL(shape, type, list, a_place, b_place, "1", "0", __VA_ARGS__); \
    } else {                                                                                         \
        if constexpr (kByDepth) MATMUL(shape, type, list, a_place, b_place, "0", "1", __VA_ARGS__);  \
        if constexpr (!kByDepth) MATMUL(shape, type, list, a_place, b_place, "0", "0", __VA_ARGS__); \
    }
#define MATMULS(shape, list, a_place, b_place, ...)                    \
    if constexpr (kBFloat16) {                                         \
        MATMULS_OF("bf16", shape, list, a_place, b_place, __VA_ARGS__) \
    } else {                                                           \
        MATMULS_OF("f16", shape, list, a_place, b_place, __VA_ARGS__)  \
    }

template <typename T, int kCols, bool kByDepth, bool kAByDepth = false>
__device__ __forceinline__ void matmul(float* d, uint64_t a, uint64_t b) {
    static_assert(kCols == 64 || kCols == 128 || kCols == 192 || kCols == 256, "the widths the tile kernels use");
    constexpr bool kBFloat16 = std::is_same_v<T, __nv_bfloat16>;
    if constexpr (kCols == 64) {
        MATMULS("m64n64", LIST32, "%32", "%33", OUT32(0));
    } else if constexpr (kCols == 128) {
        MATMULS("m64n128", LIST64, "%64", "%65", OUT32(0), OUT32(32));
    } else if constexpr (kCols == 192) {
        MATMULS("m64n192", LIST96, "%96", "%97", OUT32(0), OUT32(32), OUT32(64));
    } else {
        MATMULS("m64n256", LIST128, "%128", "%129", OUT32(0), OUT32(32), OUT32(64), OUT32(96));
    }
}

// The same with a in registers, as load_matrices loads rows 16 (t / 32) and up of it, and b in boxes [columns of d, k]. The
// registers must stay as they are until the product is waited for.
#define MATMUL_REGISTERS(shape, type, list, places, ...)                                                               \
    asm volatile("wgmma.mma_async.sync.aligned." shape "k16.f32." type "." type " {" list "}, " places ", 1, 1, 1, 0;" \
                 : __VA_ARGS__                                                                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
template <typename T, int kCols>
__device__ __forceinline__ void matmul(float* d, const uint32_t (&a)[4], uint64_t b) {
    static_assert(kCols == 192 || kCols == 256, "the widths the bit kernel uses");
    constexpr bool kBFloat16 = std::is_same_v<T, __nv_bfloat16>;
    if constexpr (kCols == 192 && kBFloat16)
        MATMUL_REGISTERS("m64n192", "bf16", LIST96, "{%96, %97, %98, %99}, %100", OUT32(0), OUT32(32), OUT32(64));
    else if constexpr (kCols == 192)
        MATMUL_REGISTERS("m64n192", "f16", LIST96, "{%96, %97, %98, %99}, %100", OUT32(0), OUT32(32), OUT32(64));
    else if constexpr (kBFloat16)
        MATMUL_REGISTERS("m64n256", "bf16", LIST128, "{%128, %129, %130, %131}, %132", OUT32(0), OUT32(32), OUT32(64),
                         OUT32(96));
    else
        MATMUL_REGISTERS("m64n256", "f16", LIST128, "{%128, %129, %130, %131}, %132", OUT32(0), OUT32(32), OUT32(64),
                         OUT32(96));
}
#undef MATMUL_REGISTERS
#undef MATMULS
#undef MATMULS_OF
#undef MATMUL
#undef LIST128
#undef LIST96
#undef LIST64
#undef LIST32
#undef OUT32
#undef OUT8
#undef TEN

// ---- Matrices of 8 x 8 16-bit elements between shared memory and a warp, four at a time. Lane l points to row l % 8 of
// matrix l / 8, 16 bytes, and holds in r[i] two elements of matrix i, or with kTranspose of its transpose: of row l / 4
// columns 2 (l % 4) and one more.
template <bool kTranspose>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
    if constexpr (kTranspose)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(shared_address(row))
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(shared_address(row))
                     : "memory");
}
__device__ __forceinline__ void store_matrices_transposed(void* row, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}
// Byte i of the result is all ones or all zeros: the top bit of the byte of {a, b} that digit i of kSelector, less 8, names.
template <uint32_t kSelector>
__device__ __forceinline__ uint32_t spread_signs(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "n"(kSelector));
    return r;
}

// ---- Host side.
inline cudaError_t encode_map(TensorMap* map, CUtensorMapDataType type, const void* p, int64_t num_rows,
                              int64_t num_cols, int64_t stride_bytes, uint32_t box_rows, uint32_t box_cols,
                              CUtensorMapSwizzle swizzle) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    if (cudaError_t e =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result))
        return e;
    if (result != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
    const cuuint64_t sizes[2] = {cuuint64_t(num_cols), cuuint64_t(num_rows)}, strides[1] = {cuuint64_t(stride_bytes)};
    const cuuint32_t box[2] = {box_cols, box_rows}, steps[2] = {1, 1};
    const CUresult made = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found)(
        map, type, 2, const_cast<void*>(p), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return made == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// A row-major matrix [num_rows, num_cols] of 16-bit elements, `stride` elements from row to row, read or written in
// boxes of box_rows x 64. The pointer and the stride in bytes are multiples of 16.
inline cudaError_t make_tensor_map(TensorMap* map, DType dtype, const void* p, int64_t num_rows, int64_t num_cols,
                                   int64_t stride, uint32_t box_rows) {
    const auto type = dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    return encode_map(map, type, p, num_rows, num_cols, stride * 2, box_rows, 64, CU_TENSOR_MAP_SWIZZLE_128B);
}

// A row-major matrix of bytes [num_rows, num_cols], read by load_box in boxes of box_rows x 16, rows one after the other.
// The pointer and the stride are multiples of 16.
inline cudaError_t make_byte_map(TensorMap* map, const void* p, int64_t num_rows, int64_t num_cols, int64_t stride,
                                 uint32_t box_rows) {
    return encode_map(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, p, num_rows, num_cols, stride, box_rows, 16,
                      CU_TENSOR_MAP_SWIZZLE_NONE);
}

template <typename Kernel>
cudaError_t allow_shared_bytes(Kernel* kernel, size_t num_bytes) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(num_bytes));
}

}  // namespace sensibert::hopper
#endif

// ---- Shared by the GPU and its emulation.
namespace sensibert::hopper {

constexpr int kAtom = 1024;  // bytes after which the 128-byte swizzle repeats: alignment of every swizzled box

// The next stage of a ring, and the parity of its current round.
template <int kStages>
struct Place {
    int stage = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void advance() {
        stage = stage + 1 == kStages ? 0 : stage + 1;
        parity ^= stage == 0;
    }
};

// Two 16-bit elements in a word, the first in its low half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float a, float b) {
    const T pair[2] = {from_float<T>(a), from_float<T>(b)};
    uint32_t bits;
    memcpy(&bits, pair, 4);
    return bits;
}

// Whether a tensor map can describe a matrix of this stride, of elements that 16 bytes hold so many of.
inline bool fits_a_map(const void* p, int64_t num_rows, int64_t num_cols, int64_t stride, int64_t per_16_bytes = 8) {
    constexpr int64_t kLimit = int64_t(1) << 31;  // coordinates are int32
    return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride % per_16_bytes == 0 && stride >= num_cols &&
           num_rows < kLimit && num_cols < kLimit;
}

}  // namespace sensibert::hopper
