// The maps of an mLSTM block on tensor cores. A warp has 32 channels, 8 neighbouring ones a lane, and walks down rows, 16 a
// step; what it reads comes by asynchronous copies that only the copying thread reads again.
// The summed index of a product may be numbered at will: pair j of lane t's 8 channels is columns 2 t, 2 t + 1 of an 8 x 8
// tile, so that rows as they lie in memory are fragments, and a result's fragment is the lane's own channels again. Two
// neighbouring pairs are a block of 4 x 4 of every lane, zero where lanes differ.
// What is not bf16 (G W, dgates) is the sum of two bf16 values, good for 16 bits.
#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/causal_conv1d.cuh"
#include "kernels/cuda/mlstm_maps.cuh"
#include "kernels/cuda/multiprocessors.h"

namespace krait::kernels::cuda {

namespace {

constexpr int kForwardWarps = 8, kBackwardWarps = 4, kStep = 16, kWarpChannels = 32, kStages = 3;
// Blocks that fill an H100; fixed numbers, so that every GPU gives the same bits.
constexpr int64_t kForwardBlocks = 2 * kMultiprocessors, kBackwardBlocks = 3 * kMultiprocessors;

struct Eight { uint32_t two[4]; };  // values of a row, packed

__device__ __forceinline__ uint32_t turned(uint32_t tile) {  // an 8 x 8 tile transposed
  uint32_t out;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(tile));
  return out;
}

/// c (16, 8) += a (16, 8) b (8, 8).
__device__ __forceinline__ void mma_half(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}

__device__ __forceinline__ float low_of(uint32_t two) { return __uint_as_float(two << 16); }
__device__ __forceinline__ float high_of(uint32_t two) { return __uint_as_float(two & 0xffff0000u); }
// Two values as a sum of two pairs.
__device__ __forceinline__ void halves(uint32_t& most, uint32_t& rest, float a, float b) {
  most = pack(a, b);
  rest = pack(a - low_of(most), b - high_of(most));
}

// Value i of row `gate` of G W for block n, maps `part` to part + maps - 1.
__device__ __forceinline__ float gate_of_input(const MapsWeights<bf16>& m, int gate, int part, int maps, int n, int i) {
  float sum = 0.0f;
  for (int j = part; j < part + maps; ++j)
#pragma unroll
    for (int o = 0; o < 4; ++o)
      sum += static_cast<float>(m.gates_of(gate, j, n)[o]) * static_cast<float>(m.w[j][(int64_t{n} * 4 + o) * 4 + i]);
  return sum;
}

// A thread's own places in the ring of stages: [stage][piece][thread].
template <int kThreads, int kPieces>
struct Ring {
  uint4* own;
  __device__ explicit Ring(uint4* shared) : own(shared + threadIdx.x) {}
  __device__ __forceinline__ uint4* at(int stage, int piece) const { return own + (stage * kPieces + piece) * kThreads; }
  __device__ __forceinline__ void bring(int stage, int piece, const bf16* from, bool valid) const {
    copy_async(at(stage, piece), from, valid);
  }
  /// `lanes` further: that thread's, behind its wait.
  __device__ __forceinline__ Eight take(int stage, int piece, int lanes = 0) const {
    const uint4 v = at(stage, piece)[lanes];
    return {{v.x, v.y, v.z, v.w}};
  }
  static constexpr int kBytes = kStages * kPieces * kThreads * 16;
};

__device__ __forceinline__ void put(bf16* to, const Eight& v) {
  *reinterpret_cast<uint4*>(to) = make_uint4(v.two[0], v.two[1], v.two[2], v.two[3]);
}

using ForwardSums = float[kForwardWarps][kStep][kMapsGates];
template <bool kConvolves>
struct ForwardShared {
  using Ring = cuda::Ring<32 * kForwardWarps, kConvolves ? 2 : 4>;
  ForwardSums sums[2];
  float4 taps[kConvolves ? kForwardWarps : 1][kWarpChannels];  // [channel of a lane][t4], so that lanes' lie side by side
  float bias[kConvolves ? kForwardWarps : 1][kWarpChannels];
  static constexpr int kBytes() { return Ring::kBytes + static_cast<int>(sizeof(ForwardShared)); }
};

__device__ __forceinline__ float value_of(const void* from, bool wide, int64_t i) {
  return wide ? static_cast<const float*>(from)[i] : static_cast<float>(static_cast<const bf16*>(from)[i]);
}

// silu(conv) of rows r - 3 to r, as the convolution's own kernels sum it.
__device__ __forceinline__ Eight convolved(const Eight (&x)[4], const float4* taps, const float* bias) {
  Eight out;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    float y[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 w = taps[(2 * j + i) * 4];
      const auto of = [&](int row) { return i == 0 ? low_of(x[row].two[j]) : high_of(x[row].two[j]); };
      y[i] = silu_of(fmaf(w.x, of(0), fmaf(w.y, of(1), fmaf(w.z, of(2), fmaf(w.w, of(3), bias[(2 * j + i) * 4])))));
    }
    out.two[j] = pack(y[0], y[1]);
  }
  return out;
}

// Bound by memory: 5 r e 2 bytes, with the convolution as without.
template <bool kConvolves>
__global__ void __launch_bounds__(32 * kForwardWarps, 2)
    maps_forward_mma_kernel(const MapsForwardJob job, const MapsWeights<bf16> maps, int64_t rows, int64_t own_rows) {
  using Shared = ForwardShared<kConvolves>;
  extern __shared__ uint4 raw[];
  const typename Shared::Ring ring(raw);
  Shared& shared = *reinterpret_cast<Shared*>(raw + Shared::Ring::kBytes / 16);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32, g = lane / 4, t4 = lane % 4;
  const int e = maps.blocks * 4, channel = (static_cast<int>(blockIdx.x) * kForwardWarps + warp) * kWarpChannels + 8 * t4;
  const bool real = channel < e;  // of all lanes of a warp alike
  const int c = real ? channel : 8 * t4;
  const int64_t first = int64_t{blockIdx.y} * own_rows, last = min(first + own_rows, rows);
  const int steps = static_cast<int>((last - first + kStep - 1) / kStep);
  const auto bring = [&](int s) {
    const int64_t r0 = first + int64_t{s} * kStep + g;
    const int stage = s % kStages;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t r = r0 + 8 * half;
      const bool valid = real && r < last;
      const int64_t row = valid ? r : first;
      ring.bring(stage, half, job.x_m.data + row * job.x_m.stride + c, valid);
      if constexpr (!kConvolves) ring.bring(stage, 2 + half, job.x_c + row * e + c, valid);
    }
  };
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) bring(s);
    copy_commit();
  }
  [[maybe_unused]] const float4* taps = nullptr;
  [[maybe_unused]] const float* bias = nullptr;
  [[maybe_unused]] int64_t t = 0;  // of row g
  if constexpr (kConvolves) {
    const MapsConvolution& v = job.convolution;
    t = (first + g) % v.l;
    const int64_t own = c + g;  // 8 lanes of a t4 have its 8 channels
    const auto tap = [&](int j) { return value_of(v.weight, v.wide, own * 4 + j); };
    shared.taps[warp][g * 4 + t4] = make_float4(tap(0), tap(1), tap(2), tap(3));
    shared.bias[warp][g * 4 + t4] = v.bias != nullptr ? value_of(v.bias, v.wide, own) : 0.0f;
    taps = shared.taps[warp] + t4;
    bias = shared.bias[warp] + t4;
  }

  uint32_t w[3][2][2][2] = {}, by_c[2][2][2], by_m[2][2][2];  // [map][block][tile][half of the block]; [block][half][most, rest]
#pragma unroll
  for (int u = 0; u < 2; ++u) {
    const int n = c / 4 + u;
    if (g / 2 == t4)
#pragma unroll
      for (int part = 0; part < 3; ++part)
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          const bf16* from = maps.w[part] + (int64_t{n} * 4 + 2 * tile + g % 2) * 4;
          w[part][u][tile][0] = *reinterpret_cast<const uint32_t*>(from);
          w[part][u][tile][1] = *reinterpret_cast<const uint32_t*>(from + 2);
        }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      halves(by_c[u][half][0], by_c[u][half][1], gate_of_input(maps, g, 0, 2, n, 2 * half), gate_of_input(maps, g, 0, 2, n, 2 * half + 1));
      halves(by_m[u][half][0], by_m[u][half][1], gate_of_input(maps, g, 2, 1, n, 2 * half), gate_of_input(maps, g, 2, 1, n, 2 * half + 1));
    }
  }

  for (int s = 0; s < steps; ++s) {
    const int stage = s % kStages;
    copy_wait<kStages - 2>();
    const int64_t r0 = first + int64_t{s} * kStep;
    Eight in_c[2], in_m[2] = {ring.take(stage, 0), ring.take(stage, 1)};
    if constexpr (kConvolves) {
      __syncwarp();  // the rows before are other lanes'
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Eight x[4];
        x[3] = in_m[half];
#pragma unroll
        for (int j = 1; j < 4; ++j) {
          const int row = g + 8 * half - j;
          const int64_t at = t + 8 * half, in_sequence = at < job.convolution.l ? at : at - job.convolution.l;
          if (in_sequence < j) {
            x[3 - j] = {};
          } else if (row >= 0) {
            x[3 - j] = ring.take(stage, row / 8, -4 * (g - row % 8));
          } else if (s > 0) {
            x[3 - j] = ring.take((s - 1) % kStages, 1, 4 * (row + 8 - g));
          } else {
            const uint4 v = real ? *reinterpret_cast<const uint4*>(job.x_m.data + (first + row) * job.x_m.stride + c) : uint4{};
            x[3 - j] = {{v.x, v.y, v.z, v.w}};
          }
        }
        in_c[half] = convolved(x, taps, bias);
        if (const int64_t r = r0 + g + 8 * half; real && r < last) put(job.convolution.x_c + r * e + c, in_c[half]);
      }
      for (t += kStep; t >= job.convolution.l;) t -= job.convolution.l;
      __syncwarp();  // before what they need is written over
    } else {
      in_c[0] = ring.take(stage, 2);
      in_c[1] = ring.take(stage, 3);
    }
    if (s + kStages - 1 < steps) bring(s + kStages - 1);
    copy_commit();
    float gate[4] = {};
    Eight out[3][2];
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const uint32_t of_c[4] = {in_c[0].two[2 * u], in_c[1].two[2 * u], in_c[0].two[2 * u + 1], in_c[1].two[2 * u + 1]};
      const uint32_t of_m[4] = {in_m[0].two[2 * u], in_m[1].two[2 * u], in_m[0].two[2 * u + 1], in_m[1].two[2 * u + 1]};
#pragma unroll
      for (int part = 0; part < 3; ++part)
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          float y[4] = {};
          mma(y, part == 2 ? of_m : of_c, w[part][u][tile][0], w[part][u][tile][1]);
          out[part][0].two[2 * u + tile] = pack(y[0], y[1]);
          out[part][1].two[2 * u + tile] = pack(y[2], y[3]);
        }
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        mma(gate, of_c, by_c[u][0][x], by_c[u][1][x]);
        mma(gate, of_m, by_m[u][0][x], by_m[u][1][x]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t r = r0 + g + 8 * half, to = r * e + c;
      if (real && r < last) {
        put(job.q + to, out[0][half]);
        put(job.k + to, out[1][half]);
        put(job.v + to, out[2][half]);
      }
      *reinterpret_cast<float2*>(&shared.sums[s % 2][warp][g + 8 * half][2 * t4]) =
          real ? make_float2(gate[2 * half], gate[2 * half + 1]) : make_float2(0.0f, 0.0f);
    }
    __syncthreads();  // one a step is enough: the other half of the sums is written before the next
    if (thread < kStep * kMapsGates) {
      const int row = thread / kMapsGates, of = thread % kMapsGates;
      float sum = 0.0f;
#pragma unroll
      for (int x = 0; x < kForwardWarps; ++x) sum += shared.sums[s % 2][x][row][of];
      if (r0 + row < last) job.partial[((r0 + row) * gridDim.x + blockIdx.x) * kMapsGates + of] = sum;
    }
  }
}

template <int kMaps>
using BackwardRing = Ring<32 * kBackwardWarps, 2 * (2 + kMaps)>;

// Bound by memory: (kMaps + 3) r e 2 bytes.
template <int kMaps>
__global__ void __launch_bounds__(32 * kBackwardWarps, 3)
    maps_backward_mma_kernel(const MapsBackwardJob job, const MapsWeights<bf16> maps, int64_t rows, int64_t own_rows) {
  extern __shared__ uint4 raw[];
  const BackwardRing<kMaps> ring(raw);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32, g = lane / 4, t4 = lane % 4;
  const int e = maps.blocks * 4, channel0 = (static_cast<int>(blockIdx.x) * kBackwardWarps + warp) * kWarpChannels;
  if (channel0 >= e) return;
  const int c = channel0 + 8 * t4;
  const int64_t first = int64_t{blockIdx.y} * own_rows, last = min(first + own_rows, rows);
  const int steps = static_cast<int>((last - first + kStep - 1) / kStep);
  const bool more = job.more.data != nullptr;
  const auto bring = [&](int s) {
    const int64_t r0 = first + int64_t{s} * kStep + g;
    const int stage = s % kStages;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool valid = r0 + 8 * half < last;
      const int64_t row = valid ? r0 + 8 * half : first;
      const bf16* const x = job.x.data + row * job.x.stride + c;
      ring.bring(stage, half, x, valid);
      ring.bring(stage, 2 + half, more ? job.more.data + row * job.more.stride + c : x, valid && more);
#pragma unroll
      for (int j = 0; j < kMaps; ++j) ring.bring(stage, 4 + 2 * j + half, job.dy[j] + row * e + c, valid);
    }
  };
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) bring(s);
    copy_commit();
  }
  float2 next[2];
  const auto gates_of = [&](int s) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t r = first + int64_t{s} * kStep + g + 8 * half;
      next[half] = r < last ? *reinterpret_cast<const float2*>(job.dgates + r * kMapsGates + 2 * t4) : make_float2(0.0f, 0.0f);
    }
  };
  gates_of(0);

  uint32_t w[kMaps][2][2][2] = {}, by[2][2], by_rest[2][2];  // [map][block][tile][half of the block]; [block][tile]
#pragma unroll
  for (int u = 0; u < 2; ++u)
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const int i = 2 * tile + g % 2;
      if (g / 2 == t4)
#pragma unroll
        for (int j = 0; j < kMaps; ++j)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const bf16* const from = maps.w[job.part + j] + int64_t{c / 4 + u} * 16 + 8 * half + i;
            w[j][u][tile][half] = pack(static_cast<float>(from[0]), static_cast<float>(from[4]));
          }
      const int n = channel0 / 4 + g / 2 * 2 + u;
      halves(by[u][tile], by_rest[u][tile], gate_of_input(maps, 2 * t4, job.part, kMaps, n, i),
             gate_of_input(maps, 2 * t4 + 1, job.part, kMaps, n, i));
    }

  float of_maps[kMaps][2][2][4] = {}, of_gates[2][4] = {};
  for (int s = 0; s < steps; ++s) {
    const int stage = s % kStages;
    copy_wait<kStages - 2>();
    Eight x[2], out[2], up[kMaps][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      x[half] = ring.take(stage, half);
      out[half] = ring.take(stage, 2 + half);
#pragma unroll
      for (int j = 0; j < kMaps; ++j) up[j][half] = ring.take(stage, 4 + 2 * j + half);
    }
    if (s + kStages - 1 < steps) bring(s + kStages - 1);
    copy_commit();
    uint32_t d[2], rest[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) halves(d[half], rest[half], next[half].x, next[half].y);
    if (s + 1 < steps) gates_of(s + 1);

    const uint32_t d_turned[2] = {turned(d[0]), turned(d[1])}, rest_turned[2] = {turned(rest[0]), turned(rest[1])};
    const uint32_t d_rows[4] = {d[0], d[1], rest[0], rest[1]};
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const uint32_t xt[4] = {turned(x[0].two[2 * u]), turned(x[0].two[2 * u + 1]), turned(x[1].two[2 * u]),
                              turned(x[1].two[2 * u + 1])};
      mma(of_gates[u], xt, d_turned[0], d_turned[1]);
      mma(of_gates[u], xt, rest_turned[0], rest_turned[1]);
      float dx[2][4];
#pragma unroll
      for (int tile = 0; tile < 2; ++tile)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          dx[tile][2 * half] = low_of(out[half].two[2 * u + tile]);
          dx[tile][2 * half + 1] = high_of(out[half].two[2 * u + tile]);
        }
#pragma unroll
      for (int j = 0; j < kMaps; ++j) {
        const uint32_t rows_of[4] = {up[j][0].two[2 * u], up[j][1].two[2 * u], up[j][0].two[2 * u + 1], up[j][1].two[2 * u + 1]};
        const uint32_t columns_of[4] = {turned(rows_of[0]), turned(rows_of[2]), turned(rows_of[1]), turned(rows_of[3])};
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          mma(of_maps[j][u][tile], columns_of, xt[tile], xt[2 + tile]);
          mma(dx[tile], rows_of, w[j][u][tile][0], w[j][u][tile][1]);
        }
      }
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        mma(dx[tile], d_rows, by[u][tile], by[u][tile]);
        mma_half(dx[tile], d[0], d[1], by_rest[u][tile]);
#pragma unroll
        for (int half = 0; half < 2; ++half) out[half].two[2 * u + tile] = pack(dx[tile][2 * half], dx[tile][2 * half + 1]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t r = first + int64_t{s} * kStep + g + 8 * half;
      if (r < last) put(job.dx.data + r * job.dx.stride + c, out[half]);
    }
  }

  // Row g of a tile is channel 4 u + g % 2 (+ 2 in the other half) of lane g / 2, column 2 t4 + x channel 4 u + 2 tile + x
  // of lane t4: those of one lane are a block.
  float* const to = job.partial + int64_t{blockIdx.y} * (16 * kMaps + 32) * maps.blocks;
#pragma unroll
  for (int u = 0; u < 2; ++u)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        const int row = g % 2 + 2 * half;
        if (g / 2 == t4)
#pragma unroll
          for (int j = 0; j < kMaps; ++j)
#pragma unroll
            for (int tile = 0; tile < 2; ++tile)
              to[int64_t{16 * j + 4 * row + 2 * tile + x} * maps.blocks + c / 4 + u] = of_maps[j][u][tile][2 * half + x];
        to[int64_t{16 * kMaps + 4 * (2 * t4 + x) + row} * maps.blocks + channel0 / 4 + g / 2 * 2 + u] = of_gates[u][2 * half + x];
      }
}

// Rows of a block: whole steps, so many that `blocks` blocks do all rows of `groups` groups of channels.
int64_t rows_of_block(int64_t rows, int64_t groups, int64_t blocks) {
  const int64_t chunks = std::max<int64_t>(1, blocks / groups);
  return ceil_div(ceil_div(rows, chunks), kStep) * kStep;
}
int64_t backward_groups(int64_t e) { return ceil_div(e, kBackwardWarps * kWarpChannels); }

}  // namespace

bool mlstm_maps_mma_serve(int64_t e) { return e % kWarpChannels == 0 && e < (int64_t{1} << 24); }
int64_t mlstm_maps_groups(int64_t e) { return ceil_div(e, kForwardWarps * kWarpChannels); }
int64_t mlstm_maps_chunks(int64_t rows, int64_t e) {
  return ceil_div(rows, rows_of_block(rows, backward_groups(e), kBackwardBlocks));
}

void mlstm_maps_forward_mma(const MapsForwardJob& job, const MapsWeights<bf16>& maps, int64_t rows, Stream stream) {
  const int64_t groups = mlstm_maps_groups(int64_t{maps.blocks} * 4), own = rows_of_block(rows, groups, kForwardBlocks);
  const auto with = [&]<bool kConvolves>() {
    launch(maps_forward_mma_kernel<kConvolves>,
           {.grid = groups, .grid_y = ceil_div(rows, own), .block = 32 * kForwardWarps,
            .shared = ForwardShared<kConvolves>::kBytes(), .stream = stream},
           job, maps, rows, own);
  };
  if (job.convolution.x_c != nullptr)
    with.template operator()<true>();
  else
    with.template operator()<false>();
}

void mlstm_maps_backward_mma(const MapsBackwardJob& job, const MapsWeights<bf16>& maps, int64_t rows, Stream stream) {
  const int64_t groups = backward_groups(int64_t{maps.blocks} * 4), own = rows_of_block(rows, groups, kBackwardBlocks);
  const auto with = [&]<int kMaps>() {
    launch(maps_backward_mma_kernel<kMaps>,
           {.grid = groups, .grid_y = ceil_div(rows, own), .block = 32 * kBackwardWarps, .shared = BackwardRing<kMaps>::kBytes,
            .stream = stream},
           job, maps, rows, own);
  };
  if (job.dy[1] != nullptr)
    with.template operator()<2>();
  else
    with.template operator()<1>();
}

}  // namespace krait::kernels::cuda
