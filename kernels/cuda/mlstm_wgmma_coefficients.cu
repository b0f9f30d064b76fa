// The coefficients of a chunk of 256 positions on wgmma (sm_90a), one block a chunk. Of the four tiles of 64 positions a
// warpgroup has the first and the last, the other those between: 64 + 256 and 128 + 192 keys, which is the lower triangle,
// divided evenly. Rows and columns come by bulk copies, 64 channels a stage.
// Bound by memory: (dq + dq) 2 bytes a position read, 5 / 8 of 256 2 written.
#include "kernels/cuda/mlstm_wgmma.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int kSlice = 64, kStages = 3, kConsumers = 256, kThreads = kConsumers + 128;
constexpr int kBox = 64 * 128, kOperand = kWgmmaChunk / 64 * kBox, kStage = 2 * kOperand;  // bytes
constexpr int kShared = kStages * kStage + 1024;  // and dq values of n

struct Maps { CUtensorMap rows, columns; };

// Of the chunk's positions.
struct alignas(16) Positions {
  float c[kWgmmaChunk], u[kWgmmaChunk], inverse[kWgmmaChunk], dr[kWgmmaChunk], by_n[kWgmmaChunk];
  int first[kWgmmaChunk];
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The products of tile `tile` with the keys up to its end become coefficients, which go out.
template <Mix M, int N>
__device__ __forceinline__ void finish(float (&value)[N / 2], const MlstmMixJob<bf16>& job, const Positions& p, int64_t unit,
                                       int64_t chunk, int64_t t0, int n) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t4 = lane % 4;
  const int row0 = N - 64 + static_cast<int>(threadIdx.x) % 128 / 32 * 16 + g;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + 8 * half, first = p.first[row];
    const float u = p.u[row];
    float inverse = p.inverse[row], sum = 0.0f;
    const float dr = p.dr[row];
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {  // without branches: few warps must hide each other's latencies
      const float2 c = *reinterpret_cast<const float2*>(p.c + 8 * j + 2 * t4);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = value[4 * j + 2 * half + e];
        const int key = 8 * j + 2 * t4 + e;
        if constexpr (M == Mix::dq) x = inverse * x + dr;
        if constexpr (M == Mix::dv) x *= inverse;
        const float weighted = job.scale * __expf((e == 0 ? c.x : c.y) - u) * x;
        x = key <= row && key >= first ? weighted : 0.0f;  // first is behind all keys where there is no such position
        sum += x;
      }
    }
    if constexpr (M == Mix::read) {
      const int64_t at = unit * job.shape.l + t0 + row;
      const float inter = row < n ? job.gates.inter[at] : 0.0f;
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      sum += job.scale * inter * p.by_n[row];
      inverse = row < n ? 1.0f / mlstm_denominator(sum, job.m[at], job.eps) : 0.0f;
      if (t4 == 0 && row < n) {
        job.r[at] = sum;
        job.gates.wc[at] = job.scale * inter * inverse;
      }
    }
    bf16* const to = job.coefficients + (chunk * kWgmmaChunk + row) * kWgmmaChunk + t4 % 2 * 8 + t4 / 2 * 4;
    const bool odd = lane % 2 != 0;
#pragma unroll
    for (int j = 0; j < N / 8; j += 2) {  // four columns a lane: of tile j in even lanes, of j + 1 in odd ones
      float* const x = value + 4 * j + 2 * half;
      if constexpr (M == Mix::read) {
        x[0] *= inverse;
        x[1] *= inverse;
        x[4] *= inverse;
        x[5] *= inverse;
      }
      const uint32_t low = pack(x[0], x[1]), high = pack(x[4], x[5]);
      const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? low : high, 1);
      *reinterpret_cast<uint2*>(to + j * 8) = odd ? uint2{other, high} : uint2{low, other};
    }
  }
}

template <Mix M, int N1, int N2>
__device__ __forceinline__ void consume(const MlstmMixJob<bf16>& job, Positions& p, const unsigned char* shared, const float* n_state,
                                        uint32_t base, uint32_t full, uint32_t empty, int slices, int64_t unit, int64_t chunk,
                                        int64_t t0, int n) {
  const int thread = static_cast<int>(threadIdx.x);
  float first[N1 / 2], second[N2 / 2], by_n = 0.0f;
#pragma unroll
  for (int i = 0; i < N1 / 2; ++i) first[i] = 0.0f;
#pragma unroll
  for (int i = 0; i < N2 / 2; ++i) second[i] = 0.0f;
  for (int i = 0; i < slices; ++i) {
    const int stage = i % kStages;
    barrier_wait(full + 8 * stage, static_cast<uint32_t>(i / kStages) & 1u);
    const uint32_t rows = base + stage * kStage, columns = rows + kOperand;
    hold(first);
    hold(second);
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint64_t by = further(along_lines(columns), k * 32);
      wgmma(first, further(along_lines(rows + (N1 / 64 - 1) * kBox), k * 32), by, true);
      wgmma(second, further(along_lines(rows + (N2 / 64 - 1) * kBox), k * 32), by, true);
    }
    wgmma_commit();
    if constexpr (M == Mix::read) {  // a thread has a row
      const unsigned char* row = shared + stage * kStage + thread * 128;
#pragma unroll
      for (int piece = 0; piece < 8; ++piece) {
        const uint4 eight = *reinterpret_cast<const uint4*>(row + ((piece ^ thread % 8) << 4));
        const float4 low = *reinterpret_cast<const float4*>(n_state + i * kSlice + piece * 8);
        const float4 high = *reinterpret_cast<const float4*>(n_state + i * kSlice + piece * 8 + 4);
        const auto two = [&](uint32_t x, float a, float b) {
          by_n += a * __uint_as_float(x << 16) + b * __uint_as_float(x & 0xffff0000u);
        };
        two(eight.x, low.x, low.y);
        two(eight.y, low.z, low.w);
        two(eight.z, high.x, high.y);
        two(eight.w, high.z, high.w);
      }
    }
    wgmma_wait<0>();
    hold(first);
    hold(second);
    __syncwarp();
    if (thread % 32 == 0) barrier_arrive(empty + 8 * stage);
  }
  if constexpr (M == Mix::read) {
    p.by_n[thread] = by_n;
    meet(1, kConsumers);
  }
  finish<M, N1>(first, job, p, unit, chunk, t0, n);
  finish<M, N2>(second, job, p, unit, chunk, t0, n);
}

#endif

template <Mix M>
__global__ void __launch_bounds__(kThreads, 1) coefficients_kernel(const __grid_constant__ Maps maps, const MlstmMixJob<bf16> job) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ unsigned char raw[];
  __shared__ Positions positions;
  __shared__ uint64_t barriers[2 * kStages];
  const uint32_t base = (shared_address(raw) + 1023) / 1024 * 1024;
  unsigned char* const shared = raw + (base - shared_address(raw));
  float* const n_state = reinterpret_cast<float*>(shared + kStages * kStage);
  const uint32_t full = shared_address(barriers), empty = full + 8 * kStages;
  const MlstmShape& s = job.shape;
  const int64_t chunk = blockIdx.x, unit = chunk / s.chunks, t0 = chunk % s.chunks * kWgmmaChunk;
  const int n = static_cast<int>(min(int64_t{kWgmmaChunk}, s.l - t0)), slices = (M == Mix::dq ? s.dv : s.dq) / kSlice;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    for (uint32_t i = 0; i < kStages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, kConsumers / 32);
    }
    barriers_visible();
  }
  __syncthreads();
  if (thread >= kConsumers) {
    give_registers<40>();
    if (thread > kConsumers) return;
    const int b = static_cast<int>(unit / s.heads), h = static_cast<int>(unit % s.heads);
    for (int i = 0; i < slices; ++i) {
      const int stage = i % kStages;
      if (i >= kStages) barrier_wait(empty + 8 * stage, static_cast<uint32_t>(i / kStages - 1) & 1u);
      const uint32_t at = base + stage * kStage, barrier = full + 8 * stage;
      barrier_expect(barrier, kStage);
#pragma unroll
      for (int k = 0; k < kWgmmaChunk / 64; ++k) {
        bring_box(at + k * kBox, maps.rows, barrier, i * kSlice, h, static_cast<int>(t0) + 64 * k, b);
        bring_box(at + kOperand + k * kBox, maps.columns, barrier, i * kSlice, h, static_cast<int>(t0) + 64 * k, b);
      }
    }
    return;
  }
  take_registers<232>();
  const int64_t own = unit * s.l + t0 + thread;
  const bool valid = thread < n;
  positions.c[thread] = valid ? job.gates.c[own] : 0.0f;
  positions.u[thread] = valid ? job.gates.u[own] : 0.0f;
  positions.first[thread] = valid ? job.gates.first[own] : kWgmmaChunk;
  positions.inverse[thread] = valid && M != Mix::read ? job.gates.inverse[own] : 0.0f;
  positions.dr[thread] = valid && M == Mix::dq ? job.gates.dr[own] : 0.0f;
  if constexpr (M == Mix::read)
    for (int d = thread; d < s.dq; d += kConsumers) n_state[d] = job.n_states[chunk * s.dq + d];
  meet(1, kConsumers);
  if (thread < 128)
    consume<M, 64, 256>(job, positions, shared, n_state, base, full, empty, slices, unit, chunk, t0, n);
  else
    consume<M, 128, 192>(job, positions, shared, n_state, base, full, empty, slices, unit, chunk, t0, n);
#endif
}

}  // namespace

void mlstm_coefficients_wgmma(Mix mix, const MlstmMixJob<bf16>& job, Stream stream) {
  const MlstmShape& s = job.shape;
  const int width = mix == Mix::dq ? s.dv : s.dq;
  // Positions are rows and keys columns.
  const Maps maps{mlstm_rows_map(mix == Mix::dv ? job.columns : job.rows, s, width),
                  mlstm_rows_map(mix == Mix::dv ? job.rows : job.columns, s, width)};
  const LaunchConfig config{.grid = s.units * s.chunks, .block = kThreads, .shared = kShared + int64_t{s.dq} * 4, .stream = stream};
  switch (mix) {
    case Mix::read: return launch(coefficients_kernel<Mix::read>, config, maps, job);
    case Mix::dv: return launch(coefficients_kernel<Mix::dv>, config, maps, job);
    default: return launch(coefficients_kernel<Mix::dq>, config, maps, job);
  }
}

}  // namespace krait::kernels::cuda
