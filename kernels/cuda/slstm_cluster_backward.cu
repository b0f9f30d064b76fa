#include "kernels/cuda/slstm_cluster.cuh"

namespace krait::kernels::cuda {

namespace slstm {
namespace {

// As in RecurrenceBackward; null where undefined.
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

}  // namespace
}  // namespace slstm

bool slstm_cluster_backward(RecurrenceBackward& r) {
  using namespace slstm;
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
