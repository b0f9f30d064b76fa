// mLSTM on CUDA cores: fp32, fp64, and bf16 of any width. Blocks of 256 threads make 64 x 64 values, 4 x 4 a thread.
#include "kernels/cuda/block_reduce.cuh"
#include "kernels/cuda/mlstm_common.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int kSlice = 16, kTileRows = 64, kStateTile = 64;

template <class T>
__global__ void __launch_bounds__(256, 1) states_kernel(MlstmStateJob<T> job) {
  using A = accum_t<T>;
  __shared__ A sa[kSlice][kStateTile], sb[kSlice][kStateTile], s_wc[kSlice], s_wn[kSlice], reduce[32];
  const MlstmShape& s = job.shape;
  const int64_t unit = blockIdx.x / job.tiles, tile = blockIdx.x % job.tiles;
  const int64_t v_tiles = (s.dv + kStateTile - 1) / kStateTile, b = unit / s.heads, h = unit % s.heads;
  const int a0 = static_cast<int>(tile / v_tiles) * kStateTile, b0 = static_cast<int>(tile % v_tiles) * kStateTile;
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const int na = a0 + threadIdx.x;  // of n
  const bool has_n = b0 == 0 && threadIdx.x < kStateTile && na < s.dq;
  const int64_t size = int64_t{s.dq} * s.dv;

  A c[4][4] = {}, n = 0;
  if (job.c_begin) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int x = a0 + ty * 4 + i, y = b0 + tx * 4 + j;
        if (x < s.dq && y < s.dv) c[i][j] = job.c_begin[unit * size + int64_t{x} * s.dv + y];
      }
  }
  if (job.n_begin && has_n) n = job.n_begin[unit * s.dq + na];

  for (int64_t step = 0; step < s.chunks; ++step) {
    const int64_t x = job.reverse ? s.chunks - 1 - step : step, at = unit * s.chunks + x;
    T* states = job.states + at * size;
    // The state behind the chunk: the one before the next, or the last.
    const T* other = job.flow && x + 1 < s.chunks ? job.forward_states + (at + 1) * size : nullptr;
    const A* last = job.flow && !other ? job.c_last + unit * size : nullptr;
    A flow = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int row = a0 + ty * 4 + i, column = b0 + tx * 4 + j, cell = row * s.dv + column;
        if (row >= s.dq || column >= s.dv) continue;
        states[cell] = static_cast<T>(c[i][j]);
        if (other) flow += c[i][j] * static_cast<A>(other[cell]);
        if (last) flow += c[i][j] * last[cell];
      }
    if (has_n) {
      job.n_states[at * s.dq + na] = n;
      if (job.flow) flow += n * (x + 1 < s.chunks ? job.forward_n[(at + 1) * s.dq + na] : job.n_last[unit * s.dq + na]);
    }
    if (job.flow) {
      flow = block_reduce(flow, reduce, [](A p, A q) { return p + q; });
      if (threadIdx.x == 0) job.flow[at * job.tiles + tile] = flow;
    }
    const A decay = job.decay[at];
    n *= decay;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) c[i][j] *= decay;

    const int64_t end = min(s.l, (x + 1) * kChunk);
    for (int64_t t0 = x * kChunk; t0 < end; t0 += kSlice) {
      __syncthreads();
      for (int k = threadIdx.x; k < kSlice * kStateTile; k += 256) {
        const int row = k / kStateTile, column = k % kStateTile;
        const bool valid = t0 + row < end;
        sa[row][column] = valid && a0 + column < s.dq ? static_cast<A>(job.a.at(b, t0 + row, h)[a0 + column]) : A{0};
        sb[row][column] = valid && b0 + column < s.dv ? static_cast<A>(job.b.at(b, t0 + row, h)[b0 + column]) : A{0};
      }
      if (threadIdx.x < kSlice) {
        const bool valid = t0 + threadIdx.x < end;
        s_wc[threadIdx.x] = valid ? job.wc[unit * s.l + t0 + threadIdx.x] : A{0};
        s_wn[threadIdx.x] = valid ? job.wn[unit * s.l + t0 + threadIdx.x] : A{0};
      }
      __syncthreads();
#pragma unroll 4
      for (int k = 0; k < kSlice; ++k) {
        A left[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) left[i] = s_wc[k] * sa[k][ty * 4 + i];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const A right = sb[k][tx * 4 + j];
#pragma unroll
          for (int i = 0; i < 4; ++i) c[i][j] += left[i] * right;
        }
      }
      if (has_n)
        for (int k = 0; k < kSlice; ++k) n += s_wn[k] * sa[k][threadIdx.x];
    }
  }
  if (job.c_end) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int x = a0 + ty * 4 + i, y = b0 + tx * 4 + j;
        if (x < s.dq && y < s.dv) job.c_end[unit * size + int64_t{x} * s.dv + y] = c[i][j];
      }
  }
  if (job.n_end && has_n) job.n_end[unit * s.dq + na] = n;
}

// The chunk's products; see Mix.
template <Mix M, class T>
__global__ void __launch_bounds__(256) mix_kernel(MlstmMixJob<T> job) {
  using A = accum_t<T>;
  constexpr int kPitch = kTileRows + 1;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  A* sr = reinterpret_cast<A*>(shared_bytes);  // (64, 16 + 1): a slice of the rows
  A* sc = sr + kTileRows * (kSlice + 1);       // of the columns
  A* ss = sc + kTileRows * (kSlice + 1);       // (16, 64): of the state, then of the values
  A* sw = ss + kSlice * kTileRows;             // (64, 64 + 1): coefficients
  __shared__ A s_c[kChunk], s_u[kChunk], s_inverse[kChunk], s_dr[kChunk], s_row[kChunk], s_sum[kChunk];
  __shared__ int s_first[kChunk];

  const MlstmShape& s = job.shape;
  const int64_t chunk = blockIdx.x / job.tiles, unit = chunk / s.chunks, t0 = chunk % s.chunks * kChunk;
  const int w0 = static_cast<int>(blockIdx.x % job.tiles) * 64, n = static_cast<int>(min(int64_t{kChunk}, s.l - t0));
  const int64_t b = unit / s.heads, h = unit % s.heads;
  const int depth = is_turned(M) ? s.dv : s.dq, width = is_turned(M) ? s.dq : s.dv;
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const T* state = job.states + chunk * s.dq * s.dv;
  const A* n_state = job.n_states + chunk * s.dq;

  if (threadIdx.x < kChunk) {
    const int t = threadIdx.x;
    const int64_t row = unit * s.l + t0 + t;
    const bool valid = t < n;
    s_c[t] = valid ? job.gates.c[row] : A{0};
    s_u[t] = valid ? job.gates.u[row] : A{0};
    s_first[t] = valid ? job.gates.first[row] : kChunk;
    s_inverse[t] = valid && M != Mix::read ? job.gates.inverse[row] : A{0};
    s_dr[t] = valid && is_turned(M) ? job.gates.dr[row] : A{0};
    A own = 0;  // of the state
    if (valid) own = M == Mix::read ? job.scale * job.gates.inter[row] : M == Mix::dq ? job.gates.wc[row] : job.gates.w[row];
    s_row[t] = own;
  }

  A x[4][4] = {}, acc[4][4] = {}, row_n = 0;
  for (int d0 = 0; d0 < depth; d0 += kSlice) {
    __syncthreads();
    for (int k = threadIdx.x; k < kTileRows * kSlice; k += 256) {
      const int row = k / kSlice, column = k % kSlice;
      const bool valid = row < n && d0 + column < depth;
      sr[row * (kSlice + 1) + column] = valid ? static_cast<A>(job.rows.at(b, t0 + row, h)[d0 + column]) : A{0};
      sc[row * (kSlice + 1) + column] = valid ? static_cast<A>(job.columns.at(b, t0 + row, h)[d0 + column]) : A{0};
    }
    for (int k = threadIdx.x; k < kSlice * 64; k += 256) {
      // The depth runs over the state's rows, or over its columns when turned: neighbouring threads read neighbours.
      const int d = is_turned(M) ? k % kSlice : k / 64, e = is_turned(M) ? k / kSlice : k % 64;
      const bool valid = d0 + d < depth && w0 + e < width;
      const int64_t cell = is_turned(M) ? int64_t{w0 + e} * s.dv + d0 + d : int64_t{d0 + d} * s.dv + w0 + e;
      ss[d * 64 + e] = valid ? static_cast<A>(state[cell]) : A{0};
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kSlice; ++k) {
      A left[4], right[4], below[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        left[i] = sr[(ty * 4 + i) * (kSlice + 1) + k];
        right[i] = sc[(tx * 4 + i) * (kSlice + 1) + k];
        below[i] = ss[k * 64 + tx * 4 + i];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          x[i][j] += left[i] * right[j];
          acc[i][j] += left[i] * below[j];
        }
    }
    if (M == Mix::read && threadIdx.x < kChunk)
      for (int k = 0; k < kSlice && d0 + k < depth; ++k) row_n += sr[threadIdx.x * (kSlice + 1) + k] * n_state[d0 + k];
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = ty * 4 + i;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int column = tx * 4 + j, t = rows_are_keys(M) ? column : row, key = rows_are_keys(M) ? row : column;
      const bool inside = row < n && column < n;
      const A e = inside ? job.scale * seen_weight(s_c[key], s_u[t], s_first[t], key, t) : A{0};
      A value = x[i][j];
      if (is_turned(M)) value = s_inverse[t] * value + s_dr[t];
      if (M == Mix::dv) value *= s_inverse[t];
      sw[row * kPitch + column] = e == A{0} ? A{0} : e * value;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int column = w0 + tx * 4 + j;
      acc[i][j] *= s_row[row];
      if (is_turned(M) && column < width && row < n) {
        const A weight = M == Mix::dq ? job.gates.wn[unit * s.l + t0 + row] : s_row[row];
        acc[i][j] += weight * n_state[column];
      }
    }
  }
  __syncthreads();
  if (M == Mix::read && threadIdx.x < n) {
    const int t = threadIdx.x;
    A r = s_row[t] * row_n;
    for (int j = 0; j <= t; ++j) r += sw[t * kPitch + j];
    const int64_t row = unit * s.l + t0 + t;
    if (w0 == 0) job.r[row] = r;
    s_sum[t] = A{1} / mlstm_denominator(r, job.m[row], job.eps);
  }
  for (int k0 = 0; k0 < n; k0 += kSlice) {
    __syncthreads();
    for (int k = threadIdx.x; k < kSlice * 64; k += 256) {
      const int row = k0 + k / 64, column = w0 + k % 64;
      ss[k] = row < n && column < width ? static_cast<A>(job.values.at(b, t0 + row, h)[column]) : A{0};
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kSlice; ++k) {
      A below[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) below[j] = ss[k * 64 + tx * 4 + j];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const A left = sw[(ty * 4 + i) * kPitch + k0 + k];
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[i][j] += left * below[j];
      }
    }
  }
  __syncthreads();  // s_sum of every row, also where n is one slice
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = ty * 4 + i;
    A dot = 0;
    if (row < n) {
      const int64_t at = ((b * s.l + t0 + row) * s.heads + h) * width;
      const T* own = is_turned(M) ? job.own.at(b, t0 + row, h) : nullptr;
      const A factor = M == Mix::read ? s_sum[row] : A{1};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = w0 + tx * 4 + j;
        if (column >= width) continue;
        if (M == Mix::read)
          job.h[at + column] = acc[i][j] * factor;
        else
          job.out[at + column] = static_cast<T>(acc[i][j]);
        if (is_turned(M)) dot += acc[i][j] * static_cast<A>(own[column]);
      }
    }
    if (is_turned(M)) {
      for (int step = 1; step < 16; step *= 2) dot += __shfl_xor_sync(0xffffffffu, dot, step);
      if (tx == 0 && row < n) job.dots[(unit * s.l + t0 + row) * job.tiles + w0 / 64] = dot;
    }
  }
}

}  // namespace

template <class T>
void mlstm_states_simt(const MlstmStateJob<T>& job, Stream stream) {
  launch(states_kernel<T>, {.grid = job.shape.units * job.tiles, .block = 256, .stream = stream}, job);
}

template <class T>
void mlstm_mix_simt(Mix mix, const MlstmMixJob<T>& job, Stream stream) {
  constexpr int64_t kValues = 2 * kTileRows * (kSlice + 1) + kSlice * 64 + kTileRows * (kTileRows + 1);
  const LaunchConfig config{.grid = job.shape.units * job.shape.chunks * job.tiles, .block = 256,
                            .shared = kValues * static_cast<int64_t>(sizeof(accum_t<T>)), .stream = stream};
  switch (mix) {
    case Mix::read: return launch(mix_kernel<Mix::read, T>, config, job);
    case Mix::dv: return launch(mix_kernel<Mix::dv, T>, config, job);
    case Mix::dq: return launch(mix_kernel<Mix::dq, T>, config, job);
    case Mix::dk: return launch(mix_kernel<Mix::dk, T>, config, job);
  }
}

#define KRAIT_MLSTM_SIMT(T)                                               \
  template void mlstm_states_simt<T>(const MlstmStateJob<T>&, Stream);    \
  template void mlstm_mix_simt<T>(Mix, const MlstmMixJob<T>&, Stream);
KRAIT_MLSTM_SIMT(float)
KRAIT_MLSTM_SIMT(double)
KRAIT_MLSTM_SIMT(bf16)

}  // namespace krait::kernels::cuda
