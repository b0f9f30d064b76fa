// Attention on CUDA cores: any dtype, any d up to 256. 256 threads own a tile of B x B scores, B = 16 R: thread
// (ty, tx) has rows ty + 16 i and columns tx + 16 j. Bound by shared memory.
#include "kernels/cuda/attention_common.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int kColumns = 16;  // columns of a (B, d) accumulator a thread: tx + 16 x covers d <= 256

template <class A> __device__ inline A nothing() { return static_cast<A>(-INFINITY); }

// Rows [first, first + B) of one head into shared memory (B, d + 1); zeros from `last` on.
template <int B, class A, class T>
__device__ void load_rows(A* to, const Strided<const T>& from, int64_t b, int64_t first, int64_t last, int64_t h, int d) {
  for (int at = threadIdx.x; at < B * d; at += 256) {
    const int r = at / d, c = at % d;
    to[r * (d + 1) + c] = first + r < last ? static_cast<A>(from.at(b, first + r, h)[c]) : A(0);
  }
}

// s[i][j] = a row (ty + 16 i) . b row (tx + 16 j)
template <int R, class A>
__device__ void products(A (&s)[R][R], const A* a, const A* b, int d) {
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16, pitch = d + 1;
#pragma unroll
  for (int i = 0; i < R; ++i)
#pragma unroll
    for (int j = 0; j < R; ++j) s[i][j] = 0;
  for (int c = 0; c < d; ++c) {
    A x[R], y[R];
#pragma unroll
    for (int i = 0; i < R; ++i) x[i] = a[(ty + 16 * i) * pitch + c];
#pragma unroll
    for (int j = 0; j < R; ++j) y[j] = b[(tx + 16 * j) * pitch + c];
#pragma unroll
    for (int i = 0; i < R; ++i)
#pragma unroll
      for (int j = 0; j < R; ++j) s[i][j] += x[i] * y[j];
  }
}

// acc[i][x] += sum_y weight(ty + 16 i, y) rows[y][tx + 16 x], with weight(r, y) = w[r row_step + y step].
template <int R, class A>
__device__ void accumulate_rows(A (&acc)[R][kColumns], const A* w, int row_step, int step, const A* rows, int d) {
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  for (int y = 0; y < 16 * R; ++y) {
    A p[R];
#pragma unroll
    for (int i = 0; i < R; ++i) p[i] = w[(ty + 16 * i) * row_step + y * step];
#pragma unroll
    for (int x = 0; x < kColumns; ++x) {
      if (16 * x >= d) break;
      const A value = tx + 16 * x < d ? rows[y * (d + 1) + tx + 16 * x] : A(0);
#pragma unroll
      for (int i = 0; i < R; ++i) acc[i][x] += p[i] * value;
    }
  }
}

template <int R, class A>
__device__ void clear(A (&acc)[R][kColumns]) {
#pragma unroll
  for (int i = 0; i < R; ++i)
#pragma unroll
    for (int x = 0; x < kColumns; ++x) acc[i][x] = 0;
}

template <int R, class A, class T>
__device__ void store_rows(const Strided<T>& to, const A (&acc)[R][kColumns], int64_t b, int64_t first, int64_t last,
                           int64_t h, int d, A factor) {
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll
  for (int i = 0; i < R; ++i) {
    const int64_t r = first + ty + 16 * i;
    if (r >= last) continue;
#pragma unroll
    for (int x = 0; x < kColumns; ++x)
      if (tx + 16 * x < d) to.at(b, r, h)[tx + 16 * x] = static_cast<T>(acc[i][x] * factor);
  }
}

// scale q.k - slope |p - j|, or -infinity where query i does not see key j.
template <class A>
__device__ A score(const TileView& view, int64_t b, int64_t i, int64_t j, A product, A scale, A slope) {
  if (i >= view.mask.lq || j < view.mask.key_begin(b, i) || j >= view.mask.key_end(b, i) ||
      !view.same_document(b, i, j))
    return nothing<A>();
  const int64_t distance = view.mask.position(b, i) - j;
  return product * scale - slope * static_cast<A>(distance < 0 ? -distance : distance);
}

template <class A>
__device__ A slope_of(const TileView& view, int64_t h) {
  return view.mask.alibi ? static_cast<A>(view.mask.alibi[h]) : A(0);
}

// Bit i R + j: the probability of row i0 + ty + 16 i and column j0 + tx + 16 j is kept. Four neighbouring tx need
// the same calls: each makes every fourth one and they exchange bits.
template <int R>
__device__ uint32_t kept_bits(const AttentionDropout& dropout, uint64_t now, int64_t b, int64_t h, int64_t i0,
                              int64_t j0) {
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16, x = tx % 4;
  const auto call = [&](int i, int j) {
    return dropout.row(b, h, i0 + ty + 16 * i) + static_cast<uint64_t>((j0 + tx + 16 * j) / 4);
  };
  if constexpr (R == 1) {
    return dropout.kept(call(0, 0), now) >> x & 1u;
  } else {
    uint32_t bits = 0;
#pragma unroll
    for (int m = 0; m < R * R; m += 4)
      bits |= exchange_kept(dropout.kept(call((m + x) / R, (m + x) % R), now), x, 1) << m;
    return bits;
  }
}

template <class A>
__device__ A* shared_values() {
  extern __shared__ __align__(16) unsigned char attention_shared[];
  return reinterpret_cast<A*>(attention_shared);
}

// One block: one (batch, query head) and B queries. Tiles with the most keys come first.
template <class T, int R, bool Drop>
__global__ void __launch_bounds__(256)
    forward_kernel(Strided<T> o, accum_t<T>* lse, Strided<const T> q, Strided<const T> k, Strided<const T> v,
                   TileView view, AttentionDropout dropout, accum_t<T> scale, HeadShape shape, int64_t tiles) {
  using A = accum_t<T>;
  constexpr int B = 16 * R;
  const int64_t units = shape.b * shape.hq, unit = blockIdx.x % units, lq = view.mask.lq, lk = view.mask.lk;
  const int64_t i0 = (tiles - 1 - blockIdx.x / units) * B, i1 = min(lq, i0 + B);
  const int64_t b = unit / shape.hq, h = unit % shape.hq, hk = h / shape.group;
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16, d = shape.d;
  const uint64_t now = Drop ? static_cast<uint64_t>(*dropout.step) : 0;
  A* sq = shared_values<A>();
  A* skv = sq + B * (d + 1);
  A* sp = skv + B * (d + 1);  // (B, B + 1)
  const A slope = slope_of<A>(view, h);

  A acc[R][kColumns], m[R], l[R];
  clear(acc);
#pragma unroll
  for (int i = 0; i < R; ++i) {
    m[i] = nothing<A>();
    l[i] = 0;
  }
  load_rows<B>(sq, q, b, i0, i1, h, d);
  const int64_t last = view.mask.key_end(b, i1 - 1);
  for (int64_t j0 = view.mask.key_begin(b, i0) / B * B; j0 < last; j0 += B) {
    if (view.skip(b, i0, j0)) continue;
    __syncthreads();
    load_rows<B>(skv, k, b, j0, lk, hk, d);
    __syncthreads();
    A s[R][R];
    products(s, sq, skv, d);
    [[maybe_unused]] const uint32_t kept = Drop ? kept_bits<R>(dropout, now, b, h, i0, j0) : 0;
#pragma unroll
    for (int i = 0; i < R; ++i) {
      A top = m[i];
#pragma unroll
      for (int j = 0; j < R; ++j) {
        s[i][j] = score(view, b, i0 + ty + 16 * i, j0 + tx + 16 * j, s[i][j], scale, slope);
        top = s[i][j] > top ? s[i][j] : top;
      }
#pragma unroll
      for (int w = 8; w > 0; w /= 2) {
        const A other = __shfl_xor_sync(0xffffffffu, top, w);
        top = other > top ? other : top;
      }
      const A shift = top == nothing<A>() ? A(0) : top, shrink = exp_of(m[i] - shift);
      A sum = 0;
#pragma unroll
      for (int j = 0; j < R; ++j) {
        const A p = exp_of(s[i][j] - shift);
        sum += p;
        sp[(ty + 16 * i) * (B + 1) + tx + 16 * j] = !Drop || kept >> (i * R + j) & 1u ? p : A(0);
      }
#pragma unroll
      for (int w = 8; w > 0; w /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, w);
      l[i] = l[i] * shrink + sum;
      m[i] = top;
#pragma unroll
      for (int x = 0; x < kColumns; ++x) acc[i][x] *= shrink;
    }
    __syncthreads();
    load_rows<B>(skv, v, b, j0, lk, hk, d);
    __syncthreads();
    accumulate_rows<R>(acc, sp, B + 1, 1, skv, d);
  }
#pragma unroll
  for (int i = 0; i < R; ++i) {
    const A inverse = l[i] > 0 ? (Drop ? static_cast<A>(dropout.keep_scale) : A(1)) / l[i] : A(0);
#pragma unroll
    for (int x = 0; x < kColumns; ++x) acc[i][x] *= inverse;
    if (tx == 0 && i0 + ty + 16 * i < lq)
      lse[unit * lq + i0 + ty + 16 * i] = l[i] > 0 ? m[i] + log_of(l[i]) : nothing<A>();
  }
  store_rows<R>(o, acc, b, i0, i1, h, d, A(1));
}

// m P / keep_scale and dS of one tile of queries and keys into shared memory (B, B + 1), rows are queries.
template <int R, bool Drop, class A>
__device__ void tile_gradients(A* sp, A* ds, const A* sq, const A* sdo, const A* sk, const A* sv, const A* lse,
                               const A* delta, const TileView& view, const AttentionDropout& dropout, uint64_t now,
                               int64_t b, int64_t h, int64_t i0, int64_t j0, A scale, A slope, int d) {
  constexpr int B = 16 * R;
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  A s[R][R], dp[R][R];
  products(s, sq, sk, d);
  products(dp, sdo, sv, d);
  [[maybe_unused]] const uint32_t kept = Drop ? kept_bits<R>(dropout, now, b, h, i0, j0) : 0;
#pragma unroll
  for (int i = 0; i < R; ++i) {
    const int64_t row = i0 + ty + 16 * i;
    const bool valid = row < view.mask.lq;
    const A row_lse = valid ? lse[row] : A(0), row_delta = valid ? delta[row] : A(0);
#pragma unroll
    for (int j = 0; j < R; ++j) {
      const A x = score(view, b, row, j0 + tx + 16 * j, s[i][j], scale, slope);
      const A p = x == nothing<A>() ? A(0) : exp_of(x - row_lse);
      const int at = (ty + 16 * i) * (B + 1) + tx + 16 * j;
      if constexpr (Drop) {
        const bool keep = kept >> (i * R + j) & 1u;
        sp[at] = keep ? p : A(0);
        ds[at] = p * ((keep ? dp[i][j] * static_cast<A>(dropout.keep_scale) : A(0)) - row_delta);
      } else {
        sp[at] = p;
        ds[at] = p * (dp[i][j] - row_delta);
      }
    }
  }
}

// One block: one (batch, key head) and B keys; all queries of the head's group that see them.
template <class T, int R, bool Drop>
__global__ void __launch_bounds__(256)
    backward_keys_kernel(Strided<T> dk, Strided<T> dv, Strided<const T> do_, Strided<const T> q, Strided<const T> k,
                         Strided<const T> v, const accum_t<T>* lse, const accum_t<T>* delta, TileView view,
                         AttentionDropout dropout, accum_t<T> scale, HeadShape shape) {
  using A = accum_t<T>;
  constexpr int B = 16 * R;
  const int64_t units = shape.b * shape.hkv, unit = blockIdx.x % units, lq = view.mask.lq, lk = view.mask.lk;
  const int64_t j0 = blockIdx.x / units * B, j1 = min(lk, j0 + B), b = unit / shape.hkv, hk = unit % shape.hkv;
  const int d = shape.d, tile = B * (d + 1);
  const uint64_t now = Drop ? static_cast<uint64_t>(*dropout.step) : 0;
  A* sk = shared_values<A>();
  A *sv = sk + tile, *sq = sv + tile, *sdo = sq + tile, *sp = sdo + tile, *ds = sp + B * (B + 1);
  A dk_acc[R][kColumns], dv_acc[R][kColumns];
  clear(dk_acc);
  clear(dv_acc);
  load_rows<B>(sk, k, b, j0, j1, hk, d);
  load_rows<B>(sv, v, b, j0, j1, hk, d);
  const int64_t first = view.mask.query_begin(b, j0) / B * B, last = view.mask.query_end(b, j1);
  for (int64_t h = hk * shape.group; h < (hk + 1) * shape.group; ++h) {
    for (int64_t i0 = first; i0 < last; i0 += B) {
      if (view.skip(b, i0, j0)) continue;
      __syncthreads();
      load_rows<B>(sq, q, b, i0, lq, h, d);
      load_rows<B>(sdo, do_, b, i0, lq, h, d);
      __syncthreads();
      const int64_t rows = (b * shape.hq + h) * lq;
      tile_gradients<R, Drop>(sp, ds, sq, sdo, sk, sv, lse + rows, delta + rows, view, dropout, now, b, h, i0, j0,
                              scale, slope_of<A>(view, h), d);
      __syncthreads();
      accumulate_rows<R>(dv_acc, sp, 1, B + 1, sdo, d);
      accumulate_rows<R>(dk_acc, ds, 1, B + 1, sq, d);
    }
  }
  store_rows<R>(dk, dk_acc, b, j0, j1, hk, d, scale);
  store_rows<R>(dv, dv_acc, b, j0, j1, hk, d, Drop ? static_cast<A>(dropout.keep_scale) : A(1));
}

// One block: one (batch, query head) and B queries.
template <class T, int R, bool Drop>
__global__ void __launch_bounds__(256)
    backward_queries_kernel(Strided<T> dq, Strided<const T> do_, Strided<const T> q, Strided<const T> k,
                            Strided<const T> v, const accum_t<T>* lse, const accum_t<T>* delta, TileView view,
                            AttentionDropout dropout, accum_t<T> scale, HeadShape shape, int64_t tiles) {
  using A = accum_t<T>;
  constexpr int B = 16 * R;
  const int64_t units = shape.b * shape.hq, unit = blockIdx.x % units, lq = view.mask.lq, lk = view.mask.lk;
  const int64_t i0 = (tiles - 1 - blockIdx.x / units) * B, i1 = min(lq, i0 + B);
  const int64_t b = unit / shape.hq, h = unit % shape.hq, hk = h / shape.group;
  const int d = shape.d, tile = B * (d + 1);
  const uint64_t now = Drop ? static_cast<uint64_t>(*dropout.step) : 0;
  A* sk = shared_values<A>();
  A *sv = sk + tile, *sq = sv + tile, *sdo = sq + tile, *sp = sdo + tile, *ds = sp + B * (B + 1);
  A acc[R][kColumns];
  clear(acc);
  load_rows<B>(sq, q, b, i0, i1, h, d);
  load_rows<B>(sdo, do_, b, i0, i1, h, d);
  const int64_t last = view.mask.key_end(b, i1 - 1);
  for (int64_t j0 = view.mask.key_begin(b, i0) / B * B; j0 < last; j0 += B) {
    if (view.skip(b, i0, j0)) continue;
    __syncthreads();
    load_rows<B>(sk, k, b, j0, lk, hk, d);
    load_rows<B>(sv, v, b, j0, lk, hk, d);
    __syncthreads();
    tile_gradients<R, Drop>(sp, ds, sq, sdo, sk, sv, lse + unit * lq, delta + unit * lq, view, dropout, now, b, h, i0,
                            j0, scale, slope_of<A>(view, h), d);
    __syncthreads();
    accumulate_rows<R>(acc, ds, B + 1, 1, sk, d);
  }
  store_rows<R>(dq, acc, b, i0, i1, h, d, scale);
}

}  // namespace

void attention_forward_simt(Tensor& o, Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                            const AttentionOptions& options) {
  const HeadShape shape(q, k);
  const View view(q, k, options);
  const AttentionDropout dropout(q, k, options);
  visit_float(q.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    constexpr int R = std::is_same_v<T, double> ? 2 : 4, B = 16 * R;
    const int64_t tiles = ceil_div(q.size(1), B);
    const int64_t shared = (2 * B * (shape.d + 1) + B * (B + 1)) * int64_t{sizeof(A)};
    visit_dropout(dropout, [&]<bool Drop>() {
      launch(forward_kernel<T, R, Drop>,
             {.grid = tiles * shape.b * shape.hq, .shared = shared, .stream = current_stream(q.device())},
             Strided<T>(o), lse.data<A>(), Strided<const T>(q), Strided<const T>(k), Strided<const T>(v), view.tiles,
             dropout, options.scale, shape, tiles);
    });
  });
}

void attention_backward_simt(Tensor& dq, Tensor& dk, Tensor& dv, const Tensor& do_, const Tensor& q, const Tensor& k,
                             const Tensor& v, const Tensor& lse, const Tensor& delta, const AttentionOptions& options) {
  const HeadShape shape(q, k);
  const View view(q, k, options);
  const AttentionDropout dropout(q, k, options);
  const Stream stream = current_stream(q.device());
  visit_float(q.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    constexpr int R = std::is_same_v<T, double> ? 1 : 2, B = 16 * R;
    const int64_t q_tiles = ceil_div(q.size(1), B), k_tiles = ceil_div(k.size(1), B);
    const int64_t shared = (4 * B * (shape.d + 1) + 2 * B * (B + 1)) * int64_t{sizeof(A)};
    visit_dropout(dropout, [&]<bool Drop>() {
      launch(backward_keys_kernel<T, R, Drop>,
             {.grid = k_tiles * shape.b * shape.hkv, .shared = shared, .stream = stream}, Strided<T>(dk),
             Strided<T>(dv), Strided<const T>(do_), Strided<const T>(q), Strided<const T>(k), Strided<const T>(v),
             lse.data<A>(), delta.data<A>(), view.tiles, dropout, options.scale, shape);
      launch(backward_queries_kernel<T, R, Drop>,
             {.grid = q_tiles * shape.b * shape.hq, .shared = shared, .stream = stream}, Strided<T>(dq),
             Strided<const T>(do_), Strided<const T>(q), Strided<const T>(k), Strided<const T>(v), lse.data<A>(),
             delta.data<A>(), view.tiles, dropout, options.scale, shape, q_tiles);
    });
  });
}

}  // namespace krait::kernels::cuda
