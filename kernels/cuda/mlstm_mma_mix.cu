// Coefficients of a chunk and its results; see mlstm_mma.cuh.
#include "kernels/cuda/mlstm_mma.cuh"

namespace krait::kernels::cuda {

namespace mlstm_mma {
namespace {

/// Sum over the four lanes that share a row.
__device__ inline float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// The coefficients of a chunk: weight times q . k (read; dv, there over den) or times dh . v / den + dr (dq).
template <Mix M>
__global__ void __launch_bounds__(kThreads, 2) coefficients_kernel(MlstmMixJob<bf16> job) {
  constexpr int kTile = kRows * kSlice;
  extern __shared__ __align__(128) bf16 shared_rows[];  // (rows, columns) of each stage
  __shared__ float s_c[kRows], s_u[kRows], s_inverse[kRows], s_dr[kRows], s_sum[2][kRows];
  __shared__ int s_first[kRows];
  const MlstmShape& s = job.shape;
  const int64_t chunk = blockIdx.x, unit = chunk / s.chunks, t0 = chunk % s.chunks * kRows;
  const int n = static_cast<int>(min(int64_t{kRows}, s.l - t0)), depth = M == Mix::dq ? s.dv : s.dq;
  const int64_t b = unit / s.heads, h = unit % s.heads;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  const int row0 = warp / 2 * 32, column0 = warp % 2 * 64;
  // Positions are rows and keys columns.
  const Strided<const bf16>& rows = M == Mix::dv ? job.columns : job.rows;
  const Strided<const bf16>& columns = M == Mix::dv ? job.rows : job.columns;

  const int slices = (depth + kSlice - 1) / kSlice;
  const auto load = [&](int i) {
    if (i < slices) {
      bf16* to = shared_rows + i % kStages * 2 * kTile;
      const int d0 = i * kSlice;
      load_part<kRows, kSlice>(to, rows.at(b, t0, h) + d0, rows.row, n, depth - d0);
      load_part<kRows, kSlice>(to + kTile, columns.at(b, t0, h) + d0, columns.row, n, depth - d0);
    }
    copy_commit();
  };
  for (int i = 0; i < kStages - 1; ++i) load(i);
  if (threadIdx.x < kRows) {
    const int i = static_cast<int>(threadIdx.x);
    const int64_t row = unit * s.l + t0 + i;
    const bool valid = i < n;
    s_c[i] = valid ? job.gates.c[row] : 0.0f;
    s_u[i] = valid ? job.gates.u[row] : 0.0f;
    s_first[i] = valid ? job.gates.first[row] : kRows;
    s_inverse[i] = valid && M != Mix::read ? job.gates.inverse[row] : 0.0f;
    s_dr[i] = valid && M == Mix::dq ? job.gates.dr[row] : 0.0f;
  }

  float acc[2][8][4] = {};
  [[maybe_unused]] float by_n[2][2] = {};  // q . n, half of it in either warp of a row
  for (int i = 0; i < slices; ++i) {
    copy_wait<kStages - 2>();
    __syncthreads();
    load(i + kStages - 1);
    const bf16* tile = shared_rows + i % kStages * 2 * kTile;
    if (column0 < row0 + 32) multiply<2, 4, kSlice, false, kSlice, true>(acc, tile, row0, tile + kTile, column0);
    if constexpr (M == Mix::read) {
      const int d = column0 / 2 + t * 8;
      if (i * kSlice + d >= depth) continue;
      const float* with = job.n_states + chunk * s.dq + i * kSlice + d;
      const float4 low = *reinterpret_cast<const float4*>(with), high = *reinterpret_cast<const float4*>(with + 4);
      const float nk[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const bf16* q = tile + place<kSlice>(row0 + m * 16 + half * 8 + g, d);
#pragma unroll
          for (int e = 0; e < 8; ++e) by_n[m][half] += static_cast<float>(q[e]) * nk[e];
        }
    }
  }

#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + m * 16 + half * 8 + g;
      float sum = 0;
#pragma unroll
      for (int y = 0; y < 8; ++y)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& value = acc[m][y][2 * half + e];
          const int key = column0 + y * 8 + 2 * t + e;
          const float weight = row < n && key < n ? job.scale * seen_weight(s_c[key], s_u[row], s_first[row], key, row) : 0.0f;
          if constexpr (M == Mix::dq) value = s_inverse[row] * value + s_dr[row];
          if constexpr (M == Mix::dv) value *= s_inverse[row];
          value = weight == 0.0f ? 0.0f : weight * value;
          sum += value;
        }
      if constexpr (M == Mix::read) {
        const float inter = row < n ? job.gates.inter[unit * s.l + t0 + row] : 0.0f;
        sum = row_sum(sum + job.scale * inter * by_n[m][half]);
        if (t == 0) s_sum[warp % 2][row] = sum;
      }
    }
  if constexpr (M == Mix::read) {
    __syncthreads();
    if (threadIdx.x < kRows) {
      const int i = static_cast<int>(threadIdx.x);
      const int64_t row = unit * s.l + t0 + i;
      if (i < n) {
        const float r = s_sum[0][i] + s_sum[1][i], inverse = 1.0f / mlstm_denominator(r, job.m[row], job.eps);
        job.r[row] = r;
        job.gates.wc[row] = job.scale * job.gates.inter[row] * inverse;
        s_inverse[i] = inverse;
      }
    }
    __syncthreads();
  }
  bf16* out = job.coefficients + chunk * kRows * kRows;
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + m * 16 + half * 8 + g;
#pragma unroll
      for (int y = 0; y < 8; y += 2) {
        if constexpr (M == Mix::read)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            acc[m][y][2 * half + e] *= s_inverse[row];
            acc[m][y + 1][2 * half + e] *= s_inverse[row];
          }
        *reinterpret_cast<uint2*>(out + row * kRows + column0 + y * 8 + exchanged_column()) =
            exchanged(acc[m][y], acc[m][y + 1], half);
      }
    }
}

// W columns of a chunk's result; see Mix.
template <Mix M, int W>
__global__ void __launch_bounds__(kThreads, 2) mix_kernel(MlstmMixJob<bf16> job) {
  constexpr int kA = kRows * kSlice, kStage = kA + kSlice * W, NT = W / 16;
  extern __shared__ __align__(128) bf16 shared_rows[];  // (rows, state) and then (coefficients, values) of each stage
  __shared__ float s_row[kRows], s_row_n[kRows], s_n[W];
  const MlstmShape& s = job.shape;
  const int64_t chunk = blockIdx.x / job.tiles, unit = chunk / s.chunks, t0 = chunk % s.chunks * kRows;
  const int w0 = static_cast<int>(blockIdx.x % job.tiles) * W, n = static_cast<int>(min(int64_t{kRows}, s.l - t0));
  const int64_t b = unit / s.heads, h = unit % s.heads;
  const int depth = is_turned(M) ? s.dv : s.dq, width = is_turned(M) ? s.dq : s.dv;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  const int row0 = warp / 2 * 32, column0 = warp % 2 * (W / 2);
  const bf16* state = job.states + chunk * s.dq * s.dv;
  const bf16* coefficients = job.coefficients + chunk * kRows * kRows;

  const int slices = (depth + kSlice - 1) / kSlice, all = slices + (n > kSlice ? 2 : 1);
  const auto load = [&](int i) {
    bf16* to = shared_rows + i % kStages * kStage;
    if (i < slices) {
      const int d0 = i * kSlice;
      load_part<kRows, kSlice>(to, job.rows.at(b, t0, h) + d0, job.rows.row, n, depth - d0);
      if constexpr (is_turned(M))
        load_part<W, kSlice>(to + kA, state + int64_t{w0} * s.dv + d0, s.dv, width - w0, depth - d0);
      else
        load_part<kSlice, W>(to + kA, state + int64_t{d0} * s.dv + w0, s.dv, depth - d0, width - w0);
    } else if (i < all) {
      const int j0 = (i - slices) * kSlice;
      if constexpr (rows_are_keys(M))
        load_part<kSlice, kRows>(to, coefficients + j0 * kRows, kRows, kSlice, kRows);
      else
        load_part<kRows, kSlice>(to, coefficients + j0, kRows, kRows, kSlice);
      load_part<kSlice, W>(to + kA, job.values.at(b, t0 + j0, h) + w0, job.values.row, n - j0, width - w0);
    }
    copy_commit();
  };
  for (int i = 0; i < kStages - 1; ++i) load(i);

  if (threadIdx.x < kRows) {
    const int i = static_cast<int>(threadIdx.x);
    const int64_t row = unit * s.l + t0 + i;
    const bool valid = i < n;
    const float own = !valid ? 0.0f : rows_are_keys(M) ? job.gates.w[row] : job.gates.wc[row];  // weight of the state
    s_row[i] = own;
    s_row_n[i] = valid && M == Mix::dq ? job.gates.wn[row] : own;
  }
  if constexpr (is_turned(M))
    for (int c = static_cast<int>(threadIdx.x); c < W; c += kThreads)
      s_n[c] = w0 + c < width ? job.n_states[chunk * s.dq + w0 + c] : 0.0f;

  float acc[2][2 * (NT / 2)][4] = {};
  for (int i = 0; i < slices; ++i) {
    copy_wait<kStages - 2>();
    __syncthreads();
    load(i + kStages - 1);
    const bf16* tile = shared_rows + i % kStages * kStage;
    multiply<2, NT / 2, kSlice, false, is_turned(M) ? kSlice : W, is_turned(M)>(acc, tile, row0, tile + kA, column0);
  }
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int y = 0; y < NT; ++y)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = row0 + m * 16 + e / 2 * 8 + g;
        acc[m][y][e] *= s_row[row];
        if constexpr (is_turned(M)) acc[m][y][e] += s_row_n[row] * s_n[column0 + y * 8 + 2 * t + e % 2];
      }
  for (int i = slices; i < all; ++i) {
    copy_wait<kStages - 2>();
    __syncthreads();
    load(i + kStages - 1);
    const bf16* tile = shared_rows + i % kStages * kStage;
    const int j0 = (i - slices) * kSlice;
    // Keys that no position of the warp sees, or positions that see no key of it.
    if (rows_are_keys(M) ? j0 + kSlice <= row0 : j0 >= row0 + 32) continue;
    multiply<2, NT / 2, rows_are_keys(M) ? kRows : kSlice, rows_are_keys(M), W, false>(acc, tile, row0, tile + kA, column0);
  }

#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + m * 16 + half * 8 + g;
      const int64_t at = ((b * s.l + t0 + row) * s.heads + h) * width + w0;
      [[maybe_unused]] float dot = 0;
      if constexpr (M == Mix::read)
#pragma unroll
        for (int y = 0; y < NT; ++y) {
          const int column = column0 + y * 8 + 2 * t;
          if (row < n && w0 + column < width)
            *reinterpret_cast<float2*>(job.h + at + column) = make_float2(acc[m][y][2 * half], acc[m][y][2 * half + 1]);
        }
      if constexpr (is_turned(M)) {
        uint32_t own[NT];
#pragma unroll
        for (int y = 0; y < NT; ++y) {
          const int column = w0 + column0 + y * 8 + 2 * t;
          own[y] = row < n && column < width ? *reinterpret_cast<const uint32_t*>(job.own.at(b, t0 + row, h) + column) : 0;
        }
#pragma unroll
        for (int y = 0; y < NT; ++y)
          dot += acc[m][y][2 * half] * __uint_as_float(own[y] << 16) +
                 acc[m][y][2 * half + 1] * __uint_as_float(own[y] & 0xffff0000u);
      }
      if constexpr (M != Mix::read)
#pragma unroll
        for (int y = 0; y < NT; y += 2) {
          const uint2 four = exchanged(acc[m][y], acc[m][y + 1], half);
          const int column = column0 + y * 8 + exchanged_column();
          if (row < n && w0 + column < width) *reinterpret_cast<uint2*>(job.out + at + column) = four;
        }
      if constexpr (is_turned(M)) {
        dot = row_sum(dot);
        if (t == 0 && row < n)
          job.dots[((unit * s.l + t0 + row) * job.tiles + w0 / W) * 2 + warp % 2] = dot;
      }
    }
}

template <Mix M>
void launch_mix(const MlstmMixJob<bf16>& job, Stream stream) {
  const int64_t width = is_turned(M) ? job.shape.dq : job.shape.dv;
  const auto with = [&]<int W>() {
    launch(mix_kernel<M, W>,
           {.grid = job.shape.units * job.shape.chunks * job.tiles, .block = kThreads,
            .shared = 2 * kStages * (kRows + W) * kSlice, .stream = stream},
           job);
  };
  if (mlstm_tile_width(job.shape, width) == 128)
    with.template operator()<128>();
  else
    with.template operator()<64>();
}

}  // namespace
}  // namespace mlstm_mma

bool mlstm_mma_serves(const Tensor& t) {
  if (t.dtype() != DType::bf16 || t.size(-1) % 8 != 0 || reinterpret_cast<uintptr_t>(t.raw_data()) % 16 != 0) return false;
  for (int64_t i = 0; i < 3; ++i)
    if (t.size(i) > 1 && t.stride(i) % 8 != 0) return false;
  return true;
}

void mlstm_coefficients_mma(Mix mix, const MlstmMixJob<bf16>& job, Stream stream) {
  using namespace mlstm_mma;
  const LaunchConfig config{.grid = job.shape.units * job.shape.chunks, .block = kThreads,
                            .shared = 2 * kStages * 2 * kRows * kSlice, .stream = stream};
  switch (mix) {
    case Mix::read: return launch(coefficients_kernel<Mix::read>, config, job);
    case Mix::dv: return launch(coefficients_kernel<Mix::dv>, config, job);
    default: return launch(coefficients_kernel<Mix::dq>, config, job);
  }
}

void mlstm_mix_mma(Mix mix, const MlstmMixJob<bf16>& job, Stream stream) {
  using namespace mlstm_mma;
  switch (mix) {
    case Mix::read: return launch_mix<Mix::read>(job, stream);
    case Mix::dv: return launch_mix<Mix::dv>(job, stream);
    case Mix::dq: return launch_mix<Mix::dq>(job, stream);
    case Mix::dk: return launch_mix<Mix::dk>(job, stream);
  }
}

}  // namespace krait::kernels::cuda
