// The results of mLSTM's chunks of 256 positions on wgmma (sm_90a): see Mix. Blocks stay and take one tile after another,
// 128 positions, 64 a warpgroup, and 192 or 384 columns, while the next tile's operands already come by bulk copies, 64 of
// the summed dimension a stage: first rows and state, then coefficients and values.
// Bound by memory: rows, values and result once, the states once for two tiles, coefficients 1 / 3 of that.
#include "kernels/cuda/mlstm_wgmma.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int kRows = 128, kSlice = 64, kConsumers = 256, kThreads = kConsumers + 128;
constexpr int kBox = 64 * 128, kRowsBytes = 2 * kBox, kPartBytes = 3 * kBox;  // of 128 rows, of 192 columns

template <int kParts>
struct Layout {
  static constexpr int kStages = kParts == 1 ? 5 : 3, kStage = kRowsBytes + kParts * kPartBytes;
  static constexpr int kBytes = kStages * kStage + 1024;
};

struct Maps { CUtensorMap rows, states, coefficients, values; };

// Tile `i` of a result, columns fastest, then the halves of a chunk: neighbours share a state.
struct Tile {
  int64_t chunk, unit, chunk0;
  int part0, w0, n, values0, values1, b, h;
  __device__ Tile(int64_t i, const MlstmShape& s, int64_t tiles, int width, bool keys) {
    w0 = static_cast<int>(i % tiles) * width;
    part0 = static_cast<int>(i / tiles % 2) * kRows;
    chunk = i / tiles / 2;
    unit = chunk / s.chunks;
    chunk0 = chunk % s.chunks * kWgmmaChunk;
    b = static_cast<int>(unit / s.heads);
    h = static_cast<int>(unit % s.heads);
    const int valid = static_cast<int>(min(int64_t{kWgmmaChunk}, s.l - chunk0));
    n = min(kRows, valid - part0);
    values0 = keys ? part0 : 0;
    values1 = keys ? valid : min(valid, part0 + kRows);
  }
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <Mix M, int kParts>
__device__ __forceinline__ void produce(const Maps& maps, const MlstmMixJob<bf16>& job, int64_t count, uint32_t base, uint32_t full,
                                        uint32_t empty) {
  using L = Layout<kParts>;
  const int slices = (is_turned(M) ? job.shape.dv : job.shape.dq) / kSlice;
  int turn = 0;
  for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    const Tile at(i, job.shape, job.tiles, kParts * 192, rows_are_keys(M));
    if (at.n <= 0) continue;
    const int all = slices + (at.values1 - at.values0 + kSlice - 1) / kSlice;
    for (int x = 0; x < all; ++x, ++turn) {
      const int stage = turn % L::kStages;
      if (turn >= L::kStages) barrier_wait(empty + 8 * stage, static_cast<uint32_t>(turn / L::kStages - 1) & 1u);
      const uint32_t rows = base + stage * L::kStage, columns = rows + kRowsBytes, barrier = full + 8 * stage;
      barrier_expect(barrier, L::kStage);
      if (x < slices) {
        const int d0 = x * kSlice, t0 = static_cast<int>(at.chunk0) + at.part0, z = static_cast<int>(at.chunk);
#pragma unroll
        for (int k = 0; k < 2; ++k) bring_box(rows + k * kBox, maps.rows, barrier, d0, at.h, t0 + 64 * k, at.b);
        if constexpr (is_turned(M)) {
#pragma unroll
          for (int k = 0; k < kParts; ++k) bring_box(columns + k * kPartBytes, maps.states, barrier, d0, at.w0 + 192 * k, z);
        } else {
#pragma unroll
          for (int k = 0; k < 3 * kParts; ++k) bring_box(columns + k * kBox, maps.states, barrier, at.w0 + 64 * k, d0, z);
        }
      } else {
        const int j0 = at.values0 + (x - slices) * kSlice, row0 = static_cast<int>(at.chunk) * kWgmmaChunk;
#pragma unroll
        for (int k = 0; k < 2; ++k)
          if constexpr (rows_are_keys(M))
            bring_box(rows + k * kBox, maps.coefficients, barrier, at.part0 + 64 * k, row0 + j0);
          else
            bring_box(rows + k * kBox, maps.coefficients, barrier, j0, row0 + at.part0 + 64 * k);
#pragma unroll
        for (int k = 0; k < 3 * kParts; ++k)
          bring_box(columns + k * kBox, maps.values, barrier, at.w0 + 64 * k, at.h, static_cast<int>(at.chunk0) + j0, at.b);
      }
    }
  }
}

template <Mix M, int kParts>
__device__ __forceinline__ void consume(const MlstmMixJob<bf16>& job, int64_t count, uint32_t base, uint32_t full, uint32_t empty) {
  using L = Layout<kParts>;
  const MlstmShape& s = job.shape;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, g = lane / 4, t4 = lane % 4, group = thread / 128;
  const int row0 = thread / 32 * 16 + g;  // its other row is 8 further
  const int slices = (is_turned(M) ? s.dv : s.dq) / kSlice, width = is_turned(M) ? s.dq : s.dv;
  float acc[kParts][96];
  int turn = 0;
  for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    const Tile at(i, s, job.tiles, kParts * 192, rows_are_keys(M));
    if (at.n <= 0) continue;
    const int64_t t0 = at.chunk0 + at.part0;
    float own[2], own_n[2];  // weights of the state
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool valid = row0 + 8 * half < at.n;
      const int64_t row = at.unit * s.l + t0 + row0 + 8 * half;
      own[half] = !valid ? 0.0f : rows_are_keys(M) ? job.gates.w[row] : job.gates.wc[row];
      own_n[half] = valid && M == Mix::dq ? job.gates.wn[row] : own[half];
    }
#pragma unroll
    for (int k = 0; k < kParts; ++k)
#pragma unroll
      for (int e = 0; e < 96; ++e) acc[k][e] = 0.0f;
    const auto held = [&] {
#pragma unroll
      for (int k = 0; k < kParts; ++k) hold(acc[k]);
    };
    int before = -1;  // the stage whose products are under way
    const auto release = [&](int stage) {
      __syncwarp();
      if (lane == 0) barrier_arrive(empty + 8 * stage);
    };
    const auto finish = [&] {
      wgmma_wait<0>();
      held();
      if (before >= 0) release(before);
      before = -1;
    };
    const auto issued = [&](int stage) {
      wgmma_commit();
      wgmma_wait<1>();
      if (before >= 0) release(before);
      before = stage;
    };
    held();
    for (int x = 0; x < slices; ++x, ++turn) {
      const int stage = turn % L::kStages;
      barrier_wait(full + 8 * stage, static_cast<uint32_t>(turn / L::kStages) & 1u);
      const uint32_t rows = base + stage * L::kStage + group * kBox, columns = base + stage * L::kStage + kRowsBytes;
      wgmma_begin();
#pragma unroll
      for (int y = 0; y < 4; ++y)
#pragma unroll
        for (int k = 0; k < kParts; ++k) {
          const uint64_t a = further(along_lines(rows), y * 32);
          if constexpr (is_turned(M))
            wgmma(acc[k], a, further(along_lines(columns + k * kPartBytes), y * 32), true);
          else
            wgmma<0, 1>(acc[k], a, further(across_lines(columns + k * kPartBytes, kBox), y * 2048), true);
        }
      issued(stage);
    }
    finish();
#pragma unroll
    for (int k = 0; k < kParts; ++k)
#pragma unroll
      for (int j = 0; j < 24; ++j) {
        float2 n = {0.0f, 0.0f};
        if constexpr (is_turned(M))
          n = *reinterpret_cast<const float2*>(job.n_states + at.chunk * s.dq + at.w0 + k * 192 + 8 * j + 2 * t4);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          acc[k][4 * j + 2 * half] = own[half] * acc[k][4 * j + 2 * half] + own_n[half] * n.x;
          acc[k][4 * j + 2 * half + 1] = own[half] * acc[k][4 * j + 2 * half + 1] + own_n[half] * n.y;
        }
      }
    held();
    for (int j0 = at.values0; j0 < at.values1; j0 += kSlice, ++turn) {
      const int stage = turn % L::kStages, first = at.part0 + 64 * group;
      barrier_wait(full + 8 * stage, static_cast<uint32_t>(turn / L::kStages) & 1u);
      if (rows_are_keys(M) ? j0 < first : j0 > first) {  // keys that none of the rows sees, or rows that see none
        release(stage);
        continue;
      }
      const uint32_t rows = base + stage * L::kStage + group * kBox, columns = base + stage * L::kStage + kRowsBytes;
      wgmma_begin();
#pragma unroll
      for (int y = 0; y < 4; ++y)
#pragma unroll
        for (int k = 0; k < kParts; ++k) {
          const uint64_t b = further(across_lines(columns + k * kPartBytes, kBox), y * 2048);
          if constexpr (rows_are_keys(M))
            wgmma<1, 1>(acc[k], further(across_lines(rows, kBox), y * 2048), b, true);
          else
            wgmma<0, 1>(acc[k], further(along_lines(rows), y * 32), b, true);
        }
      issued(stage);
    }
    finish();

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + 8 * half;
      const bool valid = row < at.n;
      const int64_t to = ((at.b * s.l + t0 + row) * s.heads + at.h) * width + at.w0;
      if (M == Mix::read && job.h != nullptr) {
#pragma unroll
        for (int k = 0; k < kParts; ++k)
#pragma unroll
          for (int j = 0; j < 24; ++j)
            if (valid)
              *reinterpret_cast<float2*>(job.h + to + k * 192 + 8 * j + 2 * t4) =
                  make_float2(acc[k][4 * j + 2 * half], acc[k][4 * j + 2 * half + 1]);
      } else {
        if constexpr (is_turned(M)) {
          const bf16* const from = job.own.at(at.b, valid ? t0 + row : t0, at.h) + at.w0 + 2 * t4;
          float dot = 0.0f;
#pragma unroll
          for (int k = 0; k < kParts; ++k)
#pragma unroll
            for (int j = 0; j < 24; ++j) {
              const uint32_t two = *reinterpret_cast<const uint32_t*>(from + k * 192 + 8 * j);
              dot += acc[k][4 * j + 2 * half] * __uint_as_float(two << 16) +
                     acc[k][4 * j + 2 * half + 1] * __uint_as_float(two & 0xffff0000u);
            }
          dot += __shfl_xor_sync(0xffffffffu, dot, 1);
          dot += __shfl_xor_sync(0xffffffffu, dot, 2);
          if (t4 == 0 && valid) job.dots[(at.unit * s.l + t0 + row) * job.tiles + at.w0 / (kParts * 192)] = dot;
        }
        const bool odd = lane % 2 != 0;
#pragma unroll
        for (int k = 0; k < kParts; ++k)
#pragma unroll
          for (int j = 0; j < 24; j += 2) {  // four columns a lane: of tile j in even lanes, of j + 1 in odd ones
            const float* const x = acc[k] + 4 * j + 2 * half;
            const uint32_t low = pack(x[0], x[1]), high = pack(x[4], x[5]);
            const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? low : high, 1);
            if (valid)
              *reinterpret_cast<uint2*>(job.out + to + k * 192 + 8 * j + t4 % 2 * 8 + t4 / 2 * 4) =
                  odd ? uint2{other, high} : uint2{low, other};
          }
      }
    }
  }
}

#endif

template <Mix M, int kParts>
__global__ void __launch_bounds__(kThreads, 1)
    mix_kernel(const __grid_constant__ Maps maps, const MlstmMixJob<bf16> job, int64_t count) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using L = Layout<kParts>;
  extern __shared__ unsigned char raw[];
  __shared__ uint64_t barriers[2 * L::kStages];
  const uint32_t base = (shared_address(raw) + 1023) / 1024 * 1024;
  const uint32_t full = shared_address(barriers), empty = full + 8 * L::kStages;
  if (threadIdx.x == 0) {
    for (uint32_t i = 0; i < L::kStages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, kConsumers / 32);
    }
    barriers_visible();
  }
  __syncthreads();
  if (threadIdx.x >= kConsumers) {
    give_registers<40>();
    if (threadIdx.x == kConsumers) produce<M, kParts>(maps, job, count, base, full, empty);
    return;
  }
  take_registers<232>();
  consume<M, kParts>(job, count, base, full, empty);
#endif
}

template <Mix M>
void launch_mix(const MlstmMixJob<bf16>& job, Stream stream) {
  const MlstmShape& s = job.shape;
  const int depth = is_turned(M) ? s.dv : s.dq, width = is_turned(M) ? s.dq : s.dv;
  const int64_t state_sizes[] = {s.dv, s.dq, s.units * s.chunks}, state_strides[] = {s.dv, int64_t{s.dq} * s.dv};
  const int state_box[] = {64, is_turned(M) ? 192 : 64, 1};
  const int64_t all_rows = s.units * s.chunks * kWgmmaChunk;
  const int64_t sizes[] = {kWgmmaChunk, all_rows}, strides[] = {kWgmmaChunk};
  const int box[] = {64, 64};
  const Maps maps{mlstm_rows_map(job.rows, s, depth), tensor_map(job.states, DType::bf16, state_sizes, state_strides, state_box),
                  tensor_map(job.coefficients, DType::bf16, sizes, strides, box), mlstm_rows_map(job.values, s, width)};
  const int64_t blocks = device_info(stream.device).multiprocessors;
  const int64_t count = s.units * s.chunks * 2 * job.tiles;
  const auto with = [&]<int kParts>() {
    launch(mix_kernel<M, kParts>,
           {.grid = std::min(blocks, count), .block = kThreads, .shared = Layout<kParts>::kBytes, .stream = stream},
           maps, job, count);
  };
  if (width / job.tiles == 384)
    with.template operator()<2>();
  else
    with.template operator()<1>();
}

}  // namespace

void mlstm_mix_wgmma(Mix mix, const MlstmMixJob<bf16>& job, Stream stream) {
  switch (mix) {
    case Mix::read: return launch_mix<Mix::read>(job, stream);
    case Mix::dv: return launch_mix<Mix::dv>(job, stream);
    case Mix::dq: return launch_mix<Mix::dq>(job, stream);
    case Mix::dk: return launch_mix<Mix::dk>(job, stream);
  }
}

}  // namespace krait::kernels::cuda
