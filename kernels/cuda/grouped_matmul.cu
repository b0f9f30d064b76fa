// Tiles of 64 x 64, one block of 4 warps each, 16 rows per warp, 64 terms at a time. A row tile belongs to one group:
// the grid has room for every way the rows can fall into groups, and blocks without rows leave at once. bf16 multiplies
// on tensor cores with sums in fp32; fp32 and fp64 use the same fragments with plain arithmetic. A fragment of 16 rows
// x 64 columns: acc[n][e] is row g + 8 (e / 2), column 8 n + 2 t + e % 2, for lane 4 g + t.
#include "core/cuda/launch.cuh"
#include "kernels/cuda/attention_mma.cuh"
#include "kernels/grouped_matmul.h"

namespace krait::kernels::cuda {

namespace {

constexpr int kThreads = 128, kTile = 64;
template <class T> constexpr bool kTensorCores = std::is_same_v<T, bf16>;
template <class T> constexpr int kPitch = kTensorCores<T> ? kTile + 8 : kTile + 1;
template <class T> constexpr int64_t kSharedBytes = 2 * kTile * kPitch<T> * int64_t{sizeof(T)};

/// Rows `width` apart, gathered through an order where there is one. wide: they may be read in 16-byte pieces.
template <class T>
struct Operand {
  const T* data;
  const int32_t* order;
  int64_t width;
  int32_t share;
  bool wide;
  Operand(const Tensor& t, Gather gather, const RowGroups& g, bool wide_parts)
      : data(t.data<T>()), order(gather == Gather::yes ? g.order.data<int32_t>() : nullptr), width(t.size(1)),
        share(static_cast<int32_t>(g.share)),
        wide(wide_parts && width % 8 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0) {}
  __device__ const T* row(int64_t i) const { return data + (order != nullptr ? order[i] / share : i) * width; }
};

struct Sizes {
  int64_t groups, parts, n, k;
  Sizes(const Tensor& w, const RowGroups& g)
      : groups(g.groups()), parts(w.size(0) / groups), n(w.size(1)), k(w.size(2)) {}
  bool wide() const { return n % 8 == 0 && k % 8 == 0; }
};

/// 64 x 64 values; zeros from `rows` (at least 1) and `cols` on. row_of(r): address of the tile's row r.
template <class T, class RowOf>
__device__ void load_tile(T* to, RowOf row_of, int64_t rows, int64_t cols, bool wide) {
  if constexpr (kTensorCores<T>) {
    if (wide) {
      for (int at = threadIdx.x; at < kTile * kTile / 8; at += kThreads) {
        const int r = at / 8, c = at % 8 * 8;
        const bool valid = r < rows && c < cols;
        copy_async(to + r * kPitch<T> + c, valid ? row_of(r) + c : row_of(0), valid);
      }
      copy_commit();
      return;
    }
  }
  for (int at = threadIdx.x; at < kTile * kTile; at += kThreads) {
    const int r = at / kTile, c = at % kTile;
    to[r * kPitch<T> + c] = r < rows && c < cols ? row_of(r)[c] : static_cast<T>(0.0f);
  }
}
__device__ void ready() {
  copy_wait<0>();
  __syncthreads();
}

/// acc += a b over 64 terms. a lies as (row, term), or (term, row) when kTermsA; b as (column, term), or (term, column)
/// when kTermsB.
template <class T, bool kTermsA, bool kTermsB, class A>
__device__ void multiply(A (&acc)[8][4], const T* a, const T* b) {
  constexpr int P = kPitch<T>;
  const int lane = threadIdx.x % 32, r0 = threadIdx.x / 32 * 16;
  if constexpr (kTensorCores<T>) {
    const int m = lane / 8, r = lane % 8;
#pragma unroll
    for (int x = 0; x < kTile / 16; ++x) {
      uint32_t fa[4];
      if constexpr (kTermsA)
        load_matrices_transposed(fa, a + (x * 16 + m / 2 * 8 + r) * P + r0 + m % 2 * 8);
      else
        load_matrices(fa, a + (r0 + m % 2 * 8 + r) * P + x * 16 + m / 2 * 8);
#pragma unroll
      for (int n = 0; n < kTile / 16; ++n) {
        uint32_t fb[4];
        if constexpr (kTermsB)
          load_matrices_transposed(fb, b + (x * 16 + m % 2 * 8 + r) * P + n * 16 + m / 2 * 8);
        else
          load_matrices(fb, b + (n * 16 + m / 2 * 8 + r) * P + x * 16 + m % 2 * 8);
        mma(acc[2 * n], fa, fb[0], fb[1]);
        mma(acc[2 * n + 1], fa, fb[2], fb[3]);
      }
    }
  } else {
    const int g = r0 + lane / 4, t = 2 * (lane % 4);
#pragma unroll 2
    for (int k = 0; k < kTile; ++k) {
      const A x = kTermsA ? a[k * P + g] : a[g * P + k], y = kTermsA ? a[k * P + g + 8] : a[(g + 8) * P + k];
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int j = n * 8 + t;
        const A u = kTermsB ? b[k * P + j] : b[j * P + k], v = kTermsB ? b[k * P + j + 1] : b[(j + 1) * P + k];
        acc[n][0] += x * u;
        acc[n][1] += x * v;
        acc[n][2] += y * u;
        acc[n][3] += y * v;
      }
    }
  }
}

template <class A>
__device__ void clear(A (&acc)[8][4]) {
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[n][e] = 0;
}

/// f(row, column, value) for each of the thread's values.
template <class A, class F>
__device__ void for_each_value(const A (&acc)[8][4], F f) {
  const int lane = threadIdx.x % 32, r0 = threadIdx.x / 32 * 16;
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) f(r0 + lane / 4 + 8 * (e / 2), n * 8 + 2 * (lane % 4) + e % 2, acc[n][e]);
}

/// The group and the rows of a row tile.
struct RowTile {
  int64_t group = 0, first = 0, rows = 0;  // rows 0: no such tile
  __device__ RowTile(const int32_t* offsets, int64_t groups, int32_t tile) {
    for (int64_t e = 0; e < groups; ++e) {
      const int32_t begin = offsets[e], count = offsets[e + 1] - begin, tiles = (count + kTile - 1) / kTile;
      if (tile < tiles) {
        group = e;
        first = begin + int64_t{tile} * kTile;
        rows = count - tile * kTile;  // may pass 64: the tile's end bounds it
        return;
      }
      tile -= tiles;
    }
  }
};

/// grouped_matmul: out (rows, parts n), a (., k), blockIdx.y a tile of a part's n columns.
/// kInput, grouped_matmul_input: out (rows, k), a (., parts n), blockIdx.y a tile of the k columns.
template <class T, bool kInput, class A = accum_t<T>>
__global__ void __launch_bounds__(kThreads)
    rows_kernel(T* out, Operand<T> a, const T* w, const int32_t* offsets, Sizes s, bool wide) {
  const RowTile tile(offsets, s.groups, static_cast<int32_t>(blockIdx.x));
  if (tile.rows == 0) return;
  const int64_t columns = kInput ? s.k : s.n, terms = kInput ? s.n : s.k, across = (columns + kTile - 1) / kTile;
  const int64_t first_part = kInput ? 0 : blockIdx.y / across, parts = kInput ? s.parts : 1;
  const int64_t j0 = blockIdx.y % across * kTile;
  extern __shared__ __align__(16) unsigned char shared[];
  T *a_tile = reinterpret_cast<T*>(shared), *w_tile = a_tile + kTile * kPitch<T>;
  A acc[8][4];
  clear(acc);
  for (int64_t p = first_part; p < first_part + parts; ++p) {
    const T* matrix = w + (p * s.groups + tile.group) * s.n * s.k;
    const int64_t shift = kInput ? p * s.n : 0;
    for (int64_t t0 = 0; t0 < terms; t0 += kTile) {
      load_tile(a_tile, [&](int r) { return a.row(tile.first + r) + shift + t0; }, tile.rows, terms - t0, a.wide);
      if constexpr (kInput)
        load_tile(w_tile, [&](int r) { return matrix + (t0 + r) * s.k + j0; }, terms - t0, columns - j0, wide);
      else
        load_tile(w_tile, [&](int r) { return matrix + (j0 + r) * s.k + t0; }, columns - j0, terms - t0, wide);
      ready();
      multiply<T, false, kInput>(acc, a_tile, w_tile);
      __syncthreads();
    }
  }
  const int64_t width = kInput ? s.k : s.parts * s.n, shift = kInput ? 0 : first_part * s.n;
  for_each_value(acc, [&](int r, int c, A value) {
    if (r < tile.rows && j0 + c < columns) out[(tile.first + r) * width + shift + j0 + c] = static_cast<T>(value);
  });
}

/// blockIdx.y: the matrix (part, group); blockIdx.x: a tile of it.
template <class T, class A = accum_t<T>>
__global__ void __launch_bounds__(kThreads)
    weight_kernel(A* dw, Operand<T> dc, Operand<T> a, const int32_t* offsets, Sizes s, bool add) {
  const int64_t across = (s.k + kTile - 1) / kTile, i0 = blockIdx.x / across * kTile, j0 = blockIdx.x % across * kTile;
  const int64_t part = blockIdx.y / s.groups, e = blockIdx.y % s.groups, end = offsets[e + 1];
  extern __shared__ __align__(16) unsigned char shared[];
  T *dc_tile = reinterpret_cast<T*>(shared), *a_tile = dc_tile + kTile * kPitch<T>;
  A acc[8][4];
  clear(acc);
  for (int64_t r0 = offsets[e]; r0 < end; r0 += kTile) {
    load_tile(dc_tile, [&](int r) { return dc.row(r0 + r) + part * s.n + i0; }, end - r0, s.n - i0, dc.wide);
    load_tile(a_tile, [&](int r) { return a.row(r0 + r) + j0; }, end - r0, s.k - j0, a.wide);
    ready();
    multiply<T, true, true>(acc, dc_tile, a_tile);
    __syncthreads();
  }
  A* to = dw + int64_t{blockIdx.y} * s.n * s.k;
  for_each_value(acc, [&](int r, int c, A value) {
    if (i0 + r >= s.n || j0 + c >= s.k) return;
    A& target = to[(i0 + r) * s.k + j0 + c];
    target = add ? target + value : value;
  });
}

template <bool kInput>
void rows_product(Tensor& out, const Tensor& a, Gather gather, const Tensor& w, const RowGroups& groups) {
  visit_float(a.dtype(), [&]<class T>() {
    const Sizes s(w, groups);
    const bool wide = s.wide() && reinterpret_cast<uintptr_t>(w.data<T>()) % 16 == 0;
    launch(rows_kernel<T, kInput>,
           {.grid = ceil_div(groups.rows, kTile) + s.groups,
            .grid_y = kInput ? ceil_div(s.k, kTile) : s.parts * ceil_div(s.n, kTile), .block = kThreads,
            .shared = kSharedBytes<T>, .stream = current_stream(a.device())},
           out.data<T>(), Operand<T>(a, gather, groups, s.wide()), w.data<T>(), groups.offsets.data<int32_t>(), s, wide);
  });
}

}  // namespace

void grouped_matmul(Tensor& c, const Tensor& a, Gather gather, const Tensor& w, const RowGroups& groups) {
  rows_product<false>(c, a, gather, w, groups);
}

void grouped_matmul_input(Tensor& da, const Tensor& dc, Gather gather, const Tensor& w, const RowGroups& groups) {
  rows_product<true>(da, dc, gather, w, groups);
}

void grouped_matmul_weight(Tensor& dw, bool add, const Tensor& dc, Gather gather_dc, const Tensor& a, Gather gather_a,
                           const RowGroups& groups) {
  visit_float(a.dtype(), [&]<class T>() {
    const Sizes s(dw, groups);
    launch(weight_kernel<T>,
           {.grid = ceil_div(s.n, kTile) * ceil_div(s.k, kTile), .grid_y = s.parts * s.groups, .block = kThreads,
            .shared = kSharedBytes<T>, .stream = current_stream(a.device())},
           dw.data<accum_t<T>>(), Operand<T>(dc, gather_dc, groups, s.wide()), Operand<T>(a, gather_a, groups, s.wide()),
           groups.offsets.data<int32_t>(), s, add);
  });
}

}  // namespace krait::kernels::cuda
