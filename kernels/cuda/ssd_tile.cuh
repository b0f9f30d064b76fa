#pragma once
// Square tiles of 64 for the state-space chunks. 4 warps, 16 rows each; a fragment of 16 rows x 64 columns lies in a
// warp as attention_mma.cuh says: s[n][e] is row g + 8 (e / 2), column 8 n + 2 t + e % 2, for lane 4 g + t.
// bf16 multiplies on tensor cores with sums in fp32; fp32 and fp64 use the same fragments with plain arithmetic.
#include "core/cuda/launch.cuh"
#include "kernels/cuda/attention_mma.cuh"
#include "kernels/ssd.h"

namespace krait::kernels::cuda::ssd {

inline constexpr int kThreads = 128, kTile = 64;
template <class T> inline constexpr bool kTensorCores = std::is_same_v<T, bf16>;
template <class T> inline constexpr int kPitch = kTensorCores<T> ? kTile + 8 : kTile + 1;
template <class T> inline constexpr int kTileSize = kTile * kPitch<T>;

/// Sizes of a call. tiles: of 64 positions per chunk.
struct Dims {
  int64_t b, l, heads, p, g, n, chunk, chunks, tiles;
  explicit Dims(const SsdInput& in)
      : b(in.x.size(0)), l(in.x.size(1)), heads(in.x.size(2)), p(in.x.size(3)), g(in.B.size(2)), n(in.B.size(3)),
        chunk(in.chunk), chunks(ceil_div(l, chunk)), tiles(ceil_div(chunk, kTile)) {}
  int64_t group() const { return heads / g; }
  /// Of G = C B^T, (b, chunks, g, chunk, chunk).
  __device__ int64_t products_at(int64_t ib, int64_t c, int64_t group_index) const {
    return ((ib * chunks + c) * g + group_index) * chunk * chunk;
  }
  /// Of a state, (b, chunks, heads, p, n).
  __device__ int64_t state_at(int64_t ib, int64_t c, int64_t h) const {
    return ((ib * chunks + c) * heads + h) * p * n;
  }
};

/// What blockIdx.x stands for: a chunk and one of `per` heads or groups.
struct Unit {
  int64_t b, c, h, t0, q;
  __device__ Unit(const Dims& d, int64_t per)
      : b(blockIdx.x / per / d.chunks), c(blockIdx.x / per % d.chunks), h(blockIdx.x % per), t0(c * d.chunk),
        q(min(d.chunk, d.l - t0)) {}
};

/// A (b, l, heads, d) tensor; its last stride is 1. wide: rows may be read in 16-byte pieces.
template <class T>
struct Rows {
  T* data;
  int64_t batch, row, head;
  bool wide;
  explicit Rows(const Tensor& t)
      : data(t.data<std::remove_const_t<T>>()), batch(t.stride(0)), row(t.stride(1)), head(t.stride(2)),
        wide(sizeof(T) == 2 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && batch % 8 == 0 && row % 8 == 0 &&
             head % 8 == 0 && t.size(3) % 8 == 0) {}
  __device__ T* at(int64_t b, int64_t l, int64_t h) const { return data + b * batch + l * row + h * head; }
};

/// Lane's place in a fragment of the warp's 16 rows.
struct Lane {
  int r0, g, t;
  __device__ Lane() : r0(threadIdx.x / 32 * 16), g(threadIdx.x % 32 / 4), t(threadIdx.x % 4) {}
  __device__ int row(int half) const { return r0 + g + 8 * half; }
  __device__ int column(int n, int e) const { return n * 8 + 2 * t + e % 2; }
};

__device__ inline float exp_of(float x) { return expf(x); }
__device__ inline double exp_of(double x) { return exp(x); }

/// 64 x 64 values into shared memory; zeros from `rows` and `cols` on. Call ready() before reading.
template <class T, class S>
__device__ inline void load_square(T* to, const S* from, int64_t row, int64_t rows, int64_t cols, bool wide = false) {
  if constexpr (kTensorCores<T> && std::is_same_v<std::remove_const_t<S>, bf16>) {
    if (wide) {
      for (int at = threadIdx.x; at < kTile * kTile / 8; at += kThreads) {
        const int r = at / 8, c = at % 8 * 8;
        const bool valid = r < rows && c < cols;
        copy_async(to + r * kPitch<T> + c, valid ? from + r * row + c : from, valid);
      }
      copy_commit();
      return;
    }
  }
  for (int at = threadIdx.x; at < kTile * kTile; at += kThreads) {
    const int r = at / kTile, c = at % kTile;
    to[r * kPitch<T> + c] = r < rows && c < cols ? static_cast<T>(from[r * row + c]) : static_cast<T>(0.0f);
  }
}
__device__ inline void ready() {
  copy_wait<0>();
  __syncthreads();
}

template <class A>
__device__ inline void clear(A (&s)[8][4]) {
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) s[n][e] = 0;
}

/// s += a b^T: the warp's rows of a, all rows of b.
template <class T, class A>
__device__ inline void add_products(A (&s)[8][4], const T* a, const T* b) {
  const Lane at;
  if constexpr (kTensorCores<T>) {
    float product[8][4];
    multiply_rows<kTile, kTile>(product, a, at.r0, b);
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[n][e] += product[n][e];
  } else {
    const T *a0 = a + at.row(0) * kPitch<T>, *a1 = a + at.row(1) * kPitch<T>, *rows = b + 2 * at.t * kPitch<T>;
#pragma unroll 2
    for (int k = 0; k < kTile; ++k) {
      const A x = a0[k], y = a1[k];
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const A u = rows[n * 8 * kPitch<T> + k], v = rows[(n * 8 + 1) * kPitch<T> + k];
        s[n][0] += x * u;
        s[n][1] += x * v;
        s[n][2] += y * u;
        s[n][3] += y * v;
      }
    }
  }
}

/// acc += w rows: w a fragment of 16 x 64 (rounded to bf16 for tensor cores), rows 64 x 64.
template <class T, class A>
__device__ inline void add_weighted(A (&acc)[8][4], const A (&w)[8][4], const T* rows) {
  if constexpr (kTensorCores<T>) {
    accumulate_tile<kTile, kTile>(acc, w, rows);
  } else {
    const Lane at;
    const int first = threadIdx.x % 32 & ~3;
#pragma unroll
    for (int k = 0; k < kTile / 8; ++k) {
#pragma unroll 1  // the lane that holds columns 8 k + 2 s and the next: rolled, for the size of the code
      for (int s = 0; s < 4; ++s) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const A x = __shfl_sync(0xffffffffu, w[k][e], first | s), y = __shfl_sync(0xffffffffu, w[k][2 + e], first | s);
          const T* row = rows + (8 * k + 2 * s + e) * kPitch<T> + 2 * at.t;
#pragma unroll
          for (int n = 0; n < 8; ++n) {
            const A u = row[n * 8], v = row[n * 8 + 1];
            acc[n][0] += x * u;
            acc[n][1] += x * v;
            acc[n][2] += y * u;
            acc[n][3] += y * v;
          }
        }
      }
    }
  }
}

/// w = the warp's rows of a tile, times one factor per row.
template <class T, class A>
__device__ inline void take_rows(A (&w)[8][4], const T* tile, const A (&factor)[2]) {
  const Lane at;
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      w[n][e] = static_cast<A>(tile[at.row(e / 2) * kPitch<T> + at.column(n, e)]) * factor[e / 2];
}

/// w = the warp's columns of a tile as rows, times one weight per row of the tile (in shared memory).
template <class T, class A>
__device__ inline void take_columns(A (&w)[8][4], const T* tile, const A* weight) {
  const Lane at;
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      w[n][e] = static_cast<A>(tile[at.column(n, e) * kPitch<T> + at.row(e / 2)]) * weight[at.column(n, e)];
}

template <class A>
__device__ inline void scale_rows(A (&s)[8][4], const A (&factor)[2]) {
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) s[n][e] *= factor[e / 2];
}

/// Sums over the row of a fragment: every lane of the row gets it.
template <class A>
__device__ inline A row_sum(A v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  return v + __shfl_xor_sync(0xffffffffu, v, 2);
}
template <class A>
__device__ inline A column_sum(A v) {
  v += __shfl_xor_sync(0xffffffffu, v, 4);
  v += __shfl_xor_sync(0xffffffffu, v, 8);
  return v + __shfl_xor_sync(0xffffffffu, v, 16);
}

/// Log decays summed from the start of the chunk, s = high + low (two numbers, so that differences keep the digits of
/// fp32 where sums pass -1000), time steps, and how many documents began in the chunk up to a position.
template <class A>
struct DecayTile {
  A high[kTile], low[kTile], dt[kTile];
  int run[kTile];  // -1 beyond the end
  /// M_ij = e^{s_i - s_j}; causal says i >= j.
  __device__ static A mask(const DecayTile& ti, int i, const DecayTile& tj, int j, bool causal) {
    if (!causal || tj.run[j] < 0 || ti.run[i] != tj.run[j]) return A(0);
    return exp_of((ti.high[i] - tj.high[j]) + (ti.low[i] - tj.low[j]));
  }
  /// e^{s_i}: what of the state before the chunk reaches i.
  __device__ A in(int i) const { return run[i] == 0 ? exp_of(high[i] + low[i]) : A(0); }
};

template <class A>
struct ChunkEnd {
  A high, low;
  int run;
  /// e^{s_q - s_j}: what of j reaches the state after the chunk.
  __device__ A out(const DecayTile<A>& t, int j) const {
    return t.run[j] == run ? exp_of((high - t.high[j]) + (low - t.low[j])) : A(0);
  }
  /// e^{s_q}: what of the state before reaches the state after.
  __device__ A total() const { return run == 0 ? exp_of(high + low) : A(0); }
};

template <class A>
struct Decays {
  const A *high, *low, *dt;  // (b, l, heads); dt null: 1
  const int32_t* run;        // (b, l), null: one document
  int64_t l, heads;
  __device__ int64_t at(int64_t b, int64_t t, int64_t h) const { return (b * l + t) * heads + h; }
  /// Positions [t, t + 64), of which `valid` exist.
  __device__ void load(DecayTile<A>& to, int64_t b, int64_t t, int64_t h, int64_t valid) const {
    for (int k = threadIdx.x; k < kTile; k += kThreads) {
      const bool in = k < valid;
      const int64_t i = in ? at(b, t + k, h) : 0;
      to.high[k] = in ? high[i] : A(0);
      to.low[k] = in ? low[i] : A(0);
      to.dt[k] = !in ? A(0) : dt ? dt[i] : A(1);
      to.run[k] = !in ? -1 : run ? run[b * l + t + k] : 0;
    }
  }
  __device__ ChunkEnd<A> end(int64_t b, int64_t t, int64_t h) const {
    return {high[at(b, t, h)], low[at(b, t, h)], run ? run[b * l + t] : 0};
  }
};

/// What both directions make first.
struct Pass {
  Dims d;
  Tensor high, low, dt, run;
  Tensor products;  // C B^T of every chunk and group (b, chunks, g, chunk, chunk) in the dtype of sums; below the
                    // diagonal's tiles only
  explicit Pass(const SsdInput& in);
  template <class A>
  Decays<A> decays() const {
    return {high.data<A>(), low.data<A>(), dt.defined() ? dt.data<A>() : nullptr,
            run.defined() ? run.data<int32_t>() : nullptr, d.l, d.heads};
  }
  /// Per chunk and head, forward: sum_j e^{s_q - s_j} dt_j x_j (x) B_j; reverse: sum_i e^{s_i} dy_i (x) C_i.
  Tensor own_states(const Tensor& rows, const Tensor& columns, bool reverse) const;
  /// In place: forward to the state before each chunk, reverse to the gradient of the state after it. `start` and
  /// `last` (b, heads, p, n) may be undefined.
  void scan(Tensor& states, const Tensor& start, const Tensor& last, bool reverse) const;
};

}  // namespace krait::kernels::cuda::ssd
