#include "kernels/cuda/linear_rows.h"

#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/few_queue.h"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/packed.cuh"
#include "kernels/cuda/rows_queue.h"

namespace krait::kernels::cuda {

namespace {

constexpr int kWarps = 4, kColumns = 2;  // columns of y a warp makes
constexpr int kAhead = 4;                // 16-byte pieces of a column's weights in flight at a time

// One warp: kColumns columns of y for all rows. Lanes take 16-byte pieces of k in turn.
template <class T, int kRows>
__global__ void __launch_bounds__(32 * kWarps)
    few_rows_kernel(T* y, const T* x, const T* w, const T* bias, int rows, int64_t n, int64_t k, int64_t ldx,
                    int64_t ldw, int64_t ldy, Epilogue epilogue) {
  constexpr int V = 16 / sizeof(T);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t first = (int64_t{blockIdx.x} * kWarps + threadIdx.x / 32) * kColumns;
  const int64_t pieces = k / V;
  let_next_begin();
  if (lane < kColumns && first + lane < n) bring_into_l2(w + (first + lane) * ldw, k * static_cast<int64_t>(sizeof(T)));
  wait_for_previous();
  if (first >= n) return;

  float sum[kRows][kColumns] = {};
  const auto add = [&](const Packed<T, V>* weights, int64_t piece) {
    float b[kColumns][V];
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      if (first + c < n) weights[c].unpack(b[c]);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) break;
      float a[V];
      load_values(a, x + r * ldx + piece * V);
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        if (first + c < n)
#pragma unroll
          for (int v = 0; v < V; ++v) sum[r][c] = fmaf(a[v], b[c][v], sum[r][c]);
    }
  };
  for (int64_t start = lane; start < pieces; start += 32 * kAhead) {
    Packed<T, V> ahead[kAhead][kColumns];
#pragma unroll
    for (int a = 0; a < kAhead; ++a)
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        if (first + c < n && start + a * 32 < pieces) ahead[a][c].load(w + (first + c) * ldw + (start + a * 32) * V);
#pragma unroll
    for (int a = 0; a < kAhead; ++a)
      if (start + a * 32 < pieces) add(ahead[a], start + a * 32);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      float s = sum[r][c];
      for (int offset = 16; offset > 0; offset /= 2) s += __shfl_xor_sync(0xffffffffu, s, offset);
      if (lane == 0 && r < rows && first + c < n)
        y[r * ldy + first + c] =
            static_cast<T>(activate_as(epilogue, s + (bias != nullptr ? static_cast<float>(bias[first + c]) : 0.0f)));
    }
}

template <class T>
void run(Tensor& y, const Gemm& g, const Tensor& bias, Epilogue epilogue) {
  const auto start = [&]<int kRows>() {
    launch_overlapped(few_rows_kernel<T, kRows>,
                      {.grid = ceil_div(g.n, kWarps * kColumns), .block = 32 * kWarps, .stream = current_stream(g.device)},
                      static_cast<T*>(y.raw_data()), static_cast<const T*>(g.a), static_cast<const T*>(g.b),
                      bias.defined() ? bias.data<T>() : nullptr, static_cast<int>(g.m), g.n, g.k, g.lda, g.ldb, g.ldc,
                      epilogue);
  };
  if (g.m == 1) return start.template operator()<1>();
  if (g.m <= 4) return start.template operator()<4>();
  start.template operator()<8>();
}

}  // namespace

bool linear_few_rows(Tensor& y, const Gemm& g, const Tensor& bias, Epilogue epilogue) {
  if (g.batch != 1 || g.trans_a || !g.trans_b || g.alpha != 1.0 || g.beta != 0.0 || g.c_dtype != g.dtype)
    return false;
  if (g.dtype != DType::bf16 && g.dtype != DType::f32) return false;
  const int64_t width = 16 / size_of(g.dtype);
  if (g.k % width != 0 || g.lda % width != 0 || g.ldb % width != 0 || !aligned16(static_cast<const char*>(g.a), static_cast<const char*>(g.b)))
    return false;
  if (gather_rows_linear(y, g, bias, epilogue)) return true;
  if (g.m > 8) return linear_batch_rows(y, g, bias, epilogue);
  if (gather_few_linear(y, g, bias, epilogue)) return true;
  if (g.dtype == DType::bf16)
    run<bf16>(y, g, bias, epilogue);
  else
    run<float>(y, g, bias, epilogue);
  return true;
}

}  // namespace krait::kernels::cuda
