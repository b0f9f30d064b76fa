// The states between chunks; see mlstm_mma.cuh.
#include "kernels/cuda/mlstm_mma.cuh"

namespace krait::kernels::cuda {

namespace mlstm_mma {
namespace {

__device__ inline void copy_async_float(float* to, const float* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 4 : 0)
               : "memory");
}

/// Products of neighbouring values, summed.
__device__ inline float dot_of_two(uint32_t a, uint32_t b) {
  return __uint_as_float(a << 16) * __uint_as_float(b << 16) +
         __uint_as_float(a & 0xffff0000u) * __uint_as_float(b & 0xffff0000u);
}

// Shared memory of a block that carries T x T of a state.
template <int T>
struct StateLayout {
  static constexpr int kTile = kSlice * T * 2;                    // of a or b, in bytes
  static constexpr int kOther = kStages * 2 * kTile;              // where the forward state comes, for `flow`
  static constexpr int kGroups = 2 * kThreads / T;                // threads that share two columns of n
  static constexpr int kFloats = (2 * kStages * kSlice + kGroups * T) * 4;
  static int64_t bytes(bool flow) { return kOther + kFloats + (flow ? T * T * 2 : 0); }
};

// T x T of a state, carried through all chunks.
template <int T>
__global__ void __launch_bounds__(kThreads, T == 192 ? 1 : 2) states_kernel(MlstmStateJob<bf16> job) {
  using Layout = StateLayout<T>;
  constexpr int kTile = kSlice * T, MT = T / 64, NT = T / 16, kHalves = kMmaChunk / kSlice;
  extern __shared__ __align__(128) unsigned char shared[];
  bf16* const shared_rows = reinterpret_cast<bf16*>(shared);  // (a, b) of each stage
  float* const s_wc = reinterpret_cast<float*>(shared + Layout::kOther);
  float *const s_wn = s_wc + kStages * kSlice, *const s_n = s_wn + kStages * kSlice;  // s_n (groups, T): parts of n
  bf16* const s_other = reinterpret_cast<bf16*>(shared + Layout::kOther + Layout::kFloats);
  const MlstmShape& s = job.shape;
  const int64_t unit = blockIdx.x / job.tiles, tile = blockIdx.x % job.tiles;
  const int64_t v_tiles = (s.dv + T - 1) / T, b = unit / s.heads, h = unit % s.heads;
  const int a0 = static_cast<int>(tile / v_tiles) * T, b0 = static_cast<int>(tile % v_tiles) * T;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  const int row0 = warp / 2 * (T / 4), column0 = warp % 2 * (T / 2);  // of the warp
  const int own = static_cast<int>(threadIdx.x), na = a0 + own;
  const bool has_n = b0 == 0 && own < T && na < s.dq;
  // Of n: two columns of every kGroups-th position.
  const int pair = own % (T / 2) * 2, part = own / (T / 2);
  const bool sums_n = b0 == 0 && part < Layout::kGroups;
  const int64_t size = int64_t{s.dq} * s.dv, slices = s.chunks * kHalves;

  const auto chunk_of = [&](int64_t step) { return job.reverse ? s.chunks - 1 - step : step; };
  const auto load = [&](int64_t i) {
    if (i < slices) {
      const int stage = static_cast<int>(i % kStages);
      const int64_t t0 = chunk_of(i / kHalves) * kMmaChunk + i % kHalves * kSlice;
      const int rows = static_cast<int>(max(int64_t{0}, min(int64_t{kSlice}, s.l - t0)));
      bf16* to = shared_rows + stage * 2 * kTile;
      load_part<kSlice, T>(to, job.a.at(b, t0, h) + a0, job.a.row, rows, s.dq - a0);
      load_part<kSlice, T>(to + kTile, job.b.at(b, t0, h) + b0, job.b.row, rows, s.dv - b0);
      if (threadIdx.x < 2 * kSlice) {
        const int j = static_cast<int>(threadIdx.x) % kSlice;
        const bool first = threadIdx.x < kSlice, valid = j < rows;
        const float* from = first ? job.wc : job.wn;
        copy_async_float((first ? s_wc : s_wn) + stage * kSlice + j, valid ? from + unit * s.l + t0 + j : from, valid);
      }
    }
  };
  for (int i = 0; i < kStages - 1; ++i) {
    load(i);
    copy_commit();
  }

  float c[MT][2 * (NT / 2)][4] = {}, n[2] = {0, 0};
  // f(two values, their place) for the thread's values inside the state.
  const auto each_pair = [&](auto&& f) {
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
      for (int y = 0; y < NT; ++y)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = a0 + row0 + i * 16 + g + 8 * half, column = b0 + column0 + y * 8 + 2 * t;
          if (row < s.dq && column < s.dv) f(&c[i][y][2 * half], unit * size + int64_t{row} * s.dv + column);
        }
  };
  if (job.c_begin)
    each_pair([&](float* two, int64_t cell) {
      two[0] = job.c_begin[cell];
      two[1] = job.c_begin[cell + 1];
    });
  if (job.n_begin && sums_n && part == 0 && a0 + pair < s.dq) {
    n[0] = job.n_begin[unit * s.dq + a0 + pair];
    n[1] = job.n_begin[unit * s.dq + a0 + pair + 1];
  }
  const auto share_n = [&] {
    if (sums_n) *reinterpret_cast<float2*>(s_n + part * T + pair) = make_float2(n[0], n[1]);
  };
  const auto whole_n = [&] {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < Layout::kGroups; ++k) sum += s_n[k * T + own];
    return sum;
  };

  // Writes the state, and the warp's part of <dC, C> + <dn, n>, from the rounded values: nothing comes from behind the
  // sequence without a gradient of the last state.
  const auto hand_over = [&](int64_t x) {
    const int64_t at = unit * s.chunks + x;
    const bool inner = x + 1 < s.chunks;
    float flow = 0;
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int y = 0; y < NT; y += 2) {
          const uint2 four = exchanged(c[i][y], c[i][y + 1], half);
          const int r = row0 + i * 16 + g + 8 * half, k = column0 + y * 8 + exchanged_column();
          if (a0 + r >= s.dq || b0 + k >= s.dv) continue;
          const int64_t cell = int64_t{a0 + r} * s.dv + b0 + k;
          *reinterpret_cast<uint2*>(job.states + at * size + cell) = four;
          if (!job.flow) continue;
          if (inner) {
            const uint2 other = *reinterpret_cast<const uint2*>(s_other + place<T>(r, k / 8 * 8) + k % 8);
            flow += dot_of_two(four.x, other.x) + dot_of_two(four.y, other.y);
          } else if (job.c_begin) {
            const float* other = job.c_last + unit * size + cell;
            flow += dot_of_two(four.x, pack(other[0], other[1])) + dot_of_two(four.y, pack(other[2], other[3]));
          }
        }
    if (has_n) {
      const float value = whole_n();
      job.n_states[at * s.dq + na] = value;
      if (job.flow) flow += value * (inner ? job.forward_n[(at + 1) * s.dq + na] : job.n_last[unit * s.dq + na]);
    }
    if (!job.flow) return;
    for (int w = 16; w > 0; w /= 2) flow += __shfl_xor_sync(0xffffffffu, flow, w);
    if (lane == 0) job.flow[(at * job.tiles + tile) * (kThreads / 32) + warp] = flow;
  };

  for (int64_t i = 0; i < slices; ++i) {
    const bool begins = i % kHalves == 0;
    if (begins) share_n();
    if (begins && job.flow)
      copy_wait<0>();  // the forward state came with the latest slice
    else
      copy_wait<kStages - 2>();
    __syncthreads();  // the stage is here, and the one before is free
    load(i + kStages - 1);
    if (i % kHalves == kHalves - 1 && job.flow && i + 1 < slices)  // behind the next chunk: before this one
      load_part<T, T>(s_other, job.forward_states + (unit * s.chunks + chunk_of(i / kHalves)) * size + int64_t{a0} * s.dv + b0,
                      s.dv, s.dq - a0, s.dv - b0);
    copy_commit();
    if (begins) {
      const int64_t x = chunk_of(i / kHalves);
      hand_over(x);
      const float decay = job.decay[unit * s.chunks + x];
      n[0] *= decay;
      n[1] *= decay;
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int y = 0; y < NT; ++y)
#pragma unroll
          for (int e = 0; e < 4; ++e) c[m][y][e] *= decay;
    }
    const int stage = static_cast<int>(i % kStages);
    const bf16* ta = shared_rows + stage * 2 * kTile;
    multiply<MT, NT / 2, T, true, T, false>(c, ta, row0, ta + kTile, column0, s_wc + stage * kSlice);
    if (sums_n)
#pragma unroll 8
      for (int k = 0; k < kSlice / Layout::kGroups; ++k) {
        const int j = k * Layout::kGroups + part;
        const uint32_t two = *reinterpret_cast<const uint32_t*>(ta + place<T>(j, pair / 8 * 8) + pair % 8);
        const float w = s_wn[stage * kSlice + j];
        n[0] += w * __uint_as_float(two << 16);
        n[1] += w * __uint_as_float(two & 0xffff0000u);
      }
  }
  if (job.c_end)
    each_pair([&](const float* two, int64_t cell) {
      job.c_end[cell] = two[0];
      job.c_end[cell + 1] = two[1];
    });
  if (!job.n_end) return;
  share_n();
  __syncthreads();
  if (has_n) job.n_end[unit * s.dq + na] = whole_n();
}

}  // namespace
}  // namespace mlstm_mma

void mlstm_states_mma(const MlstmStateJob<bf16>& job, Stream stream) {
  using namespace mlstm_mma;
  const auto with = [&]<int T>() {
    launch(states_kernel<T>, {.grid = job.shape.units * job.tiles, .block = kThreads,
                              .shared = StateLayout<T>::bytes(job.flow != nullptr), .stream = stream}, job);
  };
  switch (job.tile) {
    case 192: return with.template operator()<192>();
    case 128: return with.template operator()<128>();
    default: return with.template operator()<64>();
  }
}

}  // namespace krait::kernels::cuda
