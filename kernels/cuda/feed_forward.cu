#include "kernels/feed_forward.h"

#include "core/cuda/launch.cuh"
#include "kernels/cuda/aligned.h"
#include "kernels/cuda/few_queue.h"
#include "kernels/cuda/hopper.h"
#include "kernels/cuda/linear_fused.cuh"
#include "kernels/cuda/linear_fused.h"
#include "kernels/cuda/rows_queue.h"
#include "kernels/cuda/tensor_map.h"

namespace krait::kernels::cuda {

namespace {

// (rows, columns), rows `row` apart, to (columns, rows), both multiples of 64: a block of 256 threads for 64 x 64.
__global__ void __launch_bounds__(256) transpose_kernel(uint16_t* to, const uint16_t* from, int64_t rows, int64_t row) {
  __shared__ uint16_t tile[64][66];
  const int64_t row0 = int64_t{blockIdx.y} * 64, column0 = int64_t{blockIdx.x} * 64;
  const int pair = static_cast<int>(threadIdx.x) % 32, line = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int r = line; r < 64; r += 8)
    *reinterpret_cast<uint32_t*>(&tile[r][2 * pair]) =
        *reinterpret_cast<const uint32_t*>(from + (row0 + r) * row + column0 + 2 * pair);
  __syncthreads();
#pragma unroll
  for (int c = line; c < 64; c += 8)
    *reinterpret_cast<uint32_t*>(to + (column0 + c) * rows + row0 + 2 * pair) =
        tile[2 * pair][c] | static_cast<uint32_t>(tile[2 * pair + 1][c]) << 16;
}

int multiprocessors(Device device) {
  return hopper_multiprocessors(device, reinterpret_cast<const void*>(fused_map_kernel<MapForm::plain>));
}

int64_t clusters_of(Device device) {
  return std::max(1, (multiprocessors(device) - spare_multiprocessors()) / 2);
}

// fill: what part of the clusters' time the tiles must at least take.
bool serves(Device device, int64_t rows, int64_t n, int64_t columns, int64_t k, double fill) {
  if (n % columns != 0 || k % kMapTerms != 0 || k / kMapTerms < kMapLeastSteps) return false;
  if (rows >= int64_t{1} << 31 || n >= int64_t{1} << 30 || multiprocessors(device) == 0) return false;
  const int64_t tiles = ceil_div(rows, 2 * kMapRows) * (n / columns), clusters = clusters_of(device);
  const int64_t waves = ceil_div(tiles, clusters);
  return waves > 1 && static_cast<double>(tiles) >= fill * static_cast<double>(waves * clusters);
}
constexpr double kFusedFill = 0.7, kPlainFill = 0.9;  // the library's products are as good when these leave much idle

// x (rows, k) and w (w_rows, k) with their rows so far apart, what p names contiguous.
template <MapForm F>
bool run(Device device, const bf16* x, int64_t x_row, const bf16* w, int64_t w_rows, int64_t w_row, int64_t k, MapArguments p) {
  const auto map = [](const bf16* data, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
                      std::initializer_list<int> box, bool swizzled = true) {
    return tensor_map(data, DType::bf16, {sizes.begin(), sizes.size()}, {strides.begin(), strides.size()},
                      {box.begin(), box.size()}, swizzled);
  };
  const CUtensorMap map_x = map(x, {k, p.rows}, {x_row}, {kMapTerms, kMapRows});
  const CUtensorMap map_w = map(w, {k, 2, 4, 4, w_rows / 32}, {w_row, 8 * w_row, 2 * w_row, 32 * w_row},
                                {kMapTerms, 2, 4, 4, 4});
  const int64_t width = F == MapForm::glu_gradient ? 2 * p.n : p.n;
  const CUtensorMap map_in = p.in != nullptr ? map(p.in, {width, p.rows}, {width}, {32, kMapRows}, false) : CUtensorMap{};
  p.steps = static_cast<int>(k / kMapTerms);
  const int64_t across = p.n / (F == MapForm::glu ? kMapColumns / 2 : kMapColumns);
  const int64_t tiles = ceil_div(p.rows, 2 * kMapRows) * across;
  const int64_t clusters = std::min(tiles, clusters_of(device));
  launch(fused_map_kernel<F>,
         {.grid = 2 * clusters, .block = kMapThreads, .shared = MapPlan<F>::kBytes, .stream = current_stream(device)}, map_x, map_w,
         map_in, p);
  return true;
}

bool plain_product(const Gemm& g) {
  return g.dtype == DType::bf16 && g.c_dtype == DType::bf16 && g.batch == 1 && !g.trans_a &&
         g.alpha == 1.0 && g.beta == 0.0 && g.lda % 8 == 0 && g.ldb % 8 == 0 && g.ldc == g.n &&
         reinterpret_cast<uintptr_t>(g.a) % 16 == 0 && reinterpret_cast<uintptr_t>(g.b) % 16 == 0;
}

// w (rows, columns) with its rows `row` apart, transposed. Both are multiples of 64.
Tensor transposed(const bf16* w, int64_t rows, int64_t columns, int64_t row, Device device) {
  const Tensor t = empty({columns, rows}, DType::bf16, device);
  launch(transpose_kernel, {.grid = columns / 64, .grid_y = rows / 64, .block = 256, .stream = current_stream(device)},
         reinterpret_cast<uint16_t*>(t.data<bf16>()), reinterpret_cast<const uint16_t*>(w), rows, row);
  return t;
}

bool gradient_served(const Tensor& dy, const Tensor& w, const Tensor& pre, const Tensor& dpre) {
  return dy.dtype() == DType::bf16 && w.is_contiguous() && aligned(dy, w, pre, dpre) &&
         serves(dy.device(), dy.size(0), w.size(1), kMapColumns, w.size(0), kFusedFill);
}

}  // namespace

bool fused_product(const Gemm& g, const Tensor& bias) {
  if (!plain_product(g) || !serves(g.device, g.m, g.n, kMapColumns, g.k, kPlainFill)) return false;
  if (reinterpret_cast<uintptr_t>(g.c) % 16 != 0 || !aligned(bias) || (!g.trans_b && g.n % 64 != 0)) return false;
  MapArguments p;
  p.out = static_cast<bf16*>(g.c);
  p.bias = bias.defined() ? bias.data<bf16>() : nullptr;
  p.rows = g.m;
  p.n = static_cast<int>(g.n);
  const bf16 *x = static_cast<const bf16*>(g.a), *w = static_cast<const bf16*>(g.b);
  if (g.trans_b) return run<MapForm::plain>(g.device, x, g.lda, w, g.n, g.ldb, g.k, p);
  const Tensor weight = transposed(w, g.k, g.n, g.ldb, g.device);
  return run<MapForm::plain>(g.device, x, g.lda, weight.data<bf16>(), g.n, g.k, g.k, p);
}

bool fused_gelu(Tensor& y, Tensor& pre, const Gemm& g, const Tensor& bias) {
  if (!plain_product(g) || !g.trans_b || !serves(g.device, g.m, g.n, kMapColumns, g.k, kFusedFill) || !aligned(y, pre, bias)) return false;
  MapArguments p;
  p.out = y.data<bf16>();
  p.out2 = pre.data<bf16>();
  p.bias = bias.defined() ? bias.data<bf16>() : nullptr;
  p.rows = g.m;
  p.n = static_cast<int>(g.n);
  return run<MapForm::gelu>(g.device, static_cast<const bf16*>(g.a), g.lda, static_cast<const bf16*>(g.b), g.n, g.ldb, g.k, p);
}

bool fused_rope(Tensor& y, const Gemm& g, const Tensor& bias, int64_t length, int64_t rotated, const Tensor& cos,
                const Tensor& sin, int64_t offset) {
  if (!plain_product(g) || !g.trans_b || !serves(g.device, g.m, g.n, kMapColumns, g.k, kFusedFill) || cos.size(1) != 32) return false;
  if (!aligned(y, bias, cos, sin) || cos.dtype() != DType::f32 || length >= int64_t{1} << 31) return false;
  MapArguments p;
  p.out = y.data<bf16>();
  p.bias = bias.defined() ? bias.data<bf16>() : nullptr;
  p.rows = g.m;
  p.n = static_cast<int>(g.n);
  p.cos = cos.data<float>();
  p.sin = sin.data<float>();
  p.length = static_cast<int>(length);
  p.offset = static_cast<int>(offset);
  p.rotated = static_cast<int>(rotated * 64);
  return run<MapForm::rope>(g.device, static_cast<const bf16*>(g.a), g.lda, static_cast<const bf16*>(g.b), g.n, g.ldb, g.k, p);
}

namespace {

bool fused_gated_units(Tensor& h, Tensor& pre, const Gemm& g) {
  if (!plain_product(g) || !g.trans_b || !serves(g.device, g.m, g.n / 2, kMapColumns / 2, g.k, kFusedFill) || !aligned(h, pre)) return false;
  MapArguments p;
  p.out = h.data<bf16>();
  p.out2 = pre.data<bf16>();
  p.rows = g.m;
  p.n = static_cast<int>(g.n / 2);
  return run<MapForm::glu>(g.device, static_cast<const bf16*>(g.a), g.lda, static_cast<const bf16*>(g.b), g.n, g.ldb, g.k, p);
}

bool fused_gelu_gradient(Tensor& dpre, Tensor& db, bool add_db, const Tensor& dy, const Tensor& w, const Tensor& pre) {
  if (!gradient_served(dy, w, pre, dpre)) return false;
  const Tensor weight = transposed(w.data<bf16>(), w.size(0), w.size(1), w.size(1), w.device());
  const Tensor partial =
      db.defined() ? empty({ceil_div(dy.size(0), 64), w.size(1)}, DType::f32, dy.device()) : Tensor();
  MapArguments p;
  p.out = dpre.data<bf16>();
  p.in = pre.data<bf16>();
  p.partial = db.defined() ? partial.data<float>() : nullptr;
  p.rows = dy.size(0);
  p.n = static_cast<int>(w.size(1));
  run<MapForm::gelu_gradient>(dy.device(), dy.data<bf16>(), dy.size(1), weight.data<bf16>(), w.size(1), w.size(0), w.size(0), p);
  if (db.defined()) sum_chunks(db, add_db, partial);
  return true;
}

bool fused_gated_gradient(Tensor& dpre, const Tensor& dy, const Tensor& w, const Tensor& pre) {
  if (!gradient_served(dy, w, pre, dpre)) return false;
  const Tensor weight = transposed(w.data<bf16>(), w.size(0), w.size(1), w.size(1), w.device());
  MapArguments p;
  p.out = dpre.data<bf16>();
  p.in = pre.data<bf16>();
  p.rows = dy.size(0);
  p.n = static_cast<int>(w.size(1));
  return run<MapForm::glu_gradient>(dy.device(), dy.data<bf16>(), dy.size(1), weight.data<bf16>(), w.size(1), w.size(0), w.size(0), p);
}

}  // namespace

void gated_units_forward(bool& done, Tensor& h, Tensor& pre, const Gemm& product) {
  done = gather_few_gated_units(h, pre, product) || gather_rows_gated_units(h, pre, product) || fused_gated_units(h, pre, product);
}

void units_backward(bool& done, Tensor& dpre, Tensor& db, bool add_db, const Tensor& dy, const Tensor& w, const Tensor& pre,
                    Epilogue epilogue) {
  done = epilogue == Epilogue::gelu_tanh && fused_gelu_gradient(dpre, db, add_db, dy, w, pre);
}

void gated_units_backward(bool& done, Tensor& dpre, const Tensor& dy, const Tensor& w, const Tensor& pre) {
  done = fused_gated_gradient(dpre, dy, w, pre);
}

}  // namespace krait::kernels::cuda
