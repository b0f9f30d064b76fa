// bf16 attention on tensor cores (Dao 2023, FlashAttention-2), deterministic: the backward makes one pass over key
// tiles for dk, dv and one over query tiles for dq. 4 warps, 16 rows each; the other operand streams through
// two buffers. Scores, softmax and sums in fp32; P and dS are rounded to bf16 for the second product.
#include "kernels/cuda/attention_common.cuh"
#include "kernels/cuda/attention_mma.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int kRows = 64;  // rows of a block
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr int kThreads = 128;

// Scores in units of log2, so that exp2 serves.
struct Scale {
  float scale_log2, slope_log2;
  bool plain;  // no ALiBi
  __device__ Scale(float scale, const TileView& view, int64_t h)
      : scale_log2(scale * kLog2e), slope_log2(view.mask.alibi ? view.mask.alibi[h] * kLog2e : 0.0f),
        plain(!view.mask.alibi) {}
  __device__ float operator()(float product, int64_t p, int64_t j) const {
    const int64_t distance = p - j;
    return product * scale_log2 - slope_log2 * static_cast<float>(distance < 0 ? -distance : distance);
  }
};

// The next key tile from `kb` on that shares a document with the queries.
__device__ inline int64_t next_tile(const TileView& view, int64_t b, int64_t i0, int64_t kb, int64_t end, int keys) {
  while (kb < end && view.skip(b, i0, kb * keys)) ++kb;
  return kb;
}

// Dropout of a warp's 16 x N probabilities: bit 4 n + x is set where accumulator value x of columns 8 n ... is kept.
// Rows are queries (from `row`, the first Philox call of query g, on; the one of query g + 8 is 8 rows further) and
// columns keys, four neighbours a call: lanes t, t ^ 1 share two calls, make one each and swap.
template <int N>
__device__ inline uint32_t kept_by_query(const AttentionDropout& dropout, uint64_t now, uint64_t row, int64_t j0) {
  const int t = threadIdx.x % 4, half = t % 2;
  const uint64_t own = row + static_cast<uint64_t>(half * 8 * dropout.row_calls + j0 / 4 + t / 2);
  uint32_t kept = 0;
#pragma unroll 2  // all at once would take registers from the accumulators
  for (int n = 0; n < N / 8; ++n) {
    const uint32_t mine = dropout.kept(own + static_cast<uint64_t>(2 * n), now);
    const uint32_t other = __shfl_xor_sync(0xffffffffu, mine, 1);
    const uint32_t low = half ? other : mine, high = half ? mine : other;  // of query g and of query g + 8
    kept |= (low >> (2 * half) & 3u) << (4 * n) | (high >> (2 * half) & 3u) << (4 * n + 2);
  }
  return kept;
}

// The same where rows are keys (from j0 on) and columns queries; `row` is the first call of query 2t. Lanes of four
// neighbouring keys share the four calls of (query, half), make one each and exchange bits.
template <int N>
__device__ inline uint32_t kept_by_key(const AttentionDropout& dropout, uint64_t now, uint64_t row, int64_t j0) {
  const int g = threadIdx.x % 32 / 4, x = g % 4;  // x = 2 half + e
  const uint64_t own = row + static_cast<uint64_t>(x % 2 * dropout.row_calls + (j0 + g + x / 2 * 8) / 4);
  uint32_t kept = 0;
#pragma unroll 2  // all at once would take registers from the accumulators
  for (int n = 0; n < N / 8; ++n)
    kept |= exchange_kept(dropout.kept(own + static_cast<uint64_t>(8 * n * dropout.row_calls), now), x, 4) << (4 * n);
  return kept;
}

template <int D, bool Drop>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(Strided<bf16> o, float* lse, Strided<const bf16> q, Strided<const bf16> k, Strided<const bf16> v,
                   TileView view, AttentionDropout dropout, float scale, HeadShape shape, int64_t tiles) {
  constexpr int N = 64, kTileSize = N * (D + 8);
  extern __shared__ __align__(16) bf16 shared_rows[];
  bf16* sq = shared_rows;
  bf16* skv = sq + kTileSize;  // k, v of stage 0, k, v of stage 1
  const int64_t units = shape.b * shape.hq, unit = blockIdx.x % units, lq = view.mask.lq, lk = view.mask.lk;
  const int64_t i0 = (tiles - 1 - blockIdx.x / units) * kRows, i1 = min(lq, i0 + kRows);  // longest first
  const int64_t b = unit / shape.hq, h = unit % shape.hq, hk = h / shape.group;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const Scale to_score(scale, view, h);

  const auto load_keys = [&](int stage, int64_t kb) {
    const int64_t j0 = kb * N;
    load_tile<N, D>(skv + stage * 2 * kTileSize, k.at(b, j0, hk), k.row, lk - j0);
    load_tile<N, D>(skv + (stage * 2 + 1) * kTileSize, v.at(b, j0, hk), v.row, lk - j0);
    copy_commit();
  };

  const uint64_t now = Drop ? static_cast<uint64_t>(*dropout.step) : 0;
  const uint64_t calls = Drop ? dropout.row(b, h, i0 + warp * 16 + g) : 0;
  float acc[D / 8][4] = {}, m[2] = {-INFINITY, -INFINITY}, l[2] = {0, 0};
  const int64_t end = (view.mask.key_end(b, i1 - 1) + N - 1) / N;
  int64_t kb = next_tile(view, b, i0, view.mask.key_begin(b, i0) / N, end, N);
  load_tile<kRows, D>(sq, q.at(b, i0, h), q.row, lq - i0);
  if (kb < end) load_keys(0, kb);
  for (int stage = 0; kb < end; stage ^= 1) {
    const int64_t j0 = kb * N;
    kb = next_tile(view, b, i0, kb + 1, end, N);
    if (kb < end) {
      load_keys(stage ^ 1, kb);
      copy_wait<1>();
    } else {
      copy_wait<0>();
    }
    __syncthreads();
    const bf16* sk = skv + stage * 2 * kTileSize;
    float s[N / 8][4];
    multiply_rows<N, D>(s, sq, warp * 16, sk);
    [[maybe_unused]] const uint32_t kept = Drop ? kept_by_query<N>(dropout, now, calls, j0) : 0;

    const bool plain = to_score.plain && view.full(b, i0, i1, j0, j0 + N);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (plain) {
#pragma unroll
        for (int n = 0; n < N / 8; ++n) {
          s[n][2 * half] *= to_score.scale_log2;
          s[n][2 * half + 1] *= to_score.scale_log2;
        }
      } else {
        const int64_t i = min(i0 + warp * 16 + g + 8 * half, lq - 1);
        const int64_t low = view.mask.key_begin(b, i), high = view.mask.key_end(b, i), p = view.mask.position(b, i);
#pragma unroll
        for (int n = 0; n < N / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int64_t j = j0 + n * 8 + 2 * t + e;
            const bool seen = j >= low && j < high && view.same_document(b, i, j);
            s[n][2 * half + e] = seen ? to_score(s[n][2 * half + e], p, j) : -INFINITY;
          }
        }
      }
      float top = m[half];
#pragma unroll
      for (int n = 0; n < N / 8; ++n) top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      const float shift = top == -INFINITY ? 0.0f : top, shrink = exp2f(m[half] - shift);
      m[half] = top;
      l[half] *= shrink;
#pragma unroll
      for (int n = 0; n < N / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[n][2 * half + e];
          x = exp2f(x - shift);
          l[half] += x;
          if (Drop && !(kept >> (4 * n + 2 * half + e) & 1u)) x = 0.0f;
        }
      }
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        acc[n][2 * half] *= shrink;
        acc[n][2 * half + 1] *= shrink;
      }
    }
    accumulate_tile<N, D>(acc, s, sk + kTileSize);
    __syncthreads();
  }
  copy_commit();  // the queries of a block without keys
  copy_wait<0>();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = l[half];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    const int64_t i = i0 + warp * 16 + g + 8 * half;
    if (i >= lq) continue;
    store_row<D>(o.at(b, i, h), acc, half, sum > 0 ? (Drop ? static_cast<float>(dropout.keep_scale) : 1.0f) / sum : 0.0f);
    if (t == 0) lse[unit * lq + i] = sum > 0 ? m[half] * kLn2 + logf(sum) : -INFINITY;
  }
}

// dk, dv: rows are keys, columns are the queries of all heads of the group.
template <int D, int N, bool Drop>
__global__ void __launch_bounds__(kThreads)
    backward_keys_kernel(Strided<bf16> dk, Strided<bf16> dv, Strided<const bf16> do_, Strided<const bf16> q,
                         Strided<const bf16> k, Strided<const bf16> v, const float* lse, const float* delta,
                         TileView view, AttentionDropout dropout, float scale, HeadShape shape) {
  constexpr int kRowTile = kRows * (D + 8), kColumnTile = N * (D + 8);
  extern __shared__ __align__(16) bf16 shared_rows[];
  bf16* sk = shared_rows;
  bf16* sv = sk + kRowTile;
  bf16* sq = sv + kRowTile;  // q, do of stage 0, q, do of stage 1
  __shared__ float s_lse[2][N], s_delta[2][N];
  const int64_t units = shape.b * shape.hkv, unit = blockIdx.x % units, lq = view.mask.lq, lk = view.mask.lk;
  const int64_t j0 = blockIdx.x / units * kRows, j1 = min(lk, j0 + kRows), b = unit / shape.hkv, hk = unit % shape.hkv;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int64_t first = view.mask.query_begin(b, j0) / N, last = (view.mask.query_end(b, j1) + N - 1) / N;
  const int64_t last_head = (hk + 1) * shape.group;

  // The tile after (h, tile - 1): first the tiles of one head, then the next head.
  const auto advance = [&](int64_t& h, int64_t& tile) {
    while (h < last_head) {
      while (tile < last && view.skip(b, tile * N, j0)) ++tile;
      if (tile < last) return;
      ++h;
      tile = first;
    }
  };
  const auto load_queries = [&](int stage, int64_t h, int64_t tile) {
    const int64_t i0 = tile * N;
    load_tile<N, D>(sq + stage * 2 * kColumnTile, q.at(b, i0, h), q.row, lq - i0);
    load_tile<N, D>(sq + (stage * 2 + 1) * kColumnTile, do_.at(b, i0, h), do_.row, lq - i0);
    copy_commit();
    if (threadIdx.x < N) {
      const int64_t i = i0 + threadIdx.x, at = (b * shape.hq + h) * lq + i;
      s_lse[stage][threadIdx.x] = i < lq ? lse[at] * kLog2e : INFINITY;  // P = 0 beyond the end
      s_delta[stage][threadIdx.x] = i < lq ? delta[at] : 0.0f;
    }
  };

  const uint64_t now = Drop ? static_cast<uint64_t>(*dropout.step) : 0;
  [[maybe_unused]] const float keep_scale = Drop ? static_cast<float>(dropout.keep_scale) : 1.0f;
  float dk_acc[D / 8][4] = {}, dv_acc[D / 8][4] = {};
  load_tile<kRows, D>(sk, k.at(b, j0, hk), k.row, lk - j0);
  load_tile<kRows, D>(sv, v.at(b, j0, hk), v.row, lk - j0);
  int64_t h = hk * shape.group, tile = first;
  advance(h, tile);
  if (h < last_head) load_queries(0, h, tile);
  for (int stage = 0; h < last_head; stage ^= 1) {
    const int64_t i0 = tile * N;
    const Scale to_score(scale, view, h);
    const uint64_t calls = Drop ? dropout.row(b, h, i0 + 2 * t) : 0;
    ++tile;
    advance(h, tile);
    if (h < last_head) {
      load_queries(stage ^ 1, h, tile);
      copy_wait<1>();
    } else {
      copy_wait<0>();
    }
    __syncthreads();
    const bf16* tq = sq + stage * 2 * kColumnTile;
    const bf16* tdo = tq + kColumnTile;
    const bool plain = to_score.plain && view.full(b, i0, min(lq, i0 + N), j0, j0 + kRows);
    float p[N / 8][4], ds[N / 8][4];
    multiply_rows<N, D>(p, sk, warp * 16, tq);
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int c = n * 8 + 2 * t + e;
        const float shift = s_lse[stage][c];
        if (plain) {
          p[n][e] = exp2f(p[n][e] * to_score.scale_log2 - shift);
          p[n][2 + e] = exp2f(p[n][2 + e] * to_score.scale_log2 - shift);
        } else {
          const int64_t i = min(i0 + c, lq - 1), position = view.mask.position(b, i);
          const int64_t low = view.mask.key_begin(b, i), high = view.mask.key_end(b, i);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int64_t j = j0 + warp * 16 + g + 8 * half;
            float& x = p[n][2 * half + e];
            const bool seen = j >= low && j < high && view.same_document(b, i, j);
            x = seen ? exp2f(to_score(x, position, j) - shift) : 0.0f;
          }
        }
      }
    }
    [[maybe_unused]] const uint32_t kept = Drop ? kept_by_key<N>(dropout, now, calls, j0 + warp * 16) : 0;
    if constexpr (Drop) {
      float dropped[N / 8][4];
#pragma unroll
      for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) dropped[n][e] = kept >> (4 * n + e) & 1u ? p[n][e] : 0.0f;
      accumulate_tile<N, D>(dv_acc, dropped, tdo);
    } else {
      accumulate_tile<N, D>(dv_acc, p, tdo);
    }
    multiply_rows<N, D>(ds, sv, warp * 16, tdo);
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if constexpr (Drop) ds[n][e] = kept >> (4 * n + e) & 1u ? ds[n][e] * keep_scale : 0.0f;
        ds[n][e] = p[n][e] * (ds[n][e] - s_delta[stage][n * 8 + 2 * t + e % 2]);
      }
    }
    accumulate_tile<N, D>(dk_acc, ds, tq);
    __syncthreads();
  }
  copy_commit();
  copy_wait<0>();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t j = j0 + warp * 16 + g + 8 * half;
    if (j >= lk) continue;
    store_row<D>(dk.at(b, j, hk), dk_acc, half, scale);
    store_row<D>(dv.at(b, j, hk), dv_acc, half, keep_scale);
  }
}

// dq: rows are queries, columns are keys.
template <int D, bool Drop>
__global__ void __launch_bounds__(kThreads)
    backward_queries_kernel(Strided<bf16> dq, Strided<const bf16> do_, Strided<const bf16> q, Strided<const bf16> k,
                            Strided<const bf16> v, const float* lse, const float* delta, TileView view,
                            AttentionDropout dropout, float scale, HeadShape shape, int64_t tiles) {
  constexpr int N = 64, kTileSize = N * (D + 8);
  extern __shared__ __align__(16) bf16 shared_rows[];
  bf16* sq = shared_rows;
  bf16* sdo = sq + kTileSize;
  bf16* skv = sdo + kTileSize;  // k, v of stage 0, k, v of stage 1
  const int64_t units = shape.b * shape.hq, unit = blockIdx.x % units, lq = view.mask.lq, lk = view.mask.lk;
  const int64_t i0 = (tiles - 1 - blockIdx.x / units) * kRows, i1 = min(lq, i0 + kRows);
  const int64_t b = unit / shape.hq, h = unit % shape.hq, hk = h / shape.group;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const Scale to_score(scale, view, h);

  const auto load_keys = [&](int stage, int64_t kb) {
    const int64_t j0 = kb * N;
    load_tile<N, D>(skv + stage * 2 * kTileSize, k.at(b, j0, hk), k.row, lk - j0);
    load_tile<N, D>(skv + (stage * 2 + 1) * kTileSize, v.at(b, j0, hk), v.row, lk - j0);
    copy_commit();
  };

  const uint64_t now = Drop ? static_cast<uint64_t>(*dropout.step) : 0;
  const uint64_t calls = Drop ? dropout.row(b, h, i0 + warp * 16 + g) : 0;
  [[maybe_unused]] const float keep_scale = static_cast<float>(dropout.keep_scale);
  float acc[D / 8][4] = {}, row_lse[2], row_delta[2];
  int64_t row[2], low[2], high[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    row[half] = min(i0 + warp * 16 + g + 8 * half, lq - 1);
    row_lse[half] = lse[unit * lq + row[half]] * kLog2e;
    row_delta[half] = delta[unit * lq + row[half]];
    low[half] = view.mask.key_begin(b, row[half]);
    high[half] = view.mask.key_end(b, row[half]);
  }
  const int64_t end = (view.mask.key_end(b, i1 - 1) + N - 1) / N;
  int64_t kb = next_tile(view, b, i0, view.mask.key_begin(b, i0) / N, end, N);
  load_tile<kRows, D>(sq, q.at(b, i0, h), q.row, lq - i0);
  load_tile<kRows, D>(sdo, do_.at(b, i0, h), do_.row, lq - i0);
  if (kb < end) load_keys(0, kb);
  for (int stage = 0; kb < end; stage ^= 1) {
    const int64_t j0 = kb * N;
    kb = next_tile(view, b, i0, kb + 1, end, N);
    if (kb < end) {
      load_keys(stage ^ 1, kb);
      copy_wait<1>();
    } else {
      copy_wait<0>();
    }
    __syncthreads();
    const bf16* sk = skv + stage * 2 * kTileSize;
    const bool plain = to_score.plain && view.full(b, i0, i1, j0, j0 + N);
    float s[N / 8][4], ds[N / 8][4];
    multiply_rows<N, D>(s, sq, warp * 16, sk);
    multiply_rows<N, D>(ds, sdo, warp * 16, sk + kTileSize);
    [[maybe_unused]] const uint32_t kept = Drop ? kept_by_query<N>(dropout, now, calls, j0) : 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t p = view.mask.position(b, row[half]);
#pragma unroll
      for (int n = 0; n < N / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[n][2 * half + e];
          if (plain) {
            x = exp2f(x * to_score.scale_log2 - row_lse[half]);
          } else {
            const int64_t j = j0 + n * 8 + 2 * t + e;
            const bool seen = j >= low[half] && j < high[half] && view.same_document(b, row[half], j);
            x = seen ? exp2f(to_score(x, p, j) - row_lse[half]) : 0.0f;
          }
          float& y = ds[n][2 * half + e];
          if constexpr (Drop) y = kept >> (4 * n + 2 * half + e) & 1u ? y * keep_scale : 0.0f;
          y = x * (y - row_delta[half]);
        }
      }
    }
    accumulate_tile<N, D>(acc, ds, sk);
    __syncthreads();
  }
  copy_commit();
  copy_wait<0>();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t i = i0 + warp * 16 + g + 8 * half;
    if (i < lq) store_row<D>(dq.at(b, i, h), acc, half, scale);
  }
}

template <class F>
void visit_head_size(int64_t d, F&& f) {
  switch (d) {
    case 32: return f.template operator()<32>();
    case 64: return f.template operator()<64>();
    case 96: return f.template operator()<96>();
    case 128: return f.template operator()<128>();
    default: KRAIT_ASSERT(false, "no tensor-core attention for d = {}", d);
  }
}

constexpr int64_t tile_bytes(int64_t rows, int64_t d) { return rows * (d + 8) * 2; }

}  // namespace

bool attention_mma_serves(const Tensor& t) {
  const int64_t d = t.size(-1);
  if (t.dtype() != DType::bf16 || (d != 32 && d != 64 && d != 96 && d != 128)) return false;
  if (reinterpret_cast<uintptr_t>(t.raw_data()) % 16 != 0) return false;
  for (int64_t i = 0; i < 3; ++i)
    if (t.stride(i) % 8 != 0) return false;
  return true;
}

void attention_forward_mma(Tensor& o, Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                           const AttentionOptions& options) {
  const HeadShape shape(q, k);
  const View view(q, k, options);
  const AttentionDropout dropout(q, k, options);
  visit_head_size(shape.d, [&]<int D>() {
    const int64_t tiles = ceil_div(q.size(1), kRows);
    visit_dropout(dropout, [&]<bool Drop>() {
      launch(forward_kernel<D, Drop>,
             {.grid = tiles * shape.b * shape.hq, .block = kThreads, .shared = 5 * tile_bytes(64, D),
              .stream = current_stream(q.device())},
             Strided<bf16>(o), lse.data<float>(), Strided<const bf16>(q), Strided<const bf16>(k),
             Strided<const bf16>(v), view.tiles, dropout, options.scale, shape, tiles);
    });
  });
}

void attention_backward_mma(Tensor& dq, Tensor& dk, Tensor& dv, const Tensor& do_, const Tensor& q, const Tensor& k,
                            const Tensor& v, const Tensor& lse, const Tensor& delta, const AttentionOptions& options) {
  const HeadShape shape(q, k);
  const View view(q, k, options);
  const AttentionDropout dropout(q, k, options);
  const Stream stream = current_stream(q.device());
  visit_head_size(shape.d, [&]<int D>() {
    constexpr int N = D > 64 ? 32 : 64;  // registers: two (16, D) sums and two (16, N) tiles a warp
    const int64_t q_tiles = ceil_div(q.size(1), kRows), k_tiles = ceil_div(k.size(1), kRows);
    visit_dropout(dropout, [&]<bool Drop>() {
      launch(backward_keys_kernel<D, N, Drop>,
             {.grid = k_tiles * shape.b * shape.hkv, .block = kThreads,
              .shared = 2 * tile_bytes(kRows, D) + 4 * tile_bytes(N, D), .stream = stream},
             Strided<bf16>(dk), Strided<bf16>(dv), Strided<const bf16>(do_), Strided<const bf16>(q),
             Strided<const bf16>(k), Strided<const bf16>(v), lse.data<float>(), delta.data<float>(), view.tiles,
             dropout, options.scale, shape);
      launch(backward_queries_kernel<D, Drop>,
             {.grid = q_tiles * shape.b * shape.hq, .block = kThreads, .shared = 6 * tile_bytes(64, D),
              .stream = stream},
             Strided<bf16>(dq), Strided<const bf16>(do_), Strided<const bf16>(q), Strided<const bf16>(k),
             Strided<const bf16>(v), lse.data<float>(), delta.data<float>(), view.tiles, dropout, options.scale, shape,
             q_tiles);
    });
  });
}

}  // namespace krait::kernels::cuda
