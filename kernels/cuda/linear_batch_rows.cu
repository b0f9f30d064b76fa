#include "kernels/cuda/linear_rows.h"

#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/multiprocessors.h"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/packed.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kColumns = 16;  // of y that a block makes
constexpr int kPiece = 32;    // values of k that a warp takes at a time: 8 a lane, for two products

__device__ __forceinline__ uint4 read_or_zero(const bf16* p, bool inside) {
  return inside ? *reinterpret_cast<const uint4*>(p) : uint4{0, 0, 0, 0};
}

// A block: kColumns columns of y for 8 kTiles rows; its warps take pieces of k in turn and are added in order. Weights
// are the left operand. Which value of k sits where in a product does not matter as long as both operands agree: a lane
// reads 8 neighbours of its rows. Bound by reading x and w from the L2 cache.
template <int kTiles>
__global__ void __launch_bounds__(kThreads)
    batch_rows_kernel(bf16* y, const bf16* x, const bf16* w, const bf16* bias, int rows, int64_t n, int64_t k, int64_t ldx,
                      int64_t ldw, int64_t ldy, Epilogue epilogue) {
  constexpr int kRows = 8 * kTiles;
  __shared__ float part[kWarps][kColumns][kRows + 1];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int64_t first = int64_t{blockIdx.x} * kColumns, first_row = int64_t{blockIdx.y} * kRows;
  let_next_begin();
  if (threadIdx.x < kColumns && first + threadIdx.x < n && blockIdx.y == 0)
    bring_into_l2(w + (first + threadIdx.x) * ldw, k * static_cast<int64_t>(sizeof(bf16)));
  wait_for_previous();
  float sum[kTiles][4] = {};
  const bool low = first + g < n, high = first + g + 8 < n;
  const bf16* const w_low = w + (first + g) * ldw + 8 * t;
  const bf16* const x_row = x + (first_row + g) * ldx + 8 * t;
#pragma unroll 2
  for (int64_t at = warp * kPiece; at < k; at += kWarps * kPiece) {
    const uint4 a = read_or_zero(w_low + at, low), b = read_or_zero(w_low + 8 * ldw + at, high);
    uint4 v[kTiles];
#pragma unroll
    for (int q = 0; q < kTiles; ++q) v[q] = read_or_zero(x_row + 8 * q * ldx + at, first_row + 8 * q + g < rows);
#pragma unroll
    for (int q = 0; q < kTiles; ++q) {
      mma(sum[q], {a.x, b.x, a.y, b.y}, v[q].x, v[q].y);
      mma(sum[q], {a.z, b.z, a.w, b.w}, v[q].z, v[q].w);
    }
  }
#pragma unroll
  for (int q = 0; q < kTiles; ++q)
#pragma unroll
    for (int i = 0; i < 4; ++i) part[warp][g + i / 2 * 8][8 * q + 2 * t + i % 2] = sum[q][i];
  __syncthreads();
  for (int at = static_cast<int>(threadIdx.x); at < kColumns * kRows; at += kThreads) {
    const int c = at % kColumns, r = at / kColumns;
    if (first + c >= n || first_row + r >= rows) continue;
    float s = bias != nullptr ? static_cast<float>(bias[first + c]) : 0.0f;
#pragma unroll
    for (int p = 0; p < kWarps; ++p) s += part[p][c][r];
    y[(first_row + r) * ldy + first + c] = static_cast<bf16>(activate_as(epilogue, s));
  }
}

}  // namespace

bool linear_batch_rows(Tensor& y, const Gemm& g, const Tensor& bias, Epilogue epilogue) {
  constexpr int64_t kMaxRows = 64, kMaxColumns = 8192;
  if (g.m > kMaxRows || g.n > kMaxColumns || g.dtype != DType::bf16 || g.k % kPiece != 0 || g.lda % 8 != 0 || g.ldb % 8 != 0) return false;
  const auto start = [&]<int kTiles>() {
    launch_overlapped(batch_rows_kernel<kTiles>,
                      {.grid = ceil_div(g.n, kColumns), .grid_y = ceil_div(g.m, 8 * kTiles), .block = kThreads,
                       .stream = current_stream(g.device)},
                      y.data<bf16>(), static_cast<const bf16*>(g.a), static_cast<const bf16*>(g.b),
                      bias.defined() ? bias.data<bf16>() : nullptr, static_cast<int>(g.m), g.n, g.k, g.lda, g.ldb, g.ldc, epilogue);
  };
  const auto blocks = [&](int64_t rows) { return ceil_div(g.n, kColumns) * ceil_div(g.m, rows); };
  if (blocks(64) >= kMultiprocessors)
    start.template operator()<8>();
  else if (blocks(32) >= kMultiprocessors)
    start.template operator()<4>();
  else
    start.template operator()<2>();
  return true;
}

}  // namespace krait::kernels::cuda
