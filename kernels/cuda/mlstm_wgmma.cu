// The states between mLSTM's chunks on wgmma (sm_90a). A block carries 192 x 192 of a state through all chunks in the
// accumulators of three warpgroups, 64 rows each. A warp brings a, b and their weights, 64 positions a stage, by bulk
// copies; a goes through registers, where it takes its weights; a last warp writes the states out of shared memory and
// brings, going backwards, the forward state that `flow` needs to where the next one will be written.
// Bound by memory: a, b, 2 dq dv bytes a chunk, and as much again for flow.
#include "kernels/cuda/hopper.h"
#include "kernels/cuda/mlstm_wgmma.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int kSide = kWgmmaSide, kSlice = 64, kStages = 3;
constexpr int kWarps = 12, kConsumers = 32 * kWarps, kThreads = kConsumers + 128;
constexpr int kBoxes = kSide / 64, kPairs = kSide / 2, kParts = kConsumers / kPairs;

// Shared memory in bytes, from a multiple of 1024 on.
constexpr int kBox = kSlice * 128, kOperand = kBoxes * kBox, kStage = 2 * kOperand;
constexpr int kStateBox = kSide * 128, kState = kStages * kStage;
constexpr int kWeights = kState + kBoxes * kStateBox;      // (stages, 2, 64): of C and of n
constexpr int kN = kWeights + kStages * 2 * kSlice * 4;    // (parts, 192): parts of n
constexpr int kShared = kN + kParts * kSide * 4 + 1024;

struct Maps { CUtensorMap a, b, states, forward; };

__device__ __forceinline__ uint32_t weighted(uint32_t two, float low, float high) {
  return pack(__uint_as_float(two << 16) * low, __uint_as_float(two & 0xffff0000u) * high);
}
__device__ __forceinline__ float dot_of_two(uint32_t a, uint32_t b) {
  return __uint_as_float(a << 16) * __uint_as_float(b << 16) +
         __uint_as_float(a & 0xffff0000u) * __uint_as_float(b & 0xffff0000u);
}

__global__ void __launch_bounds__(kThreads, 1) states_kernel(const __grid_constant__ Maps maps, const MlstmStateJob<bf16> job) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ unsigned char raw[];
  __shared__ uint64_t barriers[2 * kStages + 2];
  const uint32_t base = (shared_address(raw) + 1023) / 1024 * 1024;
  unsigned char* const shared = raw + (base - shared_address(raw));
  const uint32_t full = shared_address(barriers), empty = full + 8 * kStages, ready = empty + 8 * kStages, written = ready + 8;
  const MlstmShape& s = job.shape;
  const int64_t unit = blockIdx.x / job.tiles, tile = blockIdx.x % job.tiles, v_tiles = s.dv / kSide;
  const int b = static_cast<int>(unit / s.heads), h = static_cast<int>(unit % s.heads);
  const int a0 = static_cast<int>(tile / v_tiles) * kSide, b0 = static_cast<int>(tile % v_tiles) * kSide;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int chunks = static_cast<int>(s.chunks), parts = s.chunk / kSlice, slices = chunks * parts;
  const auto chunk_of = [&](int step) { return job.reverse ? chunks - 1 - step : step; };
  if (thread == 0) {
    for (uint32_t i = 0; i < kStages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, kWarps);
    }
    barrier_init(ready, 1);
    barrier_init(written, kWarps);
    barriers_visible();
  }
  __syncthreads();

  if (warp >= kWarps) {
    give_registers<32>();
    if (warp == kWarps) {  // brings a, b and weights
      float next[4];
      const auto weights_of = [&](int i) {
        const int64_t t0 = int64_t{chunk_of(i / parts)} * s.chunk + i % parts * kSlice;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int64_t t = t0 + lane + 32 * e;
          const bool valid = t < s.l;
          next[e] = valid ? job.wc[unit * s.l + t] : 0.0f;
          next[2 + e] = valid ? job.wn[unit * s.l + t] : 0.0f;
        }
      };
      weights_of(0);
      for (int i = 0; i < slices; ++i) {
        const int stage = i % kStages;
        const float now[4] = {next[0], next[1], next[2], next[3]};
        if (i + 1 < slices) weights_of(i + 1);
        if (i >= kStages) barrier_wait(empty + 8 * stage, static_cast<uint32_t>(i / kStages - 1) & 1u);
        float* to = reinterpret_cast<float*>(shared + kWeights) + stage * 2 * kSlice + lane;
#pragma unroll
        for (int e = 0; e < 4; ++e) to[32 * e] = now[e];
        __syncwarp();
        if (lane == 0) {
          const int t0 = chunk_of(i / parts) * s.chunk + i % parts * kSlice;
          const uint32_t at = base + stage * kStage, barrier = full + 8 * stage;
          barrier_expect(barrier, kStage);
#pragma unroll
          for (int k = 0; k < kBoxes; ++k) {
            bring_box(at + k * kBox, maps.a, barrier, a0 + 64 * k, h, t0, b);
            bring_box(at + kOperand + k * kBox, maps.b, barrier, b0 + 64 * k, h, t0, b);
          }
        }
      }
      return;
    }
    if (thread == kConsumers + 32) {  // writes states
      const auto store = [&](int step) {
        barrier_wait(written, static_cast<uint32_t>(step) & 1u);
#pragma unroll
        for (int k = 0; k < kBoxes; ++k)
          store_box(maps.states, base + kState + k * kStateBox, b0 + 64 * k, a0, static_cast<int>(unit * s.chunks) + chunk_of(step));
        stores_commit();
      };
      for (int step = 0; step < chunks; ++step) {
        if (step > 0) {
          store(step - 1);
          stores_wait_read<0>();
        }
        if (job.flow != nullptr && step > 0) {  // behind this chunk: before the next
          barrier_expect(ready, kBoxes * kStateBox);
#pragma unroll
          for (int k = 0; k < kBoxes; ++k)
            bring_box(base + kState + k * kStateBox, maps.forward, ready, b0 + 64 * k, a0,
                      static_cast<int>(unit * s.chunks) + chunk_of(step) + 1);
        } else {
          barrier_arrive(ready);
        }
      }
      store(chunks - 1);
      stores_wait<0>();
    }
    return;
  }
  take_registers<160>();

  const int g = lane / 4, t4 = lane % 4, row = warp * 16 + g;  // its other row is 8 further
  const int pair = thread % kPairs * 2, part = thread / kPairs;
  const bool sums_n = b0 == 0;
  const int64_t size = int64_t{s.dq} * s.dv;
  float* const s_n = reinterpret_cast<float*>(shared + kN);
  float c[kSide / 2], n[2] = {0.0f, 0.0f};
  const auto cell = [&](int j, int half) { return unit * size + int64_t{a0 + row + 8 * half} * s.dv + b0 + 8 * j + 2 * t4; };
#pragma unroll
  for (int j = 0; j < kSide / 8; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 two = job.c_begin != nullptr ? *reinterpret_cast<const float2*>(job.c_begin + cell(j, half)) : float2{0.0f, 0.0f};
      c[4 * j + 2 * half] = two.x;
      c[4 * j + 2 * half + 1] = two.y;
    }
  if (job.n_begin != nullptr && sums_n && part == 0) {
    n[0] = job.n_begin[unit * s.dq + a0 + pair];
    n[1] = job.n_begin[unit * s.dq + a0 + pair + 1];
  }
  const auto share_n = [&] {
    *reinterpret_cast<float2*>(s_n + part * kSide + pair) = make_float2(n[0], n[1]);
    meet(1, kConsumers);
  };
  const auto whole_n = [&] {
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < kParts; ++k) sum += s_n[k * kSide + thread];
    return sum;
  };

  // Where the thread's column pairs 8 j + 2 t4 of its rows lie in the state's boxes.
  const uint32_t state_at = base + kState + row * 128 + t4 * 4;
  // Of a, transposed: positions 8 (m / 2) + r, channels 8 (m % 2) on of the warp's 16.
  const int m = lane / 8, r = lane % 8;
  const uint32_t a_at = warp / 4 * kBox + (m / 2 * 8 + r) * 128 + (((warp % 4 * 2 + m % 2) ^ r) << 4);

  // The state before (going backwards: behind) chunk x; and the warp's part of <dC, C> + <dn, n> there, from the rounded
  // values: nothing comes from behind the sequence without a gradient of the last state.
  const auto hand_over = [&](int step) {
    const int x = chunk_of(step);
    const int64_t at = unit * s.chunks + x;
    const bool inner = x + 1 < chunks;
    float flow = 0.0f;
    barrier_wait(ready, static_cast<uint32_t>(step) & 1u);
    if (sums_n) share_n();
#pragma unroll
    for (int j = 0; j < kSide / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t two = pack(c[4 * j + 2 * half], c[4 * j + 2 * half + 1]);
        const uint32_t to = state_at + j / 8 * kStateBox + half * 1024 + ((j % 8 ^ g) << 4);
        if (job.flow != nullptr) {
          if (inner) {
            uint32_t other;
            asm volatile("ld.shared.u32 %0, [%1];" : "=r"(other) : "r"(to) : "memory");
            flow += dot_of_two(two, other);
          } else if (job.c_begin != nullptr) {
            const float2 other = *reinterpret_cast<const float2*>(job.c_last + cell(j, half));
            flow += dot_of_two(two, pack(other.x, other.y));
          }
        }
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(two) : "memory");
      }
    publish_shared();
    if (sums_n && thread < kSide) {
      const float value = whole_n();
      const int64_t own = a0 + thread;
      job.n_states[at * s.dq + own] = value;
      if (job.flow != nullptr) flow += value * (inner ? job.forward_n[(at + 1) * s.dq + own] : job.n_last[unit * s.dq + own]);
    }
    if (job.flow != nullptr) {
#pragma unroll
      for (int w = 16; w > 0; w /= 2) flow += __shfl_xor_sync(0xffffffffu, flow, w);
      if (lane == 0) job.flow[(at * job.tiles + tile) * kWarps + warp] = flow;
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(written);
  };

  float decay = job.decay[unit * s.chunks + chunk_of(0)];
  for (int i = 0; i < slices; ++i) {
    const int stage = i % kStages;
    if (i % parts == 0) {
      hand_over(i / parts);
      n[0] *= decay;
      n[1] *= decay;
#pragma unroll
      for (int e = 0; e < kSide / 2; ++e) c[e] *= decay;
      if (i / parts + 1 < chunks) decay = job.decay[unit * s.chunks + chunk_of(i / parts + 1)];
    }
    barrier_wait(full + 8 * stage, static_cast<uint32_t>(i / kStages) & 1u);
    const uint32_t tile_a = base + stage * kStage;
    const float* const w = reinterpret_cast<const float*>(shared + kWeights) + stage * 2 * kSlice;
    uint32_t fragments[4][4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t(&f)[4] = fragments[k];
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                   : "=r"(f[0]), "=r"(f[1]), "=r"(f[2]), "=r"(f[3])
                   : "r"(tile_a + a_at + k * 2048)
                   : "memory");
      const float2 low = *reinterpret_cast<const float2*>(w + k * 16 + 2 * t4), high = *reinterpret_cast<const float2*>(w + k * 16 + 8 + 2 * t4);
      f[0] = weighted(f[0], low.x, low.y);
      f[1] = weighted(f[1], low.x, low.y);
      f[2] = weighted(f[2], high.x, high.y);
      f[3] = weighted(f[3], high.x, high.y);
    }
    const uint64_t operand = across_lines(tile_a + kOperand, kBox);
    hold(c);
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma<1>(c, fragments[k], further(operand, k * 2048), true);
    wgmma_commit();
    if (sums_n) {  // two columns of 16 positions
      const unsigned char* column = shared + stage * kStage + pair / 64 * kBox + part * 16 * 128 + pair % 8 * 2;
      const int piece = pair % 64 / 8;
#pragma unroll
      for (int k = 0; k < 16; ++k) {
        const uint32_t two = *reinterpret_cast<const uint32_t*>(column + k * 128 + ((piece ^ k % 8) << 4));
        const float weight = w[kSlice + part * 16 + k];
        n[0] += weight * __uint_as_float(two << 16);
        n[1] += weight * __uint_as_float(two & 0xffff0000u);
      }
    }
    wgmma_wait<0>();
    hold(c);
    __syncwarp();
    if (lane == 0) barrier_arrive(empty + 8 * stage);
  }
  if (job.c_end != nullptr)
#pragma unroll
    for (int j = 0; j < kSide / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<float2*>(job.c_end + cell(j, half)) = make_float2(c[4 * j + 2 * half], c[4 * j + 2 * half + 1]);
  if (job.n_end == nullptr || !sums_n) return;
  meet(1, kConsumers);  // the last parts have been read
  share_n();
  if (thread < kSide) job.n_end[unit * s.dq + a0 + thread] = whole_n();
#endif
}

CUtensorMap states_map(const bf16* states, const MlstmShape& s) {
  const int64_t sizes[] = {s.dv, s.dq, s.units * s.chunks}, strides[] = {s.dv, int64_t{s.dq} * s.dv};
  const int box[] = {64, kSide, 1};
  return tensor_map(states, DType::bf16, sizes, strides, box);
}

}  // namespace

bool mlstm_wgmma_serves(Device device, int64_t dq, int64_t dv) {
  return dq % kSide == 0 && dv % kSide == 0 &&
         hopper_multiprocessors(device, reinterpret_cast<const void*>(states_kernel)) > 0;
}

void mlstm_states_wgmma(const MlstmStateJob<bf16>& job, Stream stream) {
  const CUtensorMap states = states_map(job.states, job.shape);
  const Maps maps{mlstm_rows_map(job.a, job.shape, job.shape.dq), mlstm_rows_map(job.b, job.shape, job.shape.dv), states,
                  job.flow != nullptr ? states_map(job.forward_states, job.shape) : states};
  launch(states_kernel, {.grid = job.shape.units * job.tiles, .block = kThreads, .shared = kShared, .stream = stream}, maps, job);
}

}  // namespace krait::kernels::cuda
