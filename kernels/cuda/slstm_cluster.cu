// sLSTM over whole sequences in bf16 with a cluster of 8 blocks for each head of 8 rows of the batch. The head's
// recurrent weights stay in the registers of the cluster's warps, the states in those of their threads; a step's
// exchange goes from shared memory to shared memory. A head has p = 64 W units, a block W warps, a warp 8 units: its
// lane 4 g + t has unit g of rows 2t and 2t + 1, all gates.
//   forward   a warp multiplies R of its units with y_{t-1} of all units, and sends y_t to the 8 blocks.
//   backward  a warp multiplies R^T, all units by the gates of its block, with dr_t of the block; the 8 blocks' parts of
//             dy_{t-1} go to the block whose units they are and are summed there in the order of the blocks.
// Bound by latency: product, cell and exchange of a step follow one another. What comes from global memory is asked for
// kStages steps before.
// What the backward needs is kept as the threads have it: (group, l, warp of the cluster, 14 values of 32 lanes), less
// the lanes whose rows the batch does not have.
// Nothing tells a block that its neighbours have read what it sent at a step before, two steps later, it sends to the
// same place; but it has what they sent at the step between, which they made of it.
#include "kernels/cuda/aligned.h"
#include "kernels/cuda/slstm_cluster.h"

#include "core/cuda/launch.cuh"
#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/cluster_launch.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int kBlocks = 8, kTile = 8;  // blocks of a cluster, rows of the batch
constexpr int kStages = 8;             // steps of input under way, a power of two
constexpr int kStates = 4;             // y, c, n, m
constexpr int kKept = 7;               // values for the backward, of a (unit, row)

// How a warp keeps a step's values in global memory for a group of up to 8 rows: two times 4 values of each lane that has
// a row, then 4 and 2 of each that has two. Lanes without are left out. Kernels for whole groups alone, kWhole, know the
// places at compile time: up to a fifth faster.
struct KeptLayout {
  int begun, whole;  // lanes of a group g that have a row, and two
  __host__ __device__ constexpr explicit KeptLayout(int64_t rows)
      : begun(static_cast<int>(rows + 1) / 2), whole(static_cast<int>(rows) / 2) {}
  __host__ __device__ constexpr int size() const { return 8 * (8 * begun + 6 * whole); }
  // Where a lane's values are; slot: its number among those with a row, and among those with two.
  __device__ int four(int i, const int (&slot)[2]) const { return 4 * (8 * i * begun + slot[i / 2]); }
  __device__ int two(const int (&slot)[2]) const { return 4 * 8 * (2 * begun + whole) + 2 * slot[1]; }
};
constexpr int kKeptOfWarp = KeptLayout(kTile).size();

// SlstmCell, in the order in which a step needs it: y first, with as few special functions and divisions before it as it
// takes (of i and f one is 1), what the backward needs afterwards. Good to a few units of fp32's last place around 1: the
// results are rounded to bf16.
template <bool kExpForget>
struct ForwardCell {
  float a_f, past, i, f, z, past_o, c0, n0;  // past: e^-|a_f|; past_o: e^-a_o

  __device__ __forceinline__ void advance(const float (&x)[4], const float (&r)[4], float (&s)[4]) {
    const float a_i = x[0] + r[0];
    a_f = x[1] + r[1];
    const float twice = __expf(2.0f * (x[2] + r[2]));
    past_o = __expf(-(x[3] + r[3]));
    float lf = a_f;
    if constexpr (!kExpForget) {
      past = __expf(-fabsf(a_f));
      lf = fminf(a_f, 0.0f) - __logf(1.0f + past);
    }
    c0 = s[1];
    n0 = s[2];
    const float carried = n0 == 0.0f ? -1e30f : lf + s[3], ahead = carried - a_i, smaller = __expf(-fabsf(ahead));
    i = ahead > 0.0f ? smaller : 1.0f;
    f = ahead > 0.0f ? 1.0f : smaller;
    z = 1.0f - __fdividef(2.0f, 1.0f + twice);
    s[1] = f * c0 + i * z;
    s[2] = f * n0 + i;
    s[3] = fmaxf(carried, a_i);
    s[0] = __fdividef(s[1], s[2] * (1.0f + past_o));
  }
  __device__ __forceinline__ void keep(float (&saved)[kKept]) const {
    saved[0] = i;
    saved[1] = f;
    saved[2] = z;
    saved[3] = __fdividef(1.0f, 1.0f + past_o);
    saved[4] = 1.0f;
    if constexpr (!kExpForget) {
      const float larger = __fdividef(1.0f, 1.0f + past);
      saved[4] = a_f > 0.0f ? past * larger : larger;
    }
    saved[5] = c0;
    saved[6] = n0;
  }
};

// As in RecurrenceForward and RecurrenceBackward; null where undefined.
struct Forward {
  int64_t b, l, h;
  const bf16 *x, *weights;
  const float *bias, *state0;
  const int32_t* segments;
  bf16 *y, *y_prev;
  float *state, *saved;
};
struct Backward {
  int64_t b, l, h;
  const bf16 *dy, *weights;
  const float *dstate, *saved;
  const int32_t* segments;
  bf16* dx;
  float* dstate0;
};

// Shared memory of W warps, in bytes.
template <int W>
struct ForwardLayout {
  static constexpr int kUnits = 64 * W, kPitch = kUnits + 8;     // of y_{t-1}: (8 rows, units) bf16, twice
  static constexpr int kVector = kTile * kPitch * 2;
  static constexpr int kRow = 80, kStage = kTile * kRow;         // a warp's x: (8 rows, 4 gates, 8 units) bf16, padded
  static constexpr int kInputs = 2 * kVector, kBarriers = kInputs + W * kStages * kStage, kBytes = kBarriers + 16;
  static constexpr uint32_t kSent = kTile * kUnits * 2;          // to each block at a step
};
template <int W>
struct BackwardLayout {
  static constexpr int kGates = 32 * W, kPitch = kGates + 8;     // of a block: dr as (8 rows, gates) bf16, twice
  static constexpr int kVector = kTile * kPitch * 2;
  static constexpr int kPart = kTile * 8 * W * 4;                // dy of a block's units from one block, fp32
  static constexpr int kParts = 2 * kVector;                     // (2, 8 blocks, W, 8 units, 8 rows)
  static constexpr int kSaved = kKeptOfWarp * 4;                 // what a warp kept,
  static constexpr int kStage = kSaved + kTile * 16;             // and its dy (8 rows, 8 units) bf16
  static constexpr int kInputs = kParts + 2 * kBlocks * kPart, kBarriers = kInputs + W * kStages * kStage;
  static constexpr int kBytes = kBarriers + 16;
  static constexpr uint32_t kSent = kBlocks * kPart;
};

__device__ inline void copy_async_8(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;\n" ::"r"(shared_address(to)), "l"(from) : "memory");
}

// Fragments of B (16 k, 8 n) for the k from 16 x and 16 (x + 1) on, from rows n of shared memory.
__device__ inline void load_vector(uint32_t (&r)[4], const bf16* vector, int pitch, int x) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  load_matrices(r, vector + lane % 8 * pitch + x * 16 + lane / 8 * 8);
}

// A lane's four words of its row, from the lanes that share it.
__device__ inline uint4 gathered(uint32_t word) {
  const unsigned first = threadIdx.x % 32 & ~3u;
  return {__shfl_sync(0xffffffffu, word, static_cast<int>(first)), __shfl_sync(0xffffffffu, word, static_cast<int>(first + 1)),
          __shfl_sync(0xffffffffu, word, static_cast<int>(first + 2)),
          __shfl_sync(0xffffffffu, word, static_cast<int>(first + 3))};
}

// Values that all warps keep of the groups before this one: all heads of 8 rows, then of the rows that are left.
template <int W, class Arguments>
__device__ int64_t kept_before(const Arguments& a, int64_t group, const KeptLayout& layout) {
  return (group / a.h * a.h * kKeptOfWarp + group % a.h * layout.size()) * a.l * kBlocks * W;
}

template <bool kExpForget, int W, bool kWhole>
__global__ void __launch_bounds__(32 * W, 1) forward_kernel(const Forward a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  using Layout = ForwardLayout<W>;
  constexpr int P = Layout::kUnits, kDepth = P / 16;
  extern __shared__ __align__(128) unsigned char shared[];
  bf16* const vectors = reinterpret_cast<bf16*>(shared);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32, g = lane / 4, t4 = lane % 4;
  const int rank = static_cast<int>(cluster_rank()), unit0 = (rank * W + warp) * 8;
  const int64_t group = blockIdx.x / kBlocks, head = group % a.h, row0 = group / a.h * kTile, c = a.h * P;
  unsigned char* const inputs = shared + Layout::kInputs + warp * kStages * Layout::kStage;
  const uint32_t barriers = shared_address(shared + Layout::kBarriers);

  // A: rows g and g + 8 of two tiles are the gates 0 to 3 of unit g.
  uint32_t weights[2][kDepth][4];
#pragma unroll
  for (int tile = 0; tile < 2; ++tile)
#pragma unroll
    for (int x = 0; x < kDepth; ++x)
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const int gate = 2 * tile + part % 2, k = x * 16 + 2 * t4 + part / 2 * 8;
        weights[tile][x][part] =
            *reinterpret_cast<const uint32_t*>(a.weights + ((head * 4 + gate) * P + unit0 + g) * P + k);
      }
  const int64_t column = head * P + unit0;  // of the warp
  float bias[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) bias[k] = a.bias[k * c + column + g];

  // The lane's two rows.
  int64_t row[2];
  bool real[2];
  float s[2][kStates];
  const int32_t* segments[2] = {};
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    row[j] = row0 + 2 * t4 + j;
    real[j] = row[j] < a.b;
    if (!real[j]) row[j] = row0;
#pragma unroll
    for (int k = 0; k < kStates; ++k)
      s[j][k] = a.state0 != nullptr && real[j] ? a.state0[(k * a.b + row[j]) * c + column + g] : 0.0f;
    if (a.segments != nullptr) segments[j] = a.segments + row[j] * a.l;
  }
  // The row that it stores y of, and that it loads x of (a chunk of 8 units of one gate).
  const int64_t out_row = row0 + g;
  const bool stores = out_row < a.b;
  const int32_t* out_segments = a.segments != nullptr && stores ? a.segments + out_row * a.l : nullptr;
  const bf16* x_from = a.x + ((stores ? out_row : row0) * a.l * 4 + t4) * c + column;
  const auto load_x = [&](int64_t t) {
    const int stage = static_cast<int>(t % kStages);
    copy_async(inputs + stage * Layout::kStage + g * Layout::kRow + t4 * 16, x_from + (t < a.l ? t : 0) * 4 * c,
               stores && t < a.l);
    copy_commit();
  };
  for (int64_t t = 0; t < kStages - 1; ++t) load_x(t);

  // y before the first step, rounded: to the first vector and to y_prev.
  for (int i = static_cast<int>(threadIdx.x); i < kTile * P; i += 32 * W) {
    const int n = i / P, k = i % P;
    const bool known = a.state0 != nullptr && row0 + n < a.b;
    vectors[n * Layout::kPitch + k] = static_cast<bf16>(known ? a.state0[(row0 + n) * c + head * P + k] : 0.0f);
  }
  if (threadIdx.x == 0)
    for (uint32_t i = 0; i < 2; ++i) {
      arrivals_init(barriers + 8 * i);
      arrivals_expect(barriers + 8 * i, Layout::kSent);
    }
  __syncthreads();
  if (a.y_prev != nullptr && stores && t4 == 0)
    *reinterpret_cast<uint4*>(a.y_prev + out_row * a.l * c + column) =
        *reinterpret_cast<const uint4*>(vectors + g * Layout::kPitch + unit0);
  cluster_barrier();

  // A lane sends its row to blocks t4 and t4 + 4.
  uint32_t there[2], barrier_there[2];
#pragma unroll
  for (uint32_t i = 0; i < 2; ++i) {
    there[i] = of_block(shared_address(vectors + g * Layout::kPitch + unit0), static_cast<uint32_t>(t4) + 4 * i);
    barrier_there[i] = of_block(barriers, static_cast<uint32_t>(t4) + 4 * i);
  }

  const KeptLayout layout(kWhole || a.b - row0 > kTile ? kTile : a.b - row0);
  const int slot[2] = {kWhole ? lane : g * layout.begun + t4, kWhole ? lane : g * layout.whole + t4};
  float* kept = a.saved;
  if (kept != nullptr) kept += kept_before<W>(a, group, layout) + (rank * W + warp) * layout.size();
  for (int64_t t = 0; t < a.l; ++t) {
    copy_wait<kStages - 2>();
    __syncwarp();
    const unsigned char* x_here = inputs + t % kStages * Layout::kStage;
    float x[2][4];
    bool starts[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      starts[j] = segments[j] != nullptr && t > 0 && segments[j][t] != segments[j][t - 1];
#pragma unroll
      for (int k = 0; k < 4; ++k)
        x[j][k] = bias[k] + static_cast<float>(*reinterpret_cast<const bf16*>(
                                x_here + (2 * t4 + j) * Layout::kRow + k * 16 + 2 * g));
    }
    __syncwarp();
    load_x(t + kStages - 1);

    float acc[2][2][4] = {};  // [tile][parity of x]
    if (t > 0 || a.state0 != nullptr) {
      const uint32_t buffer = static_cast<uint32_t>(t & 1);
      if (t > 0) {
        arrivals_wait(barriers + 8 * buffer, static_cast<uint32_t>((t - 1) >> 1) & 1u);
        if (threadIdx.x == 0) arrivals_expect(barriers + 8 * buffer, Layout::kSent);
      }
      const bf16* vector = vectors + static_cast<int>(buffer) * kTile * Layout::kPitch;
#pragma unroll
      for (int k = 0; k < kDepth; k += 2) {
        uint32_t y[4];
        load_vector(y, vector, Layout::kPitch, k);
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          mma(acc[tile][0], weights[tile][k], y[0], y[1]);
          mma(acc[tile][1], weights[tile][k + 1], y[2], y[3]);
        }
      }
    }

    ForwardCell<kExpForget> cell[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float r[4];
#pragma unroll
      for (int k = 0; k < 4; ++k)
        r[k] = starts[j] ? 0.0f : acc[k / 2][0][k % 2 * 2 + j] + acc[k / 2][1][k % 2 * 2 + j];
      if (starts[j])
#pragma unroll
        for (int k = 0; k < kStates; ++k) s[j][k] = 0.0f;
      cell[j].advance(x[j], r, s[j]);
    }

    const uint4 y = gathered(transposed(pack(s[0][0], s[1][0])));  // 8 units of row g
    if (t + 1 < a.l) {
      const uint32_t buffer = static_cast<uint32_t>((t + 1) & 1);
#pragma unroll
      for (int i = 0; i < 2; ++i) send(there[i] + buffer * Layout::kVector, barrier_there[i] + 8 * buffer, y);
    }
    if (stores && t4 == 0) *reinterpret_cast<uint4*>(a.y + (out_row * a.l + t) * c + column) = y;
    if (kept == nullptr) continue;
    if (stores && t4 == 1 && t + 1 < a.l) {
      const bool ends = out_segments != nullptr && out_segments[t] != out_segments[t + 1];
      *reinterpret_cast<uint4*>(a.y_prev + (out_row * a.l + t + 1) * c + column) = ends ? uint4{0, 0, 0, 0} : y;
    }
    float saved[2][kKept];
    cell[0].keep(saved[0]);
    cell[1].keep(saved[1]);
    const auto four = [&](int i) -> float4& { return *reinterpret_cast<float4*>(kept + layout.four(i, slot)); };
    if (kWhole || real[0]) {
      four(0) = make_float4(saved[0][0], saved[0][1], saved[0][2], saved[0][3]);
      four(1) = make_float4(saved[0][4], saved[0][5], saved[0][6], saved[1][0]);
    }
    if (kWhole || real[1]) {
      four(2) = make_float4(saved[1][1], saved[1][2], saved[1][3], saved[1][4]);
      *reinterpret_cast<float2*>(kept + layout.two(slot)) = make_float2(saved[1][5], saved[1][6]);
    }
    kept += kBlocks * W * layout.size();
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (!real[j]) continue;
#pragma unroll
    for (int k = 0; k < kStates; ++k) a.state[(k * a.b + row[j]) * c + column + g] = s[j][k];
  }
  cluster_barrier();  // nobody leaves while others may send to it
#endif
}

// What SlstmCell::backward needs of a position and does not depend on what comes back, and the rest of it: see there.
struct BackwardCell {
  float i, z, o, by_f, c0, n0, f, inverse, y, by_z, by_o;

  __device__ __forceinline__ explicit BackwardCell(const float (&saved)[7])
      : i(saved[0]), z(saved[2]), o(saved[3]), by_f(saved[1] * saved[4]), c0(saved[5]), n0(saved[6]), f(saved[1]) {
    inverse = __fdividef(1.0f, f * n0 + i);
    y = o * (f * c0 + i * z) * inverse;
    by_z = i * (1.0f - z * z);
    by_o = y * (1.0f - o);
  }
  // dc and dn come back for the position before.
  __device__ __forceinline__ void operator()(float dy, float& dc_carry, float& dn_carry, float (&dr)[4]) const {
    const float q = dy * inverse, dc = dc_carry + q * o, dn = dn_carry - q * y;
    dr[0] = i * (z * dc + dn);
    dr[1] = by_f * (dc * c0 + dn * n0);
    dr[2] = dc * by_z;
    dr[3] = dy * by_o;
    dc_carry = f * dc;
    dn_carry = f * dn;
  }
};

template <int W, bool kWhole>
__global__ void __launch_bounds__(32 * W, 1) backward_kernel(const Backward a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  using Layout = BackwardLayout<W>;
  constexpr int P = 64 * W, kDepth = 2 * W;
  extern __shared__ __align__(128) unsigned char shared[];
  bf16* const vectors = reinterpret_cast<bf16*>(shared);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32, g = lane / 4, t4 = lane % 4;
  const int rank = static_cast<int>(cluster_rank()), block_unit0 = rank * W * 8, unit0 = block_unit0 + warp * 8;
  const int64_t group = blockIdx.x / kBlocks, head = group % a.h, row0 = group / a.h * kTile, c = a.h * P;
  unsigned char* const inputs = shared + Layout::kInputs + warp * kStages * Layout::kStage;
  const uint32_t barriers = shared_address(shared + Layout::kBarriers);
  const int64_t column = head * P + unit0;

  // The lane's two rows.
  int64_t row[2];
  bool real[2];
  float dy0[2], dc[2], dn[2];
  const int32_t* segments[2] = {};
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    row[j] = row0 + 2 * t4 + j;
    real[j] = row[j] < a.b;
    if (!real[j]) row[j] = row0;
    const auto of = [&](int64_t k) {
      return a.dstate != nullptr && real[j] ? a.dstate[(k * a.b + row[j]) * c + column + g] : 0.0f;
    };
    dy0[j] = of(0);
    dc[j] = of(1);
    dn[j] = of(2);
    if (a.segments != nullptr) segments[j] = a.segments + row[j] * a.l;
  }

  // A lane brings what it kept itself, and the first 8 lanes a row of dy each.
  const KeptLayout layout(kWhole || a.b - row0 > kTile ? kTile : a.b - row0);
  const int slot[2] = {kWhole ? lane : g * layout.begun + t4, kWhole ? lane : g * layout.whole + t4};
  const float* const kept = a.saved + kept_before<W>(a, group, layout) + (rank * W + warp) * layout.size();
  const bool has_dy = lane < kTile && row0 + lane < a.b && a.dy != nullptr;
  const bf16* const dy_from = has_dy ? a.dy + (row0 + lane) * a.l * c + column : nullptr;
  const auto load_step = [&](int64_t step) {
    const int64_t t = a.l - 1 - step;
    if (t >= 0) {
      unsigned char* stage = inputs + step % kStages * Layout::kStage;
      const float* from = kept + t * kBlocks * W * layout.size();
#pragma unroll
      for (int i = 0; i < 3; ++i)
        if (kWhole || real[i / 2]) copy_async(stage + (i * 32 + lane) * 16, from + layout.four(i, slot), true);
      if (kWhole || real[1]) copy_async_8(stage + 1536 + lane * 8, from + layout.two(slot));
      if (lane < kTile)
        copy_async(stage + Layout::kSaved + lane * 16, has_dy ? static_cast<const void*>(dy_from + t * c) : kept, has_dy);
    }
    copy_commit();
  };
  for (int64_t step = 0; step < kStages - 1; ++step) load_step(step);

  // A: rows are units, 64 of them from 64 warp on; columns the block's gates, (gate, unit of the block).
  uint32_t weights[4][kDepth][4];
#pragma unroll
  for (int tile = 0; tile < 4; ++tile)
#pragma unroll
    for (int x = 0; x < kDepth; ++x)
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const int in = (warp * 4 + tile) * 16 + g + part % 2 * 8, k = x * 16 + 2 * t4 + part / 2 * 8;
        const int gate = k / (8 * W), out = block_unit0 + k % (8 * W);  // k is even: k + 1 is the same gate's next unit
        const bf16* w = a.weights + ((head * 4 + gate) * P + out) * P + in;
        weights[tile][x][part] = uint32_t{*reinterpret_cast<const uint16_t*>(w)} |
                                 uint32_t{*reinterpret_cast<const uint16_t*>(w + P)} << 16;
      }

  if (threadIdx.x == 0)
    for (uint32_t i = 0; i < 2; ++i) {
      arrivals_init(barriers + 8 * i);
      arrivals_expect(barriers + 8 * i, Layout::kSent);
    }
  cluster_barrier();
  // Rows g of half a tile, 8 units, belong to one warp of one block.
  uint32_t there[4][2], barrier_there[4][2];
#pragma unroll
  for (int tile = 0; tile < 4; ++tile)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int eight = (warp * 4 + tile) * 2 + half;
      const uint32_t block = static_cast<uint32_t>(eight / W);
      const int place = Layout::kParts + rank * Layout::kPart + ((eight % W * 8 + g) * kTile + 2 * t4) * 4;
      there[tile][half] = of_block(shared_address(shared + place), block);
      barrier_there[tile][half] = of_block(barriers, block);
    }

  const int64_t steps = a.l + (a.dstate0 != nullptr ? 1 : 0);
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t t = a.l - 1 - step;
    const bool last = t < 0;  // only what comes back to the state at the start
    copy_wait<kStages - 2>();
    __syncwarp();
    const unsigned char* stage = inputs + step % kStages * Layout::kStage;
    float dy[2];
    bool ends[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      ends[j] = segments[j] != nullptr && !last && t + 1 < a.l && segments[j][t] != segments[j][t + 1];
      dy[j] = static_cast<float>(*reinterpret_cast<const bf16*>(stage + Layout::kSaved + (2 * t4 + j) * 16 + g * 2));
    }
    const float4* fours = reinterpret_cast<const float4*>(stage) + lane;
    const float4 v0 = fours[0], v1 = fours[32], v2 = fours[64];
    const float2 v3 = reinterpret_cast<const float2*>(stage + 1536)[lane];
    const float saved[2][kKept] = {{v0.x, v0.y, v0.z, v0.w, v1.x, v1.y, v1.z}, {v1.w, v2.x, v2.y, v2.z, v2.w, v3.x, v3.y}};
    __syncwarp();
    load_step(step + kStages - 1);
    const BackwardCell cell[2] = {BackwardCell(saved[0]), BackwardCell(saved[1])};

    float sum[2] = {0.0f, 0.0f};
    if (step > 0) {
      const uint32_t buffer = static_cast<uint32_t>(step & 1);
      arrivals_wait(barriers + 8 * buffer, static_cast<uint32_t>((step - 1) >> 1) & 1u);
      if (threadIdx.x == 0) arrivals_expect(barriers + 8 * buffer, Layout::kSent);
      const unsigned char* parts = shared + Layout::kParts + buffer * kBlocks * Layout::kPart;
      float2 part[kBlocks];
#pragma unroll
      for (int i = 0; i < kBlocks; ++i)
        part[i] = *reinterpret_cast<const float2*>(parts + i * Layout::kPart + ((warp * 8 + g) * kTile + 2 * t4) * 4);
#pragma unroll
      for (int width = kBlocks / 2; width > 0; width /= 2)
#pragma unroll
        for (int i = 0; i < width; ++i) {
          part[i].x += part[i + width].x;
          part[i].y += part[i + width].y;
        }
      sum[0] = part[0].x;
      sum[1] = part[0].y;
    }
    if (last) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (!real[j]) continue;
        const auto at = [&](int64_t k) -> float& { return a.dstate0[(k * a.b + row[j]) * c + column + g]; };
        at(0) = dy0[j] + sum[j];
        at(1) = dc[j];
        at(2) = dn[j];
        at(3) = 0.0f;
      }
      break;
    }

    float dr[2][4];
    bf16* const vector = vectors + (step & 1) * kTile * Layout::kPitch;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (ends[j]) sum[j] = dy0[j] = dc[j] = dn[j] = 0.0f;  // nothing comes back from another document
      cell[j](dy[j] + sum[j] + dy0[j], dc[j], dn[j], dr[j]);
      dy0[j] = 0.0f;
    }
#pragma unroll
    for (int k = 0; k < 4; ++k)  // row g, units 2 t4 and 2 t4 + 1
      *reinterpret_cast<uint32_t*>(vector + g * Layout::kPitch + k * 8 * W + warp * 8 + 2 * t4) =
          transposed(pack(dr[0][k], dr[1][k]));
    __syncthreads();

    if (step + 1 < steps) {
      float acc[4][4] = {};
#pragma unroll
      for (int x = 0; x < kDepth; x += 2) {
        uint32_t d[4];
        load_vector(d, vector, Layout::kPitch, x);
#pragma unroll
        for (int tile = 0; tile < 4; ++tile) mma(acc[tile], weights[tile][x], d[0], d[1]);
#pragma unroll
        for (int tile = 0; tile < 4; ++tile) mma(acc[tile], weights[tile][x + 1], d[2], d[3]);
      }
      const uint32_t buffer = static_cast<uint32_t>((step + 1) & 1);
#pragma unroll
      for (int tile = 0; tile < 4; ++tile)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          send(there[tile][half] + buffer * kBlocks * Layout::kPart, barrier_there[tile][half] + 8 * buffer,
               acc[tile][2 * half], acc[tile][2 * half + 1]);
    }
    if (row0 + g < a.b)  // gate t4 of row g, of the warp's 8 units
      *reinterpret_cast<uint4*>(a.dx + (((row0 + g) * a.l + t) * 4 + t4) * c + column) =
          *reinterpret_cast<const uint4*>(vector + g * Layout::kPitch + t4 * 8 * W + warp * 8);
  }
  cluster_barrier();
#endif
}

// The units of a head over 64, or 0 where the cluster kernels do not serve.
int64_t warps_for(const Tensor& x, std::initializer_list<const Tensor*> tensors) {
  const int64_t p = x.size(4);
  if (x.dtype() != DType::bf16 || p % 64 != 0 || p > 256) return 0;
  for (const Tensor* t : tensors)
    if (!aligned(*t)) return 0;
  const int major = device_info(x.device()).compute_capability / 10;
  return major == 9 || major == 10 ? p / 64 : 0;
}

// False where the kernel was not compiled for clusters.
template <class Arguments>
bool run_clusters(void (*kernel)(Arguments), const Arguments& a, int64_t warps, int64_t shared, Stream stream) {
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel));
  if (attributes.ptxVersion < 90) return false;
  const int64_t blocks = a.h * ceil_div(a.b, kTile) * kBlocks;
  launch_clusters(kernel, kBlocks, {.grid = blocks, .block = static_cast<int>(32 * warps), .shared = shared, .stream = stream}, a);
  return true;
}

// f<W, whether all groups have 8 rows>().
template <class F>
bool with_shape(int64_t warps, int64_t b, F&& f) {
  const auto with_warps = [&]<int W>() {
    return b % kTile == 0 ? f.template operator()<W, true>() : f.template operator()<W, false>();
  };
  switch (warps) {
    case 1: return with_warps.template operator()<1>();
    case 2: return with_warps.template operator()<2>();
    case 3: return with_warps.template operator()<3>();
    case 4: return with_warps.template operator()<4>();
    default: return false;
  }
}

}  // namespace

bool slstm_cluster_forward(RecurrenceForward& r, SlstmForget forget) {
  const int64_t warps = warps_for(r.x, {&r.x, &r.w, &r.out.y, &r.out.y_prev});
  if (warps == 0) return false;
  const int64_t b = r.x.size(0), l = r.x.size(1), h = r.x.size(3);
  Tensor kept;
  if (r.out.saved.defined()) {
    r.out.saved = {};  // of a layout that other kernels share
    const int64_t of_warp = b / kTile * kKeptOfWarp + KeptLayout(b % kTile).size();
    kept = empty({h * l * kBlocks * warps * of_warp}, DType::f32, r.x.device());
  }
  const Forward a{b, l, h, r.x.data<bf16>(), r.w.data<bf16>(), r.bias.data<float>(), pointer_or_null<float>(r.state0),
                  pointer_or_null<int32_t>(r.segments), r.out.y.data<bf16>(), pointer_or_null<bf16>(r.out.y_prev),
                  r.out.state.data<float>(), pointer_or_null<float>(kept)};
  const Stream stream = current_stream(r.x.device());
  const bool served = with_shape(warps, b, [&]<int W, bool kWhole>() {
    const auto kernel = forget == SlstmForget::exp ? forward_kernel<true, W, kWhole> : forward_kernel<false, W, kWhole>;
    return run_clusters(kernel, a, W, ForwardLayout<W>::kBytes, stream);
  });
  if (kept.defined())
    r.out.saved = served ? kept : empty({b, l, kKept, h, r.x.size(4)}, DType::f32, r.x.device());
  return served;
}

bool slstm_cluster_backward(RecurrenceBackward& r) {
  if (r.saved.ndim() != 1) return false;  // another kernel kept it
  const int64_t warps = r.dx.size(4) / 64;
  const Tensor dy = aligned(r.dy) ? r.dy : r.dy.clone();
  const Backward a{r.dx.size(0), r.dx.size(1), r.dx.size(3), pointer_or_null<bf16>(dy), r.w.data<bf16>(),
                   pointer_or_null<float>(r.dstate), r.saved.data<float>(), pointer_or_null<int32_t>(r.segments),
                   r.dx.data<bf16>(), pointer_or_null<float>(r.dstate0)};
  const Stream stream = current_stream(r.dx.device());
  return with_shape(warps, a.b, [&]<int W, bool kWhole>() {
    return run_clusters(backward_kernel<W, kWhole>, a, W, BackwardLayout<W>::kBytes, stream);
  });
}

}  // namespace krait::kernels::cuda
