#pragma once
// Products of a linear map whose result goes through an activation before it is written, for sm_90a:
//   plain:          y = x w^T + bias
//   gelu:           pre = x w^T + bias, y = gelu(pre)
//   gelu_gradient:  g = bf16(dy w) gelu'(pre) and the column sums of g
//   glu:            both = x [w_gate; w_up]^T, y = silu(gate) up
//   glu_gradient:   both's gradient from bf16(dh), dh = dy w
//   rope:           y = x w^T + bias, of which the first columns are heads of 64 that are rotated (halves)
// Two blocks of a cluster work on neighbouring tiles of 128 rows x 256 columns and bring each other half of the
// weights. In a block one thread keeps three or four tiles of 64 terms on their way (TMA); two warpgroups multiply (wgmma).
// A warpgroup finishes the tile before, which it keeps rounded to bf16, in pieces between its products of the next tile;
// what the gradients read for that comes a piece ahead through shared memory.
// Bound by the products: 2 r n k FLOPs.
#include <cuda_bf16.h>

#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/exp2.cuh"
#include "kernels/cuda/tma.cuh"
#include "kernels/cuda/wgmma.cuh"
#include "kernels/epilogue.h"

namespace krait::kernels::cuda {

enum class MapForm { plain, gelu, gelu_gradient, glu, glu_gradient, rope };

struct MapArguments {
  bf16 *out = nullptr, *out2 = nullptr;  // gelu: y, pre; gelu_gradient: g; glu: y, both; glu_gradient: both's gradient
  const bf16 *bias = nullptr, *in = nullptr;  // in: pre or both
  float* partial = nullptr;              // gelu_gradient: (ceil(rows / 64), n), or null
  int64_t rows = 0;
  int n = 0;      // columns of y, pre, g or dh; both has twice as many
  int steps = 0;  // k / 64
  const float *cos = nullptr, *sin = nullptr;  // rope: (positions, 32)
  int length = 1, offset = 0, rotated = 0;     // row r has position offset + r % length; columns that rotate
};

inline constexpr int kMapRows = 128, kMapColumns = 256, kMapTerms = 64;
inline constexpr int kMapLeft = kMapRows * kMapTerms * 2, kMapRight = kMapColumns * kMapTerms * 2,
                     kMapStage = kMapLeft + kMapRight;
inline constexpr int kMapThreads = 384;
inline constexpr int kMapLeastSteps = 8;  // of a product, so that the tile before is finished in them

/// Shared memory of a block.
template <MapForm F>
struct MapPlan {
  static constexpr bool kReads = F == MapForm::gelu_gradient || F == MapForm::glu_gradient;
  static constexpr int kStages = kReads ? 3 : 4;
  static constexpr int kSlots = 4;                           // pieces of what is read
  static constexpr int kHalf = kMapRows * 32 * 2;            // 32 columns
  static constexpr int kSlot = F == MapForm::glu_gradient ? 2 * kHalf : kHalf;
  static constexpr int kRing = kStages * kMapStage;
  static constexpr int kBarriers = kRing + (kReads ? kSlots * kSlot : 0);
  static constexpr int kSums = kBarriers + 128;
  static constexpr int kBytes = kSums + (F == MapForm::gelu_gradient ? 8 * kMapColumns * 4 : 0);
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define KRAIT_WGMMA 1
#endif

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define KRAIT_PAIR_OF_BLOCKS
#else
#define KRAIT_PAIR_OF_BLOCKS __cluster_dims__(2)
#endif

#ifdef KRAIT_WGMMA
namespace fused_map {

__device__ __forceinline__ float low_half(uint32_t v) { return __uint_as_float(v << 16); }
__device__ __forceinline__ float high_half(uint32_t v) { return __uint_as_float(v & 0xFFFF0000u); }

// 1 / (1 + 2^x), for results that are rounded to bf16.
__device__ __forceinline__ float sigmoid_of_minus(float x) { return reciprocal_fast(1.0f + exp2_fast(x)); }
// gelu_tanh of kernels/epilogue.h.
__device__ __forceinline__ float gelu_sigmoid(float x) {
  constexpr float k = -kLog2e * kGeluScale<float>;
  return sigmoid_of_minus(x * fmaf(x * x, k * kGeluCubic<float>, k));
}
__device__ __forceinline__ float gelu(float x) { return x * gelu_sigmoid(x); }
__device__ __forceinline__ float gelu_slope(float x) {
  const float s = gelu_sigmoid(x);
  return fmaf(x * fmaf(-s, s, s), fmaf(x * x, 3.0f * kGeluCubic<float> * kGeluScale<float>, kGeluScale<float>), s);
}
__device__ __forceinline__ ValueAndSlope<float> silu(float x) {
  const float c = fmaxf(x, -80.0f), s = sigmoid_of_minus(-kLog2e * c);
  return {c * s, s * fmaf(c, 1.0f - s, 1.0f)};
}

// The tile that a warpgroup finishes: 32 columns a piece, of which a thread has 8 neighbours in two rows 8 apart.
template <MapForm F>
struct Finish {
  static constexpr bool kGlu = F == MapForm::glu || F == MapForm::glu_gradient;
  static constexpr bool kReads = MapPlan<F>::kReads;
  static constexpr int kPieces = F == MapForm::glu || F == MapForm::rope ? 4 : 8;
  const MapArguments& p;
  float* sums;       // of the warp: a value for each of 256 columns
  int lane;
  int64_t row = 0;   // first of the thread's two
  int64_t at = 0;    // of the thread's first 8 columns, in a row of n, or in the gate's half of a row of 2n
  bool here[2] = {false, false};
  uint32_t ring, ring_full, ring_empty;  // of what is read; where the thread's first 16 bytes are in a slot
  int slot = 0;
  uint32_t phase = 0;
  int64_t angle[2] = {0, 0};  // of rope: where the rows' angles of the thread's columns are

  __device__ __forceinline__ int64_t stride() const { return kGlu ? 2 * int64_t{p.n} : int64_t{p.n}; }
  __device__ __forceinline__ void begin(int64_t first_row, int column) {
    row = first_row;
    at = column + 8 * (lane % 4);
    here[0] = row < p.rows;
    here[1] = row + 8 < p.rows;
    if constexpr (F == MapForm::rope)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        angle[r] = (p.offset + static_cast<uint32_t>(row + 8 * r) % static_cast<uint32_t>(p.length)) * 32 + 8 * (lane % 4);
  }
  __device__ __forceinline__ void store(bf16* to, int r, uint4 v) const {
    if (here[r]) *reinterpret_cast<uint4*>(to) = v;
  }

  template <int kPiece>
  __device__ __forceinline__ void piece(const uint32_t (&held)[64]) {
    if constexpr (kPiece < kPieces) {
      uint4 in[kReads ? (kGlu ? 4 : 2) : 1];
      if constexpr (kReads) {
        barrier_wait(ring_full + 8 * slot, phase);
        const uint32_t from = ring + slot * MapPlan<F>::kSlot;
#pragma unroll
        for (int q = 0; q < (kGlu ? 4 : 2); ++q)
          asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                       : "=r"(in[q].x), "=r"(in[q].y), "=r"(in[q].z), "=r"(in[q].w)
                       : "r"(from + q / 2 * MapPlan<F>::kHalf + q % 2 * 8 * 64)
                       : "memory");
        __syncwarp();
        if (lane == 0) barrier_arrive(ring_empty + 8 * slot);
        if (++slot == MapPlan<F>::kSlots) {
          slot = 0;
          phase ^= 1;
        }
      }
      float total[F == MapForm::gelu_gradient ? 8 : 1] = {};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        [[maybe_unused]] const uint32_t* v = held + kPiece * 8 + r * 4;
        [[maybe_unused]] const int64_t place = (row + 8 * r) * stride() + at + 32 * kPiece;
        uint4 a, b;
        uint32_t* first = reinterpret_cast<uint32_t*>(&a);
        uint32_t* second = reinterpret_cast<uint32_t*>(&b);
        if constexpr (F == MapForm::plain) {
          store(p.out + place, r, uint4{v[0], v[1], v[2], v[3]});
        } else if constexpr (F == MapForm::gelu) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            first[i] = v[i];
            second[i] = pack(gelu(low_half(v[i])), gelu(high_half(v[i])));
          }
          store(p.out2 + place, r, a);
          store(p.out + place, r, b);
        } else if constexpr (F == MapForm::gelu_gradient) {
          const uint32_t* pre = reinterpret_cast<const uint32_t*>(&in[r]);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            first[i] = pack(low_half(v[i]) * gelu_slope(low_half(pre[i])), high_half(v[i]) * gelu_slope(high_half(pre[i])));
            total[2 * i] += low_half(first[i]);
            total[2 * i + 1] += high_half(first[i]);
          }
          store(p.out + place, r, a);
        } else if constexpr (F == MapForm::glu) {
          const uint32_t* up = v + 32;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            first[i] = up[i];
            second[i] = pack(silu(low_half(v[i])).value * low_half(up[i]), silu(high_half(v[i])).value * high_half(up[i]));
          }
          store(p.out2 + place, r, uint4{v[0], v[1], v[2], v[3]});
          store(p.out2 + place + p.n, r, a);
          store(p.out + (row + 8 * r) * p.n + at + 32 * kPiece, r, b);
        } else if constexpr (F == MapForm::rope) {
          const uint32_t *one = held + kPiece * 16 + r * 4, *other = one + 8;
          if (at + 64 * kPiece < p.rotated && here[r]) {
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
              const float4 c = __ldg(reinterpret_cast<const float4*>(p.cos + angle[r] + 2 * i)),
                           s = __ldg(reinterpret_cast<const float4*>(p.sin + angle[r] + 2 * i));
              const auto turn = [&](int k, float c0, float c1, float s0, float s1) {
                const float a0 = low_half(one[k]), a1 = high_half(one[k]), b0 = low_half(other[k]), b1 = high_half(other[k]);
                first[k] = pack(a0 * c0 - b0 * s0, a1 * c1 - b1 * s1);
                second[k] = pack(a0 * s0 + b0 * c0, a1 * s1 + b1 * c1);
              };
              turn(i, c.x, c.y, s.x, s.y);
              turn(i + 1, c.z, c.w, s.z, s.w);
            }
          } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              first[i] = one[i];
              second[i] = other[i];
            }
          }
          bf16* to = p.out + (row + 8 * r) * p.n + at + 64 * kPiece;
          store(to, r, a);
          store(to + 32, r, b);
        } else {
          const uint32_t *gate = reinterpret_cast<const uint32_t*>(&in[r]), *up = reinterpret_cast<const uint32_t*>(&in[2 + r]);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const auto low = silu(low_half(gate[i])), high = silu(high_half(gate[i]));
            const float dl = low_half(v[i]), dh = high_half(v[i]);
            first[i] = pack(dl * low_half(up[i]) * low.slope, dh * high_half(up[i]) * high.slope);
            second[i] = pack(dl * low.value, dh * high.value);
          }
          store(p.out + place, r, a);
          store(p.out + place + p.n, r, b);
        }
      }
      if constexpr (F == MapForm::gelu_gradient) column_sums<kPiece>(total);
    }
  }

  // Of the warp's 16 rows; every lane ends up with one column.
  template <int kPiece>
  __device__ __forceinline__ void column_sums(float (&t)[8]) {
    if (p.partial == nullptr) return;
    int width = 4, column = 0;
#pragma unroll
    for (int bit = 16; bit >= 4; bit /= 2, width /= 2) {
      const bool upper = (lane & bit) != 0;
      if (upper) column += width;
#pragma unroll
      for (int i = 0; i < width; ++i) {
        const float keep = upper ? t[width + i] : t[i], give = upper ? t[i] : t[width + i];
        t[i] = keep + __shfl_xor_sync(0xffffffffu, give, bit);
      }
    }
    sums[32 * kPiece + 8 * (lane % 4) + column] = t[0];
  }
  // The four warps of the warpgroup, in order. block_row: the warpgroup's first row.
  __device__ __forceinline__ void join_sums(const float* of_warps, int64_t block_row, int column, int thread, int barrier) {
    if constexpr (F == MapForm::gelu_gradient) {
      if (p.partial == nullptr) return;
      meet(barrier, 128);
      float2 total{0, 0};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float2 s = *reinterpret_cast<const float2*>(of_warps + w * kMapColumns + 2 * thread);
        total.x += s.x;
        total.y += s.y;
      }
      if (block_row < p.rows)
        *reinterpret_cast<float2*>(p.partial + block_row / 64 * p.n + column + 2 * thread) = total;
      meet(barrier, 128);
    }
  }
};

}  // namespace fused_map
#endif  // KRAIT_WGMMA

// map_x: rows of x, 64 terms x 128; map_w: rows of w, 128 at a time, in an order that gives a thread of wgmma's result 8
// neighbouring columns: 32 rows are taken as (4, 4, 2) with the first two exchanged; map_in: 32 columns x 128 rows of `in`.
template <MapForm F>
__global__ void KRAIT_PAIR_OF_BLOCKS __launch_bounds__(kMapThreads, 1)
    fused_map_kernel(const __grid_constant__ CUtensorMap map_x, const __grid_constant__ CUtensorMap map_w,
                     const __grid_constant__ CUtensorMap map_in, const __grid_constant__ MapArguments p) {
#ifdef KRAIT_WGMMA
  using namespace fused_map;
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t base = shared_address(shared);
  using Plan = MapPlan<F>;
  const auto full = [&](int stage) { return base + Plan::kBarriers + 8 * stage; };
  const auto empty = [&](int stage) { return base + Plan::kBarriers + 32 + 8 * stage; };
  const auto ring_full = [&](int slot) { return base + Plan::kBarriers + 64 + 8 * slot; };
  const auto ring_empty = [&](int slot) { return base + Plan::kBarriers + 96 + 8 * slot; };
  const uint32_t rank = cluster_rank();
  if (threadIdx.x == 0) {
    for (int s = 0; s < Plan::kStages; ++s) {
      barrier_init(full(s), 1);
      barrier_init(empty(s), 16);  // the warps that multiply, of both blocks
    }
    for (int s = 0; s < Plan::kSlots; ++s) {
      barrier_init(ring_full(s), 1);
      barrier_init(ring_empty(s), 8);
    }
    barriers_visible();
  }
  cluster_barrier();

  constexpr bool kBias = F == MapForm::plain || F == MapForm::gelu || F == MapForm::rope;
  constexpr int kColumns = F == MapForm::glu ? kMapColumns / 2 : kMapColumns;
  const int across = p.n / kColumns;
  const int64_t tiles = (p.rows + 2 * kMapRows - 1) / (2 * kMapRows) * across;  // of both blocks together
  const int64_t clusters = gridDim.x / 2, first_tile = blockIdx.x / 2;
  const int group = static_cast<int>(threadIdx.x) / 128;
  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x == 0) {
      int stage = 0, slot = 0, row_before = 0, column_before = 0;
      uint32_t phase = 0, slot_phase = 0;
      const auto bring_piece = [&](int piece) {
        barrier_wait(ring_empty(slot), slot_phase ^ 1);
        barrier_expect(ring_full(slot), Plan::kSlot);
        const uint32_t to = base + Plan::kRing + slot * Plan::kSlot;
        bring_box(to, map_in, ring_full(slot), column_before + 32 * piece, row_before);
        if (F == MapForm::glu_gradient) bring_box(to + Plan::kHalf, map_in, ring_full(slot), p.n + column_before + 32 * piece, row_before);
        if (++slot == Plan::kSlots) {
          slot = 0;
          slot_phase ^= 1;
        }
      };
      for (int64_t t = first_tile; t < tiles; t += clusters) {
        const int row = static_cast<int>((t / across * 2 + rank) * kMapRows), column = static_cast<int>(t % across) * kColumns;
        // Of glu the first block brings the gates, the second the values that they gate.
        const int w_row = column + static_cast<int>(rank) * (F == MapForm::glu ? p.n : kMapColumns / 2);
        for (int k = 0; k < p.steps; ++k) {
          if (Plan::kReads && t != first_tile && k < 8) bring_piece(k);
          barrier_wait(empty(stage), phase ^ 1);
          barrier_expect(full(stage), kMapStage);
          const uint32_t at = base + stage * kMapStage;
          bring_box(at, map_x, full(stage), k * kMapTerms, row);
          bring_box_to(at + kMapLeft + rank * (kMapRight / 2), map_w, full(stage), k * kMapTerms, 0, 0, 0, w_row / 32, 3);
          if (++stage == Plan::kStages) {
            stage = 0;
            phase ^= 1;
          }
        }
        row_before = row;
        column_before = column;
      }
      if (Plan::kReads)
        for (int k = 0; k < 8; ++k) bring_piece(k);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    const int team = group - 1, thread = static_cast<int>(threadIdx.x) % 128, lane = thread % 32, warp = thread / 32;
    float* team_sums = reinterpret_cast<float*>(shared + Plan::kSums) + team * 4 * kMapColumns;
    Finish<F> finish{p, team_sums + warp * kMapColumns, lane};
    finish.ring = base + Plan::kRing + (team * 64 + warp * 16 + lane / 4) * 64 + lane % 4 * 16;
    finish.ring_full = ring_full(0);
    finish.ring_empty = ring_empty(0);
    float acc[128];
    uint32_t held[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) held[i] = 0;
#pragma unroll
    for (int i = 0; i < 128; ++i) acc[i] = 0;
    int stage = 0, before = 0;
    uint32_t phase = 0;
    int64_t done_row = p.rows;  // the team's first row of the tile that is being finished; none yet
    int done_column = 0;
    const auto multiply = [&](int k) {
      barrier_wait(full(stage), phase);
      const uint32_t at = base + stage * kMapStage;
      const uint64_t left = along_lines(at + team * (kMapLeft / 2)), right = along_lines(at + kMapLeft);
      wgmma_begin();
#pragma unroll
      for (int j = 0; j < 4; ++j) wgmma(acc, further(left, 32 * j), further(right, 32 * j), k > 0 || j > 0);
      wgmma_commit();
    };
    // The products before the last have been made: their stage may be filled again.
    const auto release = [&](int k) {
      if (k > 0) {
        wgmma_wait<1>();
        if (lane < 2) barrier_arrive_at(empty(before), lane);
      }
      before = stage;
      if (++stage == Plan::kStages) {
        stage = 0;
        phase ^= 1;
      }
    };

    for (int64_t t = first_tile; t < tiles; t += clusters) {
      const auto step = [&]<int kPiece>() {
        multiply(kPiece);
        if (!Plan::kReads || t != first_tile) finish.template piece<kPiece>(held);  // at first nothing is stored
        release(kPiece);
      };
      step.template operator()<0>();
      step.template operator()<1>();
      step.template operator()<2>();
      step.template operator()<3>();
      step.template operator()<4>();
      step.template operator()<5>();
      step.template operator()<6>();
      step.template operator()<7>();
      if (done_row < p.rows || F != MapForm::gelu_gradient) finish.join_sums(team_sums, done_row, done_column, thread, 1 + team);
      for (int k = kMapLeastSteps; k < p.steps; ++k) {
        multiply(k);
        release(k);
      }
      wgmma_wait<0>();
      hold(acc);
      if (lane < 2) barrier_arrive_at(empty(before), lane);

      done_row = (t / across * 2 + rank) * kMapRows + team * 64;
      done_column = static_cast<int>(t % across) * kColumns;
#pragma unroll
      for (int a = 0; a < 8; ++a) {
        uint4 bias{};
        if (kBias && p.bias != nullptr)
          bias = *reinterpret_cast<const uint4*>(p.bias + done_column + 32 * a + 8 * (lane % 4));
        const uint32_t* b = reinterpret_cast<const uint32_t*>(&bias);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* v = acc + (4 * a + i) * 4;
          const float low = kBias ? low_half(b[i]) : 0.0f, high = kBias ? high_half(b[i]) : 0.0f;
          held[a * 8 + i] = pack(v[0] + low, v[1] + high);
          held[a * 8 + 4 + i] = pack(v[2] + low, v[3] + high);
        }
      }
      finish.begin(done_row + warp * 16 + lane / 4, done_column);
    }
    finish.template piece<0>(held);
    finish.template piece<1>(held);
    finish.template piece<2>(held);
    finish.template piece<3>(held);
    finish.template piece<4>(held);
    finish.template piece<5>(held);
    finish.template piece<6>(held);
    finish.template piece<7>(held);
    finish.join_sums(team_sums, done_row, done_column, thread, 1 + team);
  }
  cluster_barrier();  // nobody leaves while the other block may still reach into its shared memory
#endif
}

}  // namespace krait::kernels::cuda
