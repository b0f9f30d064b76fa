#include "kernels/cuda/step_rows.h"

#include "kernels/cuda/block_reduce.cuh"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/packed.cuh"
#include "kernels/cuda/rows_linear.h"
#include "kernels/cuda/rows_state.h"
#include "kernels/cuda/step_values.cuh"
#include "kernels/linear.h"

namespace krait::kernels::cuda {

namespace {

// As silu_fast, but for the division.
__device__ float silu_divided(float v) { return v / (1.0f + __expf(-v)); }

constexpr int kTaps = 4, kMixThreads = 128;

// A thread: 8 channels of a row. mixed (rows, channels) = silu(conv(in)), rows of `in` are in_row apart; the state (rows,
// 3, channels) moves on by one position.
__global__ void __launch_bounds__(kMixThreads)
    mix_kernel(bf16* mixed, bf16* conv, const bf16* in, const bf16* weight, const bf16* bias, int64_t rows, int64_t channels, int64_t in_row) {
  const int64_t vectors = channels / 8, at = int64_t{blockIdx.x} * kMixThreads + threadIdx.x;
  wait_for_previous();
  let_next_begin();  // not before: rows_state_kernel reads what the position before left
  if (at >= rows * vectors) return;
  const int64_t row = at / vectors, c = at % vectors * 8;
  bf16* const past = conv + row * (kTaps - 1) * channels + c;
  float w[8 * kTaps], p[8] = {}, v[8];
  load_values(w, weight + c * kTaps);
  if (bias != nullptr) load_values(p, bias + c);
  Packed<bf16, 8> in_order[kTaps];
#pragma unroll
  for (int j = 0; j < kTaps; ++j) in_order[j].load(j + 1 < kTaps ? past + j * channels : in + row * in_row + c);
#pragma unroll
  for (int j = 0; j < kTaps; ++j) {
    in_order[j].unpack(v);
#pragma unroll
    for (int i = 0; i < 8; ++i) p[i] += w[i * kTaps + j] * v[i];
    if (j > 0) in_order[j].store(past + (j - 1) * channels);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) p[i] = silu_divided(p[i]);
  store_values(mixed + row * channels + c, p);
}

bool mixes(const Tensor& conv, const Tensor& weight, const Tensor& bias, const bf16* in, int64_t in_row) {
  return weight.size(1) == kTaps && weight.size(0) % 8 == 0 && in_row % 8 == 0 &&
         aligned16(conv.data<bf16>(), weight.data<bf16>(), bias.defined() ? bias.data<bf16>() : nullptr, in);
}

Tensor mix(Tensor& conv, const bf16* in, int64_t in_row, const Tensor& weight, const Tensor& bias) {
  const int64_t rows = conv.size(0), channels = weight.size(0);
  Tensor mixed = empty({rows, channels}, DType::bf16, conv.device());
  launch_overlapped(mix_kernel, {.grid = ceil_div(rows * channels / 8, kMixThreads), .block = kMixThreads, .stream = current_stream(conv.device())},
                    mixed.data<bf16>(), conv.data<bf16>(), in, weight.data<bf16>(), bias.defined() ? bias.data<bf16>() : nullptr, rows,
                    channels, in_row);
  return mixed;
}

constexpr int kStates = 16, kLanes = 4, kChannels = 32, kMaxRank = 64, kRows = 4;  // of Mamba's scan

// A block: kChannels channels of kRows rows; kLanes lanes a channel, each four states, what belongs to the channel stays in
// registers. Bound by reading and writing h.
__global__ void __launch_bounds__(kLanes * kChannels)
    scan_rows_kernel(bf16* y, float* h, const bf16* mixed, const bf16* xz, const bf16* dbc, const bf16* dt_proj, const float* dt_bias,
                     const float* A_log, const float* D, int64_t rows, int64_t e, int r) {
  __shared__ float row_values[kRows][kMaxRank + 2 * kStates];  // d, B, C
  const int lane = static_cast<int>(threadIdx.x) % kLanes, outputs = r + 2 * kStates;
  const int64_t first = int64_t{blockIdx.x} * kChannels, c = first + threadIdx.x / kLanes, first_row = int64_t{blockIdx.y} * kRows;
  const int count = static_cast<int>(min(int64_t{kRows}, rows - first_row));
  let_next_begin();
  if (threadIdx.x < count) bring_into_l2(h + ((first_row + threadIdx.x) * e + first) * kStates, kChannels * kStates * int64_t{4});
  wait_for_previous();
  for (int at = static_cast<int>(threadIdx.x); at < count * outputs; at += kLanes * kChannels)
    row_values[at / outputs][at % outputs] = static_cast<float>(dbc[first_row * outputs + at]);
  float4 state[kRows];
  float x[kRows], z[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (i >= count) break;
    const int64_t row = first_row + i;
    state[i] = *reinterpret_cast<const float4*>(h + (row * e + c) * kStates + 4 * lane);
    x[i] = static_cast<float>(mixed[row * e + c]);
    z[i] = static_cast<float>(xz[row * 2 * e + e + c]);
  }
  float weight[kMaxRank / kLanes];
#pragma unroll
  for (int i = 0; i < kMaxRank / kLanes; ++i) {
    const int j = lane + i * kLanes;
    weight[i] = j < r ? static_cast<float>(dt_proj[c * r + j]) : 0.0f;
  }
  float4 a = *reinterpret_cast<const float4*>(A_log + c * kStates + 4 * lane);
  a = {expf(a.x), expf(a.y), expf(a.z), expf(a.w)};
  const float bias = dt_bias[c], skip = D[c];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (i >= count) break;
    const float* const values = row_values[i];
    float dt = 0;
#pragma unroll
    for (int q = 0; q < kMaxRank / kLanes; ++q)
      if (const int j = lane + q * kLanes; j < r) dt += weight[q] * values[j];
    dt = sum_lanes<kLanes>(dt);
    const float delta = softplus_of(static_cast<float>(static_cast<bf16>(dt)) + bias), add = delta * x[i];
    const float *const B = values + r + 4 * lane, *const C = B + kStates;
    float4 now = state[i];
    now.x = expf(-delta * a.x) * now.x + add * B[0];
    now.y = expf(-delta * a.y) * now.y + add * B[1];
    now.z = expf(-delta * a.z) * now.z + add * B[2];
    now.w = expf(-delta * a.w) * now.w + add * B[3];
    const int64_t row = first_row + i;
    *reinterpret_cast<float4*>(h + (row * e + c) * kStates + 4 * lane) = now;
    float sum = now.x * C[0] + now.y * C[1] + now.z * C[2] + now.w * C[3];
    sum = sum_lanes<kLanes>(sum);
    if (lane == 0) y[row * e + c] = static_cast<bf16>((sum + skip * x[i]) * silu_divided(z[i]));
  }
}

constexpr int kHeadWarps = 8, kAhead = 8;  // channels that a warp reads ahead

struct Head {
  const bf16 *mixed, *zxbcdt;
  const float *dt_bias, *A_log, *D;
  float low, high;
  int64_t heads, p, groups, channels, input, D_columns;
};

// A block: a head of a row; a warp takes kAhead channels at a time, a lane four states of each. Bound by reading and
// writing h.
__global__ void __launch_bounds__(32 * kHeadWarps) state_rows_kernel(bf16* u, float* h, Head a) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t head = blockIdx.x, row = blockIdx.y, e = a.heads * a.p, group = head / (a.heads / a.groups);
  h += (row * a.heads + head) * a.p * kHeadStates;
  let_next_begin();
  if (threadIdx.x == 0) bring_into_l2(h, a.p * kHeadStates * int64_t{4});  // while short kernels leave the memory idle
  wait_for_previous();
  h += 4 * lane;
  const bf16* const mixed = a.mixed + row * a.channels;
  const float raw = static_cast<float>(a.zxbcdt[row * a.input + e + a.channels + head]) + a.dt_bias[head], rate = a.A_log[head];
  float B[4], C[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    B[i] = static_cast<float>(mixed[e + group * kHeadStates + 4 * lane + i]);
    C[i] = static_cast<float>(mixed[e + (a.groups + group) * kHeadStates + 4 * lane + i]);
  }
  for (int64_t first = warp * kAhead; first < a.p; first += kHeadWarps * kAhead) {
    float4 state[kAhead];
#pragma unroll
    for (int q = 0; q < kAhead; ++q)
      if (first + q < a.p) state[q] = *reinterpret_cast<const float4*>(h + (first + q) * kHeadStates);
    const int64_t own = first + lane % kAhead;  // the channel whose x and D this lane reads
    const float x_own = own < a.p ? static_cast<float>(mixed[head * a.p + own]) : 0.0f;
    const float D_own = own < a.p ? a.D[a.D_columns == 1 ? head : head * a.p + own] : 0.0f;
    const float dt = fminf(fmaxf(softplus_of(raw), a.low), a.high), decay = expf(-expf(rate) * dt);
    float mine = 0;
#pragma unroll
    for (int q = 0; q < kAhead; ++q) {
      const float add = dt * __shfl_sync(0xffffffffu, x_own, q);
      if (first + q >= a.p) break;
      const float4 now = {decay * state[q].x + add * B[0], decay * state[q].y + add * B[1], decay * state[q].z + add * B[2],
                          decay * state[q].w + add * B[3]};
      *reinterpret_cast<float4*>(h + (first + q) * kHeadStates) = now;
      float sum = now.x * C[0] + now.y * C[1] + now.z * C[2] + now.w * C[3];
      sum = sum_lanes<32>(sum);
      if (lane == q) mine = sum;
    }
    if (lane < kAhead && own < a.p) u[row * e + head * a.p + own] = static_cast<bf16>(mine + D_own * x_own);
  }
}

constexpr int kNormThreads = 256, kNormVectors = 2;

// A block a row of one group: y = GatedRMSNorm(u, z).
__global__ void __launch_bounds__(kNormThreads)
    gate_rows_kernel(bf16* y, const bf16* u, const bf16* z, const float* w, float eps, bool norm_first, int64_t e, int64_t z_row) {
  __shared__ float shared[32];
  const int64_t row = blockIdx.x;
  take_over();
  float v[kNormVectors][8] = {}, sum = 0;
#pragma unroll
  for (int q = 0; q < kNormVectors; ++q) {
    const int64_t c = (q * kNormThreads + threadIdx.x) * 8;
    if (c >= e) continue;
    float gate[8];
    load_values(v[q], u + row * e + c);
    load_values(gate, z + row * z_row + c);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float gated = v[q][i] * silu_divided(gate[i]), counted = norm_first ? v[q][i] : gated;
      sum += counted * counted;
      v[q][i] = gated;
    }
  }
  sum = block_reduce(sum, shared, [](float a, float b) { return a + b; });
  const float scale = 1.0f / sqrtf(sum / static_cast<float>(e) + eps);
#pragma unroll
  for (int q = 0; q < kNormVectors; ++q) {
    const int64_t c = (q * kNormThreads + threadIdx.x) * 8;
    if (c >= e) continue;
    float weight[8];
    load_values(weight, w + c);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[q][i] *= scale * weight[i];
    store_values(y + row * e + c, v[q]);
  }
}

}  // namespace

bool mamba_step_rows(Tensor& y, Tensor& conv, Tensor& h, const Tensor& xz, const MambaStepWeights& w) {
  const int64_t rows = xz.size(0), e = w.A_log.size(0), n = w.A_log.size(1), r = w.dt_proj.size(1);
  if (xz.dtype() != DType::bf16 || n != kStates || r > kMaxRank || e % kChannels != 0 ||
      !mixes(conv, w.conv_weight, w.conv_bias, xz.data<bf16>(), 2 * e) || !aligned16(h.data<float>(), w.A_log.data<float>()))
    return false;
  const Tensor mixed = mix(conv, xz.data<bf16>(), 2 * e, w.conv_weight, w.conv_bias);
  const Tensor dbc = kernels::linear_forward(mixed, w.x_proj, {}, Epilogue::none, false).y;
  launch_overlapped(scan_rows_kernel,
                    {.grid = e / kChannels, .grid_y = ceil_div(rows, kRows), .block = kLanes * kChannels, .stream = current_stream(xz.device())},
                    y.data<bf16>(), h.data<float>(), mixed.data<bf16>(), xz.data<bf16>(), dbc.data<bf16>(), w.dt_proj.data<bf16>(),
                    w.dt_bias.data<float>(), w.A_log.data<float>(), w.D.data<float>(), rows, e, static_cast<int>(r));
  return true;
}

bool mamba2_step_rows(Tensor& y, Tensor& conv, Tensor& h, RecentPositions* recent, const Tensor& zxbcdt, const Mamba2StepWeights& w) {
  const int64_t rows = h.size(0), heads = h.size(1), p = h.size(2), n = h.size(3), e = heads * p;
  const int64_t channels = w.conv_weight.size(0), groups = (channels - e) / (2 * n), input = zxbcdt.size(1);
  if (recent != nullptr && !rows_state_fits(h, zxbcdt, w)) return false;
  if (zxbcdt.dtype() != DType::bf16 || n != kHeadStates || groups != 1 || e % 8 != 0 || e > kNormThreads * kNormVectors * 8 || rows >= 65536 ||
      !mixes(conv, w.conv_weight, w.conv_bias, zxbcdt.data<bf16>() + e, input) ||
      !aligned16(zxbcdt.data<bf16>(), static_cast<const char*>(h.raw_data()), w.norm_weight.data<float>()))
    return false;
  const Stream stream = current_stream(h.device());
  const Tensor mixed = mix(conv, zxbcdt.data<bf16>() + e, input, w.conv_weight, w.conv_bias);
  if (recent != nullptr) {
    const Tensor weighted = empty({rows, e}, DType::bf16, h.device()), squares = empty({rows, heads}, DType::f32, h.device());
    rows_state(rows_state_of(weighted, squares, h, recent, mixed, zxbcdt, w), stream);
    scale_rows({squares.data<float>(), static_cast<int>(heads), static_cast<float>(w.eps), y.data<bf16>(), nullptr}, weighted.data<bf16>(),
               static_cast<int>(rows), static_cast<int>(e), stream);
    return true;
  }
  const Tensor u = empty({rows, e}, DType::bf16, h.device());
  launch_overlapped(state_rows_kernel, {.grid = heads, .grid_y = rows, .block = 32 * kHeadWarps, .stream = stream}, u.data<bf16>(),
                    h.data<float>(),
                    Head{mixed.data<bf16>(), zxbcdt.data<bf16>(), w.dt_bias.data<float>(), w.A_log.data<float>(), w.D.data<float>(),
                         static_cast<float>(w.dt_low), static_cast<float>(w.dt_high), heads, p, groups, channels, input,
                         w.D.ndim() == 1 ? 1 : p});
  launch_overlapped(gate_rows_kernel, {.grid = rows, .block = kNormThreads, .stream = stream}, y.data<bf16>(), u.data<bf16>(),
                    zxbcdt.data<bf16>(), w.norm_weight.data<float>(), w.eps, w.norm_first, e, input);
  return true;
}

}  // namespace krait::kernels::cuda
