#include "kernels/cuda/few_mlstm.h"

#include "kernels/cuda/few_map.cuh"
#include "kernels/cuda/packed.cuh"
#include "kernels/cuda/step_values.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int kTaps = 4, kSide = 4;
constexpr int kQuarters = 4;  // lanes of a gate's sum

// Behind few_map_kernel, on kOwn columns of x_m: a thread has one channel of a row, a warp the gates of a row.
struct MlstmBehind {
  static constexpr bool kThere = true;
  FewMlstm m;

  template <int kOwn>
  struct Ahead {
    uint2 filter, w[3];  // of the channel; its rows of the blocks of w_q, w_k, w_v
    float bias;
    bf16 before[kTaps - 1];
    uint32_t gate[3][kOwn / kQuarters / 2];  // pairs of the lane's weights of its gate
    int channel;
    bool there;
  };

  static __device__ __forceinline__ bf16 fresh(const bf16* p) {
    bf16 v;
    v.bits = __ldcg(reinterpret_cast<const unsigned short*>(p));
    return v;
  }
  __device__ __forceinline__ bf16* past(int row, int channel) const { return m.conv + int64_t{row} * (kTaps - 1) * m.e + channel; }
  template <class A>
  __device__ __forceinline__ void read_past(A& a, int row) const {
#pragma unroll
    for (int t = 0; t + 1 < kTaps; ++t)
      if (a.there) a.before[t] = fresh(past(row, a.channel) + int64_t{t} * m.e);
  }

  template <int kOwn>
  __device__ __forceinline__ Ahead<kOwn> read_ahead(int first, int row, int own, int rows) const {
    Ahead<kOwn> a{};
    a.channel = first + own;
    a.there = row < rows && first < m.e;
    if (a.there) {
      a.filter = *reinterpret_cast<const uint2*>(m.conv_weight + int64_t{a.channel} * kTaps);
      a.w[0] = *reinterpret_cast<const uint2*>(m.w_q + int64_t{a.channel} * kSide);
      a.w[1] = *reinterpret_cast<const uint2*>(m.w_k + int64_t{a.channel} * kSide);
      a.w[2] = *reinterpret_cast<const uint2*>(m.w_v + int64_t{a.channel} * kSide);
      if (m.conv_bias != nullptr) a.bias = static_cast<float>(m.conv_bias[a.channel]);
      if (m.ahead) read_past(a, row);
    }
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32, gate = lane / kQuarters;
    if (warp < rows && gate < m.n_gates && first < m.e)
#pragma unroll
      for (int part = 0; part < 3; ++part)
#pragma unroll
        for (int i = 0; i < kOwn / kQuarters / 2; ++i)
          a.gate[part][i] = *reinterpret_cast<const uint32_t*>(m.g + (int64_t{gate} * 3 + part) * m.e + first + lane % kQuarters * (kOwn / kQuarters) + 2 * i);
    return a;
  }

  // x_m: of the thread's channel, rounded. All threads of the block come here.
  template <int kOwn>
  __device__ __forceinline__ void finish(const Ahead<kOwn>& ahead, float x_m, int row, int own, int rows) const {
    __shared__ float made[kFewRows][3][kOwn];
    if (ahead.channel - own >= m.e) return;  // a whole block
    Ahead<kOwn> a = ahead;
    if (!m.ahead) read_past(a, row);
    const float2 f01 = two_masked(a.filter.x), f23 = two_masked(a.filter.y);
    float p = a.bias;
    p += f01.x * static_cast<float>(a.before[0]);
    p += f01.y * static_cast<float>(a.before[1]);
    p += f23.x * static_cast<float>(a.before[2]);
    p += f23.y * x_m;
    const auto x_c = static_cast<bf16>(p / (1.0f + __expf(-p)));
    float x[2][kSide];
#pragma unroll
    for (int i = 0; i < kSide; ++i) {  // channels of a block are neighbours in a warp
      const int from = (static_cast<int>(threadIdx.x) % 32 & ~(kSide - 1)) + i;
      x[0][i] = __shfl_sync(0xffffffffu, static_cast<float>(x_c), from);
      x[1][i] = __shfl_sync(0xffffffffu, x_m, from);
    }
    if (a.there) {
      float out[3];
#pragma unroll
      for (int part = 0; part < 3; ++part) {
        const float2 w01 = two_masked(a.w[part].x), w23 = two_masked(a.w[part].y);
        const float(&in)[kSide] = x[part / 2];
        out[part] = w01.x * in[0] + w01.y * in[1] + w23.x * in[2] + w23.y * in[3];
        made[row][part][own] = out[part];
      }
      const int64_t at = int64_t{row} * m.e + a.channel;
      m.q[at] = static_cast<bf16>(out[0]);
      m.k[at] = static_cast<bf16>(out[1]);
      m.v[at] = static_cast<bf16>(out[2]);
      m.x_c[at] = x_c;
      bf16* const to = past(row, a.channel);
      to[0] = a.before[1];
      to[m.e] = a.before[2];
      to[2 * int64_t{m.e}] = static_cast<bf16>(x_m);
    }
    __syncthreads();
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32, gate = lane / kQuarters;
    if (warp >= rows) return;
    float sum = 0;
#pragma unroll
    for (int part = 0; part < 3; ++part)
#pragma unroll
      for (int i = 0; i < kOwn / kQuarters / 2; ++i) {
        const float2 w = two_masked(a.gate[part][i]), u = *reinterpret_cast<const float2*>(&made[warp][part][lane % kQuarters * (kOwn / kQuarters) + 2 * i]);
        sum += w.x * u.x + w.y * u.y;
      }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (lane % kQuarters == 0 && gate < m.n_gates) m.gates[(int64_t{warp} * (m.e / kOwn) + blockIdx.x) * m.n_gates + gate] = sum;
  }
};

// 8ths of the columns of a block; 0: no kernel serves. Fewer blocks norm the rows for themselves where 24 columns divide e.
int tiles_of(const FewMap& a, int64_t e) {
  if (a.rows < 1 || a.rows > kFewRows || a.k > 1024 || a.k % 256 != 0 || a.norm_weight == nullptr || a.units != nullptr || e % 8 != 0 || e > a.n) return 0;
  return e % 24 == 0 && a.n >= 1536 ? 3 : 1;
}

}  // namespace

int few_mlstm_parts(const FewMap& a, int64_t e, int64_t n_gates) {
  const int tiles = few_map_fits(a) && n_gates <= kFewMlstmGates ? tiles_of(a, e) : 0;
  return tiles == 0 ? 0 : static_cast<int>(e / (8 * tiles));
}

void few_mlstm(const FewMap& a, const FewMlstm& b, bool early, Stream stream) {
  const auto run = [&]<int kTiles, int kSteps>() {
    const auto kernel = few_map_kernel<kTiles, kSteps, kFewNormWarps, false, false, true, MlstmBehind>;
    keep_shared_memory(kernel);
    launch_overlapped(kernel, {.grid = ceil_div(a.n, 8 * kTiles), .block = 32 * kFewNormWarps, .shared = int64_t{8} * a.k, .stream = stream}, a, early,
                      MlstmBehind{b});
  };
  if (tiles_of(a, b.e) == 1) return run.template operator()<1, 4>();
  if (a.k <= 768) return run.template operator()<3, 3>();
  run.template operator()<3, 4>();
}

}  // namespace krait::kernels::cuda
