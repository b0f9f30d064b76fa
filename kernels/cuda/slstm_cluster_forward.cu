#include "kernels/cuda/slstm_cluster.cuh"

namespace krait::kernels::cuda {

namespace slstm {
namespace {

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

// As in RecurrenceForward; null where undefined.
struct Forward {
  int64_t b, l, h;
  const bf16 *x, *weights;
  const float *bias, *state0;
  const int32_t* segments;
  bf16 *y, *y_prev;
  float *state, *saved;
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

// A lane's four words of its row, from the lanes that share it.
__device__ inline uint4 gathered(uint32_t word) {
  const unsigned first = threadIdx.x % 32 & ~3u;
  return {__shfl_sync(0xffffffffu, word, static_cast<int>(first)), __shfl_sync(0xffffffffu, word, static_cast<int>(first + 1)),
          __shfl_sync(0xffffffffu, word, static_cast<int>(first + 2)),
          __shfl_sync(0xffffffffu, word, static_cast<int>(first + 3))};
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

// The units of a head over 64, or 0 where the cluster kernels do not serve.
int64_t warps_for(const Tensor& x, std::initializer_list<const Tensor*> tensors) {
  const int64_t p = x.size(4);
  if (x.dtype() != DType::bf16 || p % 64 != 0 || p > 256) return 0;
  for (const Tensor* t : tensors)
    if (!aligned(*t)) return 0;
  const int major = device_info(x.device()).compute_capability / 10;
  return major == 9 || major == 10 ? p / 64 : 0;
}

}  // namespace
}  // namespace slstm

bool slstm_cluster_forward(RecurrenceForward& r, SlstmForget forget) {
  using namespace slstm;
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

}  // namespace krait::kernels::cuda
