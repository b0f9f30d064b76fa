#pragma once
// mLSTM in bf16 on tensor cores: blocks of 8 warps, 4 rows of 2, over tiles of 128 rows. Sums, gates and n are fp32; the
// states between chunks are summed in fp32 and handed over in bf16, as are the coefficients of a chunk (once made, used
// by every tile of a result, in the backward by two results). All operands come through three stages of shared memory,
// 64 of the summed dimension each.
// Bound by memory: the states are written once and read once for each result, dq dv 2 / 128 bytes a position.
#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/mlstm_common.cuh"

namespace krait::kernels::cuda::mlstm_mma {

constexpr int kThreads = 256, kStages = 3, kSlice = 64;
constexpr int kRows = kMmaChunk;

/// Where 8 columns from `column` on (a multiple of 8) of a row of a tile D wide lie. Pieces of 16 bytes are swapped
/// within the row so that those of 8 rows are in different banks.
template <int D>
__device__ inline int place(int row, int column) {
  return row * D + (column / 8 ^ (row & 7)) * 8;
}

/// Rows [0, N) and columns [0, D) from `from` on into shared memory; zeros for rows from `rows` and columns from
/// `columns` (a multiple of 8) on.
template <int N, int D>
__device__ inline void load_part(bf16* to, const bf16* from, int64_t row, int rows, int columns) {
  constexpr int kPieces = D / 8;
  if constexpr (kThreads % kPieces == 0) {  // a thread stays in its column, and in its place within 8 rows
    constexpr int kStep = kThreads / kPieces;
    static_assert(kStep % 8 == 0 && N % kStep == 0);
    const int r = static_cast<int>(threadIdx.x) / kPieces, c = static_cast<int>(threadIdx.x) % kPieces * 8;
    const uint32_t target = shared_address(to + place<D>(r, c));
    const bf16* source = from + r * row + c;
    const int valid = c < columns ? rows - r : 0;
#pragma unroll
    for (int i = 0; i < N / kStep; ++i) {
      copy_async(target + i * kStep * D * 2, source, i * kStep < valid);
      source += kStep * row;
    }
  } else {
#pragma unroll 2
    for (int i = 0; i < N * kPieces / kThreads; ++i) {
      const int at = i * kThreads + static_cast<int>(threadIdx.x), r = at / kPieces, c = at % kPieces * 8;
      copy_async(to + place<D>(r, c), from + r * row + c, r < rows && c < columns);
    }
  }
}

/// Two neighbouring values times their weights.
__device__ inline uint32_t weighted(uint32_t two, float low, float high) {
  return pack(__uint_as_float(two << 16) * low, __uint_as_float(two & 0xffff0000u) * high);
}

/// acc (16 MT, 16 NT) += A B over kSlice. A: rows from `row` on of a tile (rows, DA), or with kTurnA columns of a tile
/// (summed, DA). B: columns from `column` on of a tile (summed, DB), or with kTurnB rows of a tile (columns, DB).
/// weights (kSlice): factors of the summed dimension, or null.
template <int MT, int NT, int DA, bool kTurnA, int DB, bool kTurnB>
__device__ inline void multiply(float (&acc)[MT][2 * NT][4], const bf16* a, int row, const bf16* b, int column,
                                const float* weights = nullptr) {
  const int lane = static_cast<int>(threadIdx.x) % 32, m = lane / 8, r = lane % 8;
#pragma unroll
  for (int x = 0; x < kSlice; x += 16) {
    uint32_t fa[MT][4];
    float w[4] = {};
    if (weights)
#pragma unroll
      for (int e = 0; e < 4; ++e) w[e] = weights[x + 2 * (lane % 4) + e % 2 + e / 2 * 8];
#pragma unroll
    for (int i = 0; i < MT; ++i) {
      if constexpr (kTurnA)
        load_matrices_transposed(fa[i], a + place<DA>(x + m / 2 * 8 + r, row + i * 16 + m % 2 * 8));
      else
        load_matrices(fa[i], a + place<DA>(row + i * 16 + m % 2 * 8 + r, x + m / 2 * 8));
      if (weights) {
        fa[i][0] = weighted(fa[i][0], w[0], w[1]);
        fa[i][1] = weighted(fa[i][1], w[0], w[1]);
        fa[i][2] = weighted(fa[i][2], w[2], w[3]);
        fa[i][3] = weighted(fa[i][3], w[2], w[3]);
      }
    }
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      uint32_t fb[4];
      if constexpr (kTurnB)
        load_matrices(fb, b + place<DB>(column + n * 16 + m / 2 * 8 + r, x + m % 2 * 8));
      else
        load_matrices_transposed(fb, b + place<DB>(x + m % 2 * 8 + r, column + n * 16 + m / 2 * 8));
#pragma unroll
      for (int i = 0; i < MT; ++i) {
        mma(acc[i][2 * n], fa[i], fb[0], fb[1]);
        mma(acc[i][2 * n + 1], fa[i], fb[2], fb[3]);
      }
    }
  }
}

/// Of two neighbouring tiles of 8 columns (a lane's two columns of a row in each): 4 columns of the first in even lanes,
/// of the second in odd ones, from columns_of(lane) on.
__device__ inline uint2 exchanged(const float (&first)[4], const float (&second)[4], int half) {
  const uint32_t low = pack(first[2 * half], first[2 * half + 1]), high = pack(second[2 * half], second[2 * half + 1]);
  const bool odd = threadIdx.x % 2 != 0;
  const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? low : high, 1);
  return odd ? uint2{other, high} : uint2{low, other};
}
__device__ inline int exchanged_column() {
  const int t = static_cast<int>(threadIdx.x) % 4;
  return t % 2 * 8 + t / 2 * 4;
}

}  // namespace krait::kernels::cuda::mlstm_mma
