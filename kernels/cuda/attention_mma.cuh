#pragma once
// Tensor-core pieces for bf16: mma.sync m16n8k16, ldmatrix, cp.async (sm_80 on).
// Fragments of a warp (lane = 4 g + t): an accumulator of 16 rows x 8 columns holds rows g, g + 8 and columns
// 2t, 2t + 1: c0 (g, 2t), c1 (g, 2t+1), c2 (g+8, 2t), c3 (g+8, 2t+1).
#include <cstdint>

#include "core/dtype.h"

namespace krait::kernels::cuda {

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

/// 16 bytes from global to shared memory; zeros when not `valid` (nothing is read then).
__device__ inline void copy_async(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ inline void copy_async(void* to, const void* from, bool valid) { copy_async(shared_address(to), from, valid); }
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
/// Waits until at most N of the committed groups are still under way.
template <int N>
__device__ inline void copy_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

/// Four matrices (8, 8) of 16-byte rows; lane i gives the address of row i % 8 of matrix i / 8. Lane 4 g + t receives of
/// each the two values from column 2 t of row g; transposed: from row 2 t on of column g.
__device__ inline void load_matrices(uint32_t (&r)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}
__device__ inline void load_matrices(uint32_t (&r)[4], const void* p) { load_matrices(r, shared_address(p)); }
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(p))
               : "memory");
}

/// c (16, 8) += a (16, 16) b (16, 8).
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline uint32_t pack(float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}

/// Rows [first, first + N) of width D into shared memory with pitch D + 8 (16-byte rows start in different banks);
/// zeros for rows from `valid` on. 128 threads.
template <int N, int D>
__device__ inline void load_tile(bf16* to, const bf16* from, int64_t row, int64_t valid) {
  constexpr int kChunks = D / 8;
  for (int at = threadIdx.x; at < N * kChunks; at += 128) {
    const int r = at / kChunks, c = at % kChunks * 8;
    copy_async(to + r * (D + 8) + c, from + (r < valid ? r : 0) * row + c, r < valid);
  }
}

/// s (16 rows of a from row r0, N rows of b) = a b^T, both (., D) in shared memory.
template <int N, int D>
__device__ inline void multiply_rows(float (&s)[N / 8][4], const bf16* a, int r0, const bf16* b) {
  constexpr int P = D + 8;
  const int lane = threadIdx.x % 32, m = lane / 8, r = lane % 8;
#pragma unroll
  for (int n = 0; n < N / 8; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
#pragma unroll
  for (int x = 0; x < D / 16; ++x) {
    uint32_t fa[4];
    load_matrices(fa, a + (r0 + m % 2 * 8 + r) * P + x * 16 + m / 2 * 8);
#pragma unroll
    for (int n = 0; n < N / 16; ++n) {
      uint32_t fb[4];
      load_matrices(fb, b + (n * 16 + m / 2 * 8 + r) * P + x * 16 + m % 2 * 8);
      mma(s[2 * n], fa, fb[0], fb[1]);
      mma(s[2 * n + 1], fa, fb[2], fb[3]);
    }
  }
}

/// acc (16, D) += w (16, N) rows (N, D): w in accumulator fragments, rounded to bf16; rows in shared memory.
template <int N, int D>
__device__ inline void accumulate_tile(float (&acc)[D / 8][4], const float (&w)[N / 8][4], const bf16* rows) {
  constexpr int P = D + 8;
  const int lane = threadIdx.x % 32, m = lane / 8, r = lane % 8;
#pragma unroll
  for (int x = 0; x < N / 16; ++x) {
    const uint32_t fa[4] = {pack(w[2 * x][0], w[2 * x][1]), pack(w[2 * x][2], w[2 * x][3]),
                            pack(w[2 * x + 1][0], w[2 * x + 1][1]), pack(w[2 * x + 1][2], w[2 * x + 1][3])};
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      uint32_t fb[4];
      load_matrices_transposed(fb, rows + (x * 16 + m % 2 * 8 + r) * P + n * 16 + m / 2 * 8);
      mma(acc[2 * n], fa, fb[0], fb[1]);
      mma(acc[2 * n + 1], fa, fb[2], fb[3]);
    }
  }
}

/// Writes row g (half 0) or g + 8 (half 1) of a warp's accumulator, times a factor.
template <int D>
__device__ inline void store_row(bf16* to, const float (&acc)[D / 8][4], int half, float factor) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < D / 8; ++n)
    *reinterpret_cast<uint32_t*>(to + n * 8 + 2 * t) = pack(acc[n][2 * half] * factor, acc[n][2 * half + 1] * factor);
}

}  // namespace krait::kernels::cuda
