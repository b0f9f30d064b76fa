#pragma once
// Pieces of attention's backward on Hopper: tiles of 64 rows (boxes of a tensor map, 128-byte swizzle) as operands of
// wgmma, and accumulators as operands.
#include <cmath>
#include <cstdint>

#include "core/tensor.h"
#include "kernels/cuda/exp2.cuh"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/tma.cuh"
#include "kernels/cuda/wgmma.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define KRAIT_WGMMA_BODY 1
#else
#define KRAIT_WGMMA_BODY 0
#endif

namespace krait::kernels::cuda {

namespace {

constexpr int kRows = 64;              // of a box: a warpgroup's queries or keys, and what a step takes
constexpr int kGroups = 2;             // warpgroups that compute
constexpr int kTile = kRows * kGroups;
constexpr int kThreads = (kGroups + 1) * 128;
constexpr int kBox = kRows * 128;      // bytes of 64 rows of 64 values
template <int kD>
constexpr int kPanel = kD / 64 * kBox;  // bytes of 64 rows of kD values
constexpr int kStatBytes = 2 * kRows * 4;
constexpr float kLog2e = 1.4426950408889634f;

template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// The order of tiles, head after head. In a causal head they differ in length: a long and a short one make a pair, so that
// pairs are alike, and a block takes pairs.
struct Order {
  int heads, tiles;
  __host__ __device__ int pairs() const { return (tiles + 1) / 2; }
  __host__ __device__ int items() const { return heads * pairs() * 2; }
  __device__ void find(int item, int& head, int& tile) const {
    const int pair = item / 2 % pairs();
    head = item / 2 / pairs();
    tile = item % 2 ? tiles - 1 - pair : pair;
  }
  // Whether the other tile of the pair comes after this one.
  __device__ bool follows(int item) const {
    const int pair = item / 2 % pairs();
    return item % 2 == 0 && pair != tiles - 1 - pair;
  }
};

// (b, l, heads, d) in memory.
struct Rows {
  const void* data;
  int64_t b, l, h, d, batch, row, head;  // sizes, then strides in elements
};
CUtensorMap map_of(const Rows& r) {
  const int64_t sizes[4] = {r.d, r.l, r.h, r.b}, strides[3] = {r.row, r.head, r.batch};
  const int box[4] = {64, kRows, 1, 1};
  return tensor_map(r.data, DType::bf16, sizes, strides, box);
}

Rows rows_of(const Tensor& t) {
  return {t.raw_data(), t.size(0), t.size(1), t.size(2), t.size(3), t.stride(0), t.stride(1), t.stride(2)};
}

bool serves(const Tensor& t) {
  return t.stride(0) % 8 == 0 && t.stride(1) % 8 == 0 && t.stride(2) % 8 == 0 &&
         reinterpret_cast<uintptr_t>(t.raw_data()) % 16 == 0;
}

__device__ __forceinline__ float dot_pair(uint32_t a, uint32_t b) {
  const float2 x = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&a));
  const float2 y = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&b));
  return x.x * y.x + x.y * y.y;
}

#if KRAIT_WGMMA_BODY

__device__ __forceinline__ float2 load_pair(uint32_t shared) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(shared) : "memory");
  return v;
}

// 64 rows of kD values from (batch, head, row): kD / 64 boxes.
template <int kD>
__device__ __forceinline__ void bring_rows(uint32_t to, const CUtensorMap& map, uint32_t barrier, int row, int head, int batch) {
#pragma unroll
  for (int x = 0; x < kD; x += 64) bring_box(to + x / 64 * kBox, map, barrier, x, row, head, batch);
}

// This warp's 16 of 64 rows as left operands in registers.
template <int kD>
__device__ __forceinline__ void load_rows(uint32_t (&a)[kD / 16][4], uint32_t tile) {
  const int lane = threadIdx.x % 32, m = lane / 8, r = lane % 8, row = threadIdx.x % 128 / 32 * 16 + m % 2 * 8 + r;
#pragma unroll
  for (int s = 0; s < kD / 16; ++s)
    load_matrices(a[s], tile + s / 4 * kBox + row * 128 + (((s % 4 * 2 + m / 2) ^ r) << 4));
}

// s (64 rows, 64 rows of b) = a b^T.
template <int kD>
__device__ __forceinline__ void multiply_rows(float (&s)[32], const uint32_t (&a)[kD / 16][4], uint32_t b) {
  const uint64_t rows = along_lines(b);
#pragma unroll
  for (int x = 0; x < kD / 16; ++x) wgmma(s, a[x], further(rows, x / 4 * kBox + x % 4 * 32), x > 0);
}
template <int kD>
__device__ __forceinline__ void multiply_rows(float (&s)[32], uint32_t a, uint32_t b) {
  const uint64_t left = along_lines(a), rows = along_lines(b);
#pragma unroll
  for (int x = 0; x < kD / 16; ++x) {
    const int bytes = x / 4 * kBox + x % 4 * 32;
    wgmma(s, further(left, bytes), further(rows, bytes), x > 0);
  }
}

// acc (64, kD) = w (64, 64) rows (64, kD), w in registers; added to what is there when `add`.
template <int kD>
__device__ __forceinline__ void accumulate(float (&acc)[kD / 2], const uint32_t (&w)[4][4], uint32_t rows, bool add = true) {
  const uint64_t b = across_lines(rows, kBox);
#pragma unroll
  for (int x = 0; x < 4; ++x) wgmma<1>(acc, w[x], further(b, x * 2048), add || x > 0);
}

// An accumulator as a left operand, in bf16.
__device__ __forceinline__ void to_operand(uint32_t (&a)[4][4], const float (&s)[32]) {
#pragma unroll
  for (int x = 0; x < 4; ++x)
#pragma unroll
    for (int i = 0; i < 4; ++i) a[x][i] = pack(s[8 * x + 2 * i], s[8 * x + 2 * i + 1]);
}
// acc times a factor to 64 rows of boxes in shared memory, as bf16 and swizzled.
template <int kD>
__device__ __forceinline__ void put_rows(uint32_t to, const float (&acc)[kD / 2], float factor) {
  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4, row = threadIdx.x % 128 / 32 * 16 + g;
#pragma unroll
  for (int j = 0; j < kD / 8; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(to + j / 8 * kBox + (row + 8 * half) * 128 + (((j % 8) ^ g) << 4) + 4 * c),
                   "r"(pack(acc[4 * j + 2 * half] * factor, acc[4 * j + 2 * half + 1] * factor))
                   : "memory");
}
template <int kD>
__device__ __forceinline__ void store_rows(const CUtensorMap& map, uint32_t from, int row, int head, int batch) {
#pragma unroll
  for (int x = 0; x < kD; x += 64) store_box(map, from + x / 64 * kBox, x, row, head, batch);
}

// The sum over the four lanes of a row.
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ __forceinline__ uint32_t aligned_shared() {
  extern __shared__ unsigned char dynamic[];
  return (shared_address(dynamic) + 1023) / 1024 * 1024;
}

// One arrival a warp.
__device__ __forceinline__ void release(uint32_t barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

// What the steps take, in a ring: two panels a stage. A barrier pair is "full" and, 8 bytes on, "empty".
template <int kD, int kStages>
struct Steps {
  uint32_t panels, full;
  Ring<kStages> ring;
  __device__ Steps(uint32_t panels, uint32_t full) : panels(panels), full(full) {}
  __device__ uint32_t at() const { return panels + ring.stage * 2 * kPanel<kD>; }

  // The thread that brings: the next step's 64 rows of a and of b, and `more` bytes that the caller brings by the barrier
  // that this returns; then ring.advance().
  __device__ __forceinline__ uint32_t bring(const CUtensorMap& a, const CUtensorMap& b, int row, int head, int batch,
                                            uint32_t more = 0) {
    const uint32_t barrier = full + 16 * ring.stage, to = at();
    barrier_wait(barrier + 8, ring.parity ^ 1);
    barrier_expect(barrier, 2 * kPanel<kD> + more);
    bring_rows<kD>(to, a, barrier, row, head, batch);
    bring_rows<kD>(to + kPanel<kD>, b, barrier, row, head, batch);
    return barrier;
  }

  // The warpgroups that compute.
  __device__ __forceinline__ void wait() const { barrier_wait(full + 16 * ring.stage, ring.parity); }
  __device__ __forceinline__ void done_with(int stage) const { release(full + 16 * stage + 8); }
  __device__ __forceinline__ void skip(int begin, int end) {
    for (int i = begin; i < end; ++i, ring.advance()) {
      wait();
      done_with(ring.stage);
    }
  }
  // s = a p^T and dp = b r^T in two batches, p and r the step's panels; a and b in registers or in shared memory.
  template <class A>
  __device__ __forceinline__ void scores(float (&s)[32], float (&dp)[32], const A& a, const A& b) const {
    const uint32_t panel = at();
    wait();
    wgmma_begin();
    multiply_rows<kD>(s, a, panel);
    wgmma_commit();
    multiply_rows<kD>(dp, b, panel + kPanel<kD>);
    wgmma_commit();
  }
};

__device__ __forceinline__ void init_barriers(uint32_t resident, uint32_t ring, int stages) {
  if (threadIdx.x == 0) {
    barrier_init(resident, 1);
    barrier_init(resident + 8, 4 * kGroups);
    for (int i = 0; i < stages; ++i) {
      barrier_init(ring + 16 * i, 1);
      barrier_init(ring + 16 * i + 8, 4 * kGroups);
    }
    barriers_visible();
  }
  __syncthreads();
}

// Tiles of a block come by a counter of the whole grid, so that a block that starts late or runs beside other work takes
// fewer. One thread takes them and brings what they need (`bring`, which expects it at barrier `resident`); the number
// lies behind the barrier pair. Number order.items() is the end.
template <class Bring>
__device__ __forceinline__ void hand_out(uint32_t* ticket, const Order& order, uint32_t resident, const Bring& bring) {
  uint32_t parity = 1;
  const int items = order.items();
  for (int item = 1;;) {
    item = order.follows(item) ? item + 1 : min(2 * static_cast<int>(atomicAdd(ticket, 1)), items);
    barrier_wait(resident + 8, parity);
    parity ^= 1;
    asm volatile("st.shared.s32 [%0], %1;" ::"r"(resident + 16), "r"(item) : "memory");
    if (item == items) break;
    bring(item);
  }
  barrier_arrive(resident);
}
// The other threads' side; the memory of the tile is theirs until they arrive at resident + 8.
__device__ __forceinline__ int next_item(uint32_t resident, uint32_t& parity) {
  barrier_wait(resident, parity);
  parity ^= 1;
  int item;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(item) : "r"(resident + 16) : "memory");
  return item;
}

#endif

}  // namespace

}  // namespace krait::kernels::cuda
