// Plays the words of masked_linear_hopper.h on the CPU machine: what the PTX ISA says of mbarrier, cp.async.bulk.tensor
// and wgmma, at the times that hurt most. A box copy writes shared memory at once, so a stage that is still being read is
// spoilt; a matrix product reads its operands only when it is waited for, so a stage that is given back too early, too;
// a box store reads its box only when it is waited for, and never if it is not. Descriptors, swizzle and fragment
// layout are computed, not assumed. Not modelled: that a group of warps must act as one, registers given and taken.
#pragma once
#include "element.h"

namespace sensibert::hopper {

using cuda_on_cpu::machine;

#define PLAY(condition)                                                                    \
    if (!(condition)) {                                                                    \
        fprintf(stderr, "hopper_on_cpu: %s does not hold, in %s\n", #condition, __func__); \
        abort();                                                                           \
    }

inline uint32_t shared_address(const void* p) {
    return uint32_t(static_cast<const unsigned char*>(p) - cuda_on_cpu::dynamic_shared());
}
inline unsigned char* shared_at(uint32_t address) { return cuda_on_cpu::dynamic_shared() + address; }
inline uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

// Until *word has left `value`. Not the business of ThreadSanitizer: barriers tell it what they order.
CUDA_ON_CPU_HIDDEN inline void spin_while(const uint32_t* word, uint32_t value, uint32_t bits) {
    if ((*word & bits) != value) return;
    cuda_on_cpu::Fiber& f = cuda_on_cpu::self();
    f.word = word, f.bits = bits, f.value = value;
    cuda_on_cpu::to_scheduler(cuda_on_cpu::State::kSpinning);
    f.word = nullptr;
}

// ---- Barriers
struct Barrier {
    uint32_t count, pending, phase;
    int64_t num_bytes;  // expected and not come
    char gate;          // for ThreadSanitizer
};
inline Barrier barriers[cuda_on_cpu::kSharedBytes / 8];  // by address
CUDA_ON_CPU_HIDDEN inline Barrier& barrier_at(const uint64_t* barrier) {
    PLAY(shared_address(barrier) % 8 == 0);
    return barriers[shared_address(barrier) / 8];
}
CUDA_ON_CPU_HIDDEN inline void barrier_init(uint64_t* barrier, uint32_t count) {
    barrier_at(barrier) = {count, count, 0, 0, 0};
}
inline void barrier_init_done() {}
CUDA_ON_CPU_HIDDEN inline void barrier_update(uint64_t* barrier, uint32_t arrivals, int64_t num_bytes) {
    Barrier& b = barrier_at(barrier);
    CUDA_ON_CPU_TSAN(__tsan_release(&b.gate);)
    PLAY(b.pending >= arrivals);
    b.pending -= arrivals, b.num_bytes += num_bytes;
    if (b.pending == 0 && b.num_bytes == 0) ++b.phase, b.pending = b.count;
    machine.moved = true;
}
// Who has said that it is done is last to go on, so that whoever waits for it finds it out if it is not.
CUDA_ON_CPU_HIDDEN inline void barrier_arrive(uint64_t* barrier) {
    barrier_update(barrier, 1, 0);
    cuda_on_cpu::to_scheduler(cuda_on_cpu::State::kSpinning);
}
inline void barrier_arrive_expect(uint64_t* barrier, uint32_t num_bytes) { barrier_update(barrier, 1, num_bytes); }
CUDA_ON_CPU_HIDDEN inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
    Barrier& b = barrier_at(barrier);
    spin_while(&b.phase, parity, 1);
    CUDA_ON_CPU_TSAN(__tsan_acquire(&b.gate);)
}

struct Group {
    uint32_t arrived = 0, rounds = 0;
    char gate[2];
};
inline Group groups[16];
CUDA_ON_CPU_HIDDEN inline void group_sync(uint32_t id, uint32_t num_threads) {
    PLAY(id < 16);
    Group& g = groups[id];
    const uint32_t round = g.rounds;
    CUDA_ON_CPU_TSAN(__tsan_release(&g.gate[round % 2]);)
    if (++g.arrived == num_threads) g.arrived = 0, ++g.rounds;
    machine.moved = true;
    spin_while(&g.rounds, round, ~0u);
    CUDA_ON_CPU_TSAN(__tsan_acquire(&g.gate[round % 2]);)
}

// ---- Box copies
struct TensorMap {
    unsigned char* base = nullptr;
    int64_t num_rows = 0, num_cols = 0, stride = 0;
    int32_t box_rows = 0;
    bool bytes = false;  // boxes of 16 bytes a row, not swizzled
};
inline cudaError_t make_tensor_map(TensorMap* map, DType, const void* p, int64_t num_rows, int64_t num_cols,
                                   int64_t stride, uint32_t box_rows) {
    PLAY(uintptr_t(p) % 16 == 0 && stride % 8 == 0 && box_rows <= 256);
    *map = {static_cast<unsigned char*>(const_cast<void*>(p)), num_rows, num_cols, stride, int32_t(box_rows)};
    return cudaSuccess;
}
inline cudaError_t make_byte_map(TensorMap* map, const void* p, int64_t num_rows, int64_t num_cols, int64_t stride,
                                 uint32_t box_rows) {
    PLAY(uintptr_t(p) % 16 == 0 && stride % 16 == 0 && stride >= num_cols && box_rows <= 256);
    *map = {static_cast<unsigned char*>(const_cast<void*>(p)), num_rows, num_cols, stride, int32_t(box_rows), true};
    return cudaSuccess;
}
inline void load_bytes(const TensorMap& map, uint32_t box, int32_t col, int32_t row) {
    PLAY(box % 128 == 0);
    for (int i = 0; i < map.box_rows * 16; ++i) {
        const int64_t from_row = row + i / 16, from_col = col + i % 16;
        const bool inside = from_row < map.num_rows && from_col < map.num_cols;
        *shared_at(box + i) = inside ? map.base[from_row * map.stride + from_col] : 0;
    }
}
// f(bytes in shared memory, bytes in global memory or null, how many): 8 elements at once, or one where not all 8 are
// inside. The swizzle keeps 8 together.
template <class F>
void each_in_box(const TensorMap& map, uint32_t box, int32_t col, int32_t row, F f) {
    PLAY(box % 1024 == 0);
    for (int r = 0; r < map.box_rows; ++r)
        for (int c = 0; c < 64; c += 8) {
            const int64_t from_row = int64_t(row) + r, first = int64_t(col) + c;
            const bool row_inside = from_row >= 0 && from_row < map.num_rows;
            unsigned char* const shared = shared_at(swizzled(box + r * 128 + c * 2));
            unsigned char* const global = map.base + 2 * (from_row * map.stride + first);
            if (row_inside && first >= 0 && first + 8 <= map.num_cols) {
                f(shared, global, std::integral_constant<int, 16>());
                continue;
            }
            for (int i = 0; i < 8; ++i) {
                const bool inside = row_inside && first + i >= 0 && first + i < map.num_cols;
                f(shared + 2 * i, inside ? global + 2 * i : nullptr, std::integral_constant<int, 2>());
            }
        }
}
inline void load_box(const TensorMap* map, uint64_t* barrier, void* box, int32_t col, int32_t row) {
    if (map->bytes)
        load_bytes(*map, shared_address(box), col, row);
    else
        each_in_box(*map, shared_address(box), col, row, [](unsigned char* to, const unsigned char* from, auto bytes) {
            from ? memcpy(to, from, bytes) : memset(to, 0, bytes);
        });
    barrier_update(barrier, 0, -int64_t(map->box_rows) * (map->bytes ? 16 : 128));
}
inline void prefetch_map(const TensorMap*) {}

// ---- What a thread has begun and not waited for, oldest first
struct Begun {
    std::vector<std::function<void()>> stores;
    std::vector<std::vector<std::function<void()>>> products;  // by group
    bool open = false;                                         // the last group takes more
};
inline Begun begun[1024];
CUDA_ON_CPU_HIDDEN inline Begun& mine() { return begun[cuda_on_cpu::self().linear]; }

inline void store_box(const TensorMap* map, const void* box, int32_t col, int32_t row) {
    PLAY(row < map->num_rows && col < map->num_cols);
    mine().stores.push_back([map = *map, from = shared_address(box), col, row] {
        each_in_box(map, from, col, row, [](const unsigned char* value, unsigned char* to, auto bytes) {
            if (to) memcpy(to, value, bytes);
        });
    });
}
template <int kPending>
void store_wait_read() {
    auto& stores = mine().stores;
    while (stores.size() > kPending) stores.front()(), stores.erase(stores.begin());
}
inline void fence_shared_for_store() {}

template <int kRegisters>
void take_registers() {}
template <int kRegisters>
void give_registers() {}

// ---- Matrix products
inline void matmul_begin() { mine().products.emplace_back(), mine().open = true; }
inline void matmul_commit() {
    PLAY(mine().open);
    mine().open = false;
}
template <int kPending>
void matmul_wait() {
    PLAY(!mine().open);
    auto& products = mine().products;
    while (products.size() > kPending) {
        for (auto& product : products.front()) product();
        products.erase(products.begin());
    }
    __syncwarp();  // .sync.aligned: a warp passes as one
}
template <int kSize>
void pin_registers(float (&)[kSize]) {
    PLAY(mine().products.empty());
}
inline uint64_t operand(const void* p, uint32_t box_bytes) {
    return uint64_t((shared_address(p) & 0x3ffff) >> 4) | uint64_t(box_bytes >> 4) << 16 | uint64_t(1024 >> 4) << 32 |
           uint64_t(1) << 62;
}
// Elements (i, 0 .. 15) of an operand, i a row or column of d. In boxes [i, k]: groups of 8 rows lie a stride apart, rows in a
// group 128 bytes. In boxes [k, i]: the same with k as the row, and boxes of 64 i lie the leading stride apart.
template <typename T>
void elements(float (&x)[16], uint64_t descriptor, bool by_depth, int i) {
    const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4,
                   stride = (descriptor >> 32 & 0x3fff) << 4;
    T held[8];  // the swizzle keeps 8 together
    if (by_depth) {
        for (int k = 0; k < 16; ++k) {
            const uint32_t offset = i / 64 * leading + k / 8 * stride + k % 8 * 128 + i % 64 * 2;
            x[k] = to_float(*reinterpret_cast<const T*>(shared_at(swizzled(start + offset))));
        }
        return;
    }
    for (int k = 0; k < 16; k += 8) {
        memcpy(held, shared_at(swizzled(start + i / 8 * stride + i % 8 * 128 + k * 2)), sizeof held);
        for (int j = 0; j < 8; ++j) x[k + j] = to_float(held[j]);
    }
}
template <typename T, int kCols, bool kByDepth>
void add_products(float* d, const float (&x)[2][16], uint64_t b, int t) {
    float y[16];
    for (int c = 0; c < kCols / 8; ++c)
        for (int i = 0; i < 2; ++i) {
            elements<T>(y, b, kByDepth, c * 8 + t % 4 * 2 + i);
            for (int h = 0; h < 2; ++h) {
                float sum = d[4 * c + 2 * h + i];
                for (int k = 0; k < 16; ++k) sum += x[h][k] * y[k];
                d[4 * c + 2 * h + i] = sum;
            }
        }
}
template <typename T, int kCols, bool kByDepth, bool kAByDepth = false>
void matmul(float* d, uint64_t a, uint64_t b) {
    PLAY(mine().open && a >> 62 == 1 && b >> 62 == 1);
    mine().products.back().push_back([d, a, b, t = int(threadIdx.x % 128)] {
        float x[2][16];
        for (int h = 0; h < 2; ++h) elements<T>(x[h], a, kAByDepth, t / 32 * 16 + t % 32 / 4 + h * 8);
        add_products<T, kCols, kByDepth>(d, x, b, t);
    });
}

// A thread holds of a: row 16 (t / 32) + t % 32 / 4 + 8 h, k 2 (t % 4) + 8 g + i in half i of a[h + 2 g]. They are read when
// the product is waited for, and from where they lie, so registers overwritten too early spoil it.
template <typename T, int kCols>
void matmul(float* d, const uint32_t (&a)[4], uint64_t b) {
    PLAY(mine().open && b >> 62 == 1);
    mine().products.back().push_back([d, a = &a[0], b, t = int(threadIdx.x % 128)] {
        float x[2][16];
        for (int g = 0; g < 2; ++g) {
            cuda_on_cpu::exchange(cuda_on_cpu::kFullMask, uint64_t(a[2 * g]) | uint64_t(a[2 * g + 1]) << 32, 0);
            for (int q = 0; q < 4; ++q) {
                T held[2][2];  // [h][i]
                memcpy(held, &cuda_on_cpu::self().seen[t % 32 / 4 * 4 + q], sizeof held);
                for (int h = 0; h < 2; ++h)
                    for (int i = 0; i < 2; ++i) x[h][8 * g + 2 * q + i] = to_float(held[h][i]);
            }
        }
        add_products<T, kCols, false>(d, x, b, t);
    });
}

// ---- Matrices of 8 x 8. The address of row r of matrix i is that of lane 8 i + r.
inline uint16_t* matrix_row(int i, int r) {
    return reinterpret_cast<uint16_t*>(shared_at(uint32_t(cuda_on_cpu::self().seen[8 * i + r])));
}
inline void exchange_rows(const void* row) {
    PLAY(shared_address(row) % 16 == 0);
    cuda_on_cpu::exchange(cuda_on_cpu::kFullMask, shared_address(row), 0);
}
template <bool kTranspose>
void load_matrices(uint32_t (&r)[4], const void* row) {
    exchange_rows(row);
    const int line = cuda_on_cpu::lane_id() / 4, pair = cuda_on_cpu::lane_id() % 4 * 2;
    for (int i = 0; i < 4; ++i) {
        uint32_t half[2];
        for (int j = 0; j < 2; ++j)
            half[j] = kTranspose ? matrix_row(i, pair + j)[line] : matrix_row(i, line)[pair + j];
        r[i] = half[0] | half[1] << 16;
    }
}
inline void store_matrices_transposed(void* row, const uint32_t (&r)[4]) {
    exchange_rows(row);
    const int line = cuda_on_cpu::lane_id() / 4, pair = cuda_on_cpu::lane_id() % 4 * 2;
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 2; ++j) matrix_row(i, pair + j)[line] = uint16_t(r[i] >> 16 * j);
}
template <uint32_t kSelector>
uint32_t spread_signs(uint32_t a, uint32_t b) {
    static_assert((kSelector & 0x8888) == 0x8888, "every digit spreads a sign");
    uint32_t r = 0;
    for (int i = 0; i < 4; ++i)
        r |= ((uint64_t(b) << 32 | a) >> ((kSelector >> 4 * i & 7) * 8 + 7) & 1 ? 0xffu : 0u) << 8 * i;
    return r;
}

template <typename Kernel>
cudaError_t allow_shared_bytes(Kernel*, size_t) {
    return cudaSuccess;
}

#undef PLAY
}  // namespace sensibert::hopper
