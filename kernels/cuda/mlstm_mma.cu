// mLSTM in bf16 on tensor cores: blocks of 4 warps, 16 rows each. Sums, gates and n are fp32; the states between
// chunks are summed in fp32 and handed over in bf16.
#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/block_reduce.cuh"
#include "kernels/cuda/mlstm_common.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kPitch = 64 + 8;  // of tiles 64 wide

/// Rows [0, N) and columns [0, D) from `from` on into shared memory with pitch D + 8; zeros for rows from `rows` and
/// columns from `columns` (a multiple of 8) on.
template <int N, int D>
__device__ inline void load_part(bf16* to, const bf16* from, int64_t row, int64_t rows, int columns) {
  for (int at = threadIdx.x; at < N * (D / 8); at += kThreads) {
    const int r = at / (D / 8), c = at % (D / 8) * 8;
    const bool valid = r < rows && c < columns;
    copy_async(to + r * (D + 8) + c, valid ? from + r * row + c : from, valid);
  }
}

/// s (16, N) += rows of a from r0 times b^T; a (., 64), b (N, 64).
template <int N>
__device__ inline void add_rows(float (&s)[N / 8][4], const bf16* a, int r0, const bf16* b) {
  const int lane = threadIdx.x % 32, m = lane / 8, r = lane % 8;
#pragma unroll
  for (int x = 0; x < 4; ++x) {
    uint32_t fa[4];
    load_matrices(fa, a + (r0 + m % 2 * 8 + r) * kPitch + x * 16 + m / 2 * 8);
#pragma unroll
    for (int n = 0; n < N / 16; ++n) {
      uint32_t fb[4];
      load_matrices(fb, b + (n * 16 + m / 2 * 8 + r) * kPitch + x * 16 + m % 2 * 8);
      mma(s[2 * n], fa, fb[0], fb[1]);
      mma(s[2 * n + 1], fa, fb[2], fb[3]);
    }
  }
}

/// acc (16, W) += rows of a from r0 times b; a (., 64), b (64, W).
template <int W>
__device__ inline void add_columns(float (&acc)[W / 8][4], const bf16* a, int r0, const bf16* b) {
  const int lane = threadIdx.x % 32, m = lane / 8, r = lane % 8;
#pragma unroll
  for (int x = 0; x < 4; ++x) {
    uint32_t fa[4];
    load_matrices(fa, a + (r0 + m % 2 * 8 + r) * kPitch + x * 16 + m / 2 * 8);
#pragma unroll
    for (int n = 0; n < W / 16; ++n) {
      uint32_t fb[4];
      load_matrices_transposed(fb, b + (x * 16 + m % 2 * 8 + r) * (W + 8) + n * 16 + m / 2 * 8);
      mma(acc[2 * n], fa, fb[0], fb[1]);
      mma(acc[2 * n + 1], fa, fb[2], fb[3]);
    }
  }
}

/// Two neighbouring values times their weights.
__device__ inline uint32_t weighted(uint32_t two, float low, float high) {
  return pack(__uint_as_float(two << 16) * low, __uint_as_float(two & 0xffff0000u) * high);
}

/// Sum over the four lanes that share a row.
__device__ inline float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// 64 x 64 of a state, carried through all chunks. The next chunk's rows arrive while this one's are multiplied.
__global__ void __launch_bounds__(kThreads) states_kernel(MlstmStateJob<bf16> job) {
  constexpr int kTile = kChunk * kPitch;
  extern __shared__ __align__(16) bf16 shared_rows[];  // a, b of stage 0, a, b of stage 1
  __shared__ float s_wc[2][kChunk], s_wn[2][kChunk], reduce[32];
  const MlstmShape& s = job.shape;
  const int64_t unit = blockIdx.x / job.tiles, tile = blockIdx.x % job.tiles;
  const int64_t v_tiles = (s.dv + kStateTile - 1) / kStateTile, b = unit / s.heads, h = unit % s.heads;
  const int a0 = static_cast<int>(tile / v_tiles) * kStateTile, b0 = static_cast<int>(tile % v_tiles) * kStateTile;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4, m = lane / 8, r = lane % 8;
  const int na = a0 + threadIdx.x;  // of n
  const bool has_n = b0 == 0 && threadIdx.x < kStateTile && na < s.dq;
  const int64_t size = int64_t{s.dq} * s.dv;

  const auto load = [&](int stage, int64_t x) {
    const int64_t t0 = x * kChunk, rows = min(int64_t{kChunk}, s.l - t0);
    bf16* to = shared_rows + stage * 2 * kTile;
    load_part<kChunk, 64>(to, job.a.at(b, t0, h) + a0, job.a.row, rows, s.dq - a0);
    load_part<kChunk, 64>(to + kTile, job.b.at(b, t0, h) + b0, job.b.row, rows, s.dv - b0);
    copy_commit();
    if (threadIdx.x < kChunk) {
      const bool valid = threadIdx.x < rows;
      s_wc[stage][threadIdx.x] = valid ? job.wc[unit * s.l + t0 + threadIdx.x] : 0.0f;
      s_wn[stage][threadIdx.x] = valid ? job.wn[unit * s.l + t0 + threadIdx.x] : 0.0f;
    }
  };
  // Calls f(value, index in the state) for the thread's values inside it; pairs of columns are neighbours.
  float c[8][4] = {}, n = 0;
  const auto each_pair = [&](auto&& f) {
#pragma unroll
    for (int y = 0; y < 8; ++y)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = a0 + warp * 16 + g + 8 * half, column = b0 + y * 8 + 2 * t;
        if (row < s.dq && column < s.dv) f(c[y][2 * half], c[y][2 * half + 1], int64_t{row} * s.dv + column);
      }
  };
  if (job.c_begin)
    each_pair([&](float& x0, float& x1, int64_t cell) {
      x0 = job.c_begin[unit * size + cell];
      x1 = job.c_begin[unit * size + cell + 1];
    });
  if (job.n_begin && has_n) n = job.n_begin[unit * s.dq + na];

  const auto chunk_of = [&](int64_t step) { return job.reverse ? s.chunks - 1 - step : step; };
  load(0, chunk_of(0));
  for (int64_t step = 0; step < s.chunks; ++step) {
    const int stage = static_cast<int>(step % 2);
    const int64_t x = chunk_of(step), at = unit * s.chunks + x;
    if (step + 1 < s.chunks) {
      load(stage ^ 1, chunk_of(step + 1));
      copy_wait<1>();
    } else {
      copy_wait<0>();
    }
    float flow = 0;
    each_pair([&](float& x0, float& x1, int64_t cell) {
      *reinterpret_cast<uint32_t*>(job.states + at * size + cell) = pack(x0, x1);
      if (!job.flow) return;
      if (x + 1 < s.chunks) {
        const bf16* other = job.forward_states + (at + 1) * size + cell;
        flow += x0 * static_cast<float>(other[0]) + x1 * static_cast<float>(other[1]);
      } else {
        flow += x0 * job.c_last[unit * size + cell] + x1 * job.c_last[unit * size + cell + 1];
      }
    });
    if (has_n) {
      job.n_states[at * s.dq + na] = n;
      if (job.flow) flow += n * (x + 1 < s.chunks ? job.forward_n[(at + 1) * s.dq + na] : job.n_last[unit * s.dq + na]);
    }
    if (job.flow) {
      flow = block_reduce(flow, reduce, [](float p, float q) { return p + q; });
      if (threadIdx.x == 0) job.flow[at * job.tiles + tile] = flow;
    }
    const float decay = job.decay[at];
    n *= decay;
#pragma unroll
    for (int y = 0; y < 8; ++y)
#pragma unroll
      for (int e = 0; e < 4; ++e) c[y][e] *= decay;

    __syncthreads();  // the stage is here
    const bf16* ta = shared_rows + stage * 2 * kTile;
    const bf16* tb = ta + kTile;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t fa[4];  // (dq, positions): a transposed
      load_matrices_transposed(fa, ta + (k * 16 + m / 2 * 8 + r) * kPitch + warp * 16 + m % 2 * 8);
      const float* w = s_wc[stage] + k * 16 + 2 * t;
      fa[0] = weighted(fa[0], w[0], w[1]);
      fa[1] = weighted(fa[1], w[0], w[1]);
      fa[2] = weighted(fa[2], w[8], w[9]);
      fa[3] = weighted(fa[3], w[8], w[9]);
#pragma unroll
      for (int y = 0; y < 4; ++y) {
        uint32_t fb[4];
        load_matrices_transposed(fb, tb + (k * 16 + m % 2 * 8 + r) * kPitch + y * 16 + m / 2 * 8);
        mma(c[2 * y], fa, fb[0], fb[1]);
        mma(c[2 * y + 1], fa, fb[2], fb[3]);
      }
    }
    if (has_n)
      for (int j = 0; j < kChunk; ++j) n += s_wn[stage][j] * static_cast<float>(ta[j * kPitch + threadIdx.x]);
    __syncthreads();  // before the stage is filled again
  }
  if (job.c_end)
    each_pair([&](float& x0, float& x1, int64_t cell) {
      job.c_end[unit * size + cell] = x0;
      job.c_end[unit * size + cell + 1] = x1;
    });
  if (job.n_end && has_n) job.n_end[unit * s.dq + na] = n;
}

// W columns of a chunk's result; see Mix.
template <Mix M, int W>
__global__ void __launch_bounds__(kThreads) mix_kernel(MlstmMixJob<bf16> job) {
  constexpr int kTile = kChunk * kPitch, kValues = kChunk * (W + 8), kState = is_turned(M) ? W * kPitch : kValues;
  extern __shared__ __align__(16) bf16 shared_rows[];
  bf16* sr = shared_rows;    // (64, 64): a slice of the rows' depth
  bf16* sc = sr + kTile;     // of the columns'
  bf16* ss = sc + kTile;     // of the state: (64, W), turned (W, 64)
  bf16* sv = ss + kState;    // (64, W): values
  __shared__ float s_c[kChunk], s_u[kChunk], s_inverse[kChunk], s_dr[kChunk], s_row[kChunk], s_row_n[kChunk], s_n[W];
  __shared__ int s_first[kChunk];

  const MlstmShape& s = job.shape;
  const int64_t chunk = blockIdx.x / job.tiles, unit = chunk / s.chunks, t0 = chunk % s.chunks * kChunk;
  const int w0 = static_cast<int>(blockIdx.x % job.tiles) * W, n = static_cast<int>(min(int64_t{kChunk}, s.l - t0));
  const int64_t b = unit / s.heads, h = unit % s.heads;
  const int depth = is_turned(M) ? s.dv : s.dq, width = is_turned(M) ? s.dq : s.dv;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const bf16* state = job.states + chunk * s.dq * s.dv;
  const float* n_state = job.n_states + chunk * s.dq;

  if (threadIdx.x < kChunk) {
    const int i = threadIdx.x;
    const int64_t row = unit * s.l + t0 + i;
    const bool valid = i < n;
    s_c[i] = valid ? job.gates.c[row] : 0.0f;
    s_u[i] = valid ? job.gates.u[row] : 0.0f;
    s_first[i] = valid ? job.gates.first[row] : kChunk;
    s_inverse[i] = valid && M != Mix::read ? job.gates.inverse[row] : 0.0f;
    s_dr[i] = valid && is_turned(M) ? job.gates.dr[row] : 0.0f;
    float own = 0;  // weight of the state
    if (valid) own = M == Mix::read ? job.scale * job.gates.inter[row] : M == Mix::dq ? job.gates.wc[row] : job.gates.w[row];
    s_row[i] = own;
    s_row_n[i] = valid && M == Mix::dq ? job.gates.wn[row] : own;
  }
  if constexpr (is_turned(M))
    for (int c = threadIdx.x; c < W; c += kThreads) s_n[c] = w0 + c < width ? n_state[w0 + c] : 0.0f;

  load_part<kChunk, W>(sv, job.values.at(b, t0, h) + w0, job.values.row, n, width - w0);
  float x[8][4] = {}, acc[W / 8][4] = {};
  [[maybe_unused]] float row_n[2] = {0, 0};
  for (int d0 = 0; d0 < depth; d0 += 64) {
    __syncthreads();
    load_part<kChunk, 64>(sr, job.rows.at(b, t0, h) + d0, job.rows.row, n, depth - d0);
    load_part<kChunk, 64>(sc, job.columns.at(b, t0, h) + d0, job.columns.row, n, depth - d0);
    if constexpr (is_turned(M))
      load_part<W, 64>(ss, state + int64_t{w0} * s.dv + d0, s.dv, width - w0, depth - d0);
    else
      load_part<64, W>(ss, state + int64_t{d0} * s.dv + w0, s.dv, depth - d0, width - w0);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    add_rows<64>(x, sr, warp * 16, sc);
    if constexpr (is_turned(M))
      add_rows<W>(acc, sr, warp * 16, ss);
    else
      add_columns<W>(acc, sr, warp * 16, ss);
    if constexpr (M == Mix::read) {
      for (int k = t; k < 64 && d0 + k < depth; k += 4) {
        const float nk = n_state[d0 + k];
        row_n[0] += static_cast<float>(sr[(warp * 16 + g) * kPitch + k]) * nk;
        row_n[1] += static_cast<float>(sr[(warp * 16 + g + 8) * kPitch + k]) * nk;
      }
    }
  }

  // Products of rows and columns to coefficients; the state's part gets its weight.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp * 16 + g + 8 * half;
#pragma unroll
    for (int y = 0; y < 8; ++y)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = y * 8 + 2 * t + e, at = rows_are_keys(M) ? column : row, key = rows_are_keys(M) ? row : column;
        const bool inside = row < n && column < n;
        const float weight = inside ? job.scale * seen_weight(s_c[key], s_u[at], s_first[at], key, at) : 0.0f;
        float value = x[y][2 * half + e];
        if constexpr (is_turned(M)) value = s_inverse[at] * value + s_dr[at];
        if constexpr (M == Mix::dv) value *= s_inverse[at];
        x[y][2 * half + e] = weight == 0.0f ? 0.0f : weight * value;
      }
#pragma unroll
    for (int y = 0; y < W / 8; ++y)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& a = acc[y][2 * half + e];
        a *= s_row[row];
        if constexpr (is_turned(M)) a += s_row_n[row] * s_n[y * 8 + 2 * t + e];
      }
  }
  [[maybe_unused]] float factor[2] = {1, 1};
  if constexpr (M == Mix::read) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp * 16 + g + 8 * half;
      float r = s_row[row] * row_n[half];
#pragma unroll
      for (int y = 0; y < 8; ++y) r += x[y][2 * half] + x[y][2 * half + 1];
      r = row_sum(r);
      if (row >= n) continue;
      const int64_t at = unit * s.l + t0 + row;
      factor[half] = 1.0f / mlstm_denominator(r, job.m[at], job.eps);
      if (w0 == 0 && t == 0) job.r[at] = r;
    }
  }
  accumulate_tile<64, W>(acc, x, sv);

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp * 16 + g + 8 * half;
    [[maybe_unused]] float dot = 0;
    if (row < n) {
      const int64_t at = ((b * s.l + t0 + row) * s.heads + h) * width + w0;
      const bf16* own = job.own.at(b, t0 + row, h) + w0;
#pragma unroll
      for (int y = 0; y < W / 8; ++y) {
        const int column = y * 8 + 2 * t;
        if (w0 + column >= width) continue;
        const float low = acc[y][2 * half], high = acc[y][2 * half + 1];
        if constexpr (M == Mix::read)
          *reinterpret_cast<float2*>(job.h + at + column) = make_float2(low * factor[half], high * factor[half]);
        else
          *reinterpret_cast<uint32_t*>(job.out + at + column) = pack(low, high);
        if constexpr (is_turned(M)) dot += low * static_cast<float>(own[column]) + high * static_cast<float>(own[column + 1]);
      }
    }
    if constexpr (is_turned(M)) {
      dot = row_sum(dot);
      if (t == 0 && row < n) job.dots[(unit * s.l + t0 + row) * job.tiles + w0 / W] = dot;
    }
  }
}

template <Mix M>
void launch_mix(const MlstmMixJob<bf16>& job, Stream stream) {
  const int64_t width = is_turned(M) ? job.shape.dq : job.shape.dv;
  const auto with = [&]<int W>() {
    const int64_t state = is_turned(M) ? W * kPitch : kChunk * (W + 8);
    launch(mix_kernel<M, W>,
           {.grid = job.shape.units * job.shape.chunks * job.tiles, .block = kThreads,
            .shared = 2 * (2 * kChunk * kPitch + state + kChunk * (W + 8)), .stream = stream},
           job);
  };
  if (mlstm_tile_width(true, width) == 128)
    with.template operator()<128>();
  else
    with.template operator()<64>();
}

}  // namespace

bool mlstm_mma_serves(const Tensor& t) {
  if (t.dtype() != DType::bf16 || t.size(-1) % 8 != 0 || reinterpret_cast<uintptr_t>(t.raw_data()) % 16 != 0) return false;
  for (int64_t i = 0; i < 3; ++i)
    if (t.size(i) > 1 && t.stride(i) % 8 != 0) return false;
  return true;
}

void mlstm_states_mma(const MlstmStateJob<bf16>& job, Stream stream) {
  launch(states_kernel, {.grid = job.shape.units * job.tiles, .block = kThreads, .shared = 2 * 4 * kChunk * kPitch,
                         .stream = stream}, job);
}

void mlstm_mix_mma(Mix mix, const MlstmMixJob<bf16>& job, Stream stream) {
  switch (mix) {
    case Mix::read: return launch_mix<Mix::read>(job, stream);
    case Mix::dv: return launch_mix<Mix::dv>(job, stream);
    case Mix::dq: return launch_mix<Mix::dq>(job, stream);
    case Mix::dk: return launch_mix<Mix::dk>(job, stream);
  }
}

}  // namespace krait::kernels::cuda
