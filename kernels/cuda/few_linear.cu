#include <algorithm>

#include "kernels/cuda/few_rows.cuh"

namespace krait::kernels::cuda {

namespace {

using namespace few;

constexpr int kPieces = kFewWidth / 256;  // of 32 of k that a warp multiplies

// Four values of row r of what the parts add up to, or of what has been made.
__device__ __forceinline__ float4 add_parts(const FewInput& in, int64_t at, int r, int rows, int k) {
  if (in.parts == 0) return four_masked(fresh8(in.made + at));
  float4 v{};
  float squares = 0;
  if (in.squares != nullptr)  // a part's in each of 16 lanes, as a rule
    for (int p = static_cast<int>(threadIdx.x) % 16; p < in.parts; p += 16) squares += __ldcg(in.squares + r * in.parts + p);
#pragma unroll 1
  for (int base = 0; base < in.parts; base += kFewParts) {  // once, as a rule
    float4 u[kFewParts];
#pragma unroll
    for (int p = 0; p < kFewParts; ++p) u[p] = base + p < in.parts ? fresh(in.part + int64_t{base + p} * rows * k + at) : float4{};
#pragma unroll
    for (int p = 0; p < kFewParts; ++p) v = sum(v, u[p]);
  }
  if (in.squares == nullptr) return v;
  const float factor = rsqrtf(sum_lanes<16>(squares) / static_cast<float>(in.width) + in.squares_eps);
  return {v.x * factor, v.y * factor, v.z * factor, v.w * factor};
}

// A block: kFewColumns columns of y for all rows; its warps take pieces of 32 of k in turn and are added in order. Weights,
// the left operand of products whose right one are 8 rows, wait in registers when the kernel in front ends; then every
// block adds and weighs the rows for itself. Which value of k sits where in a product does not matter as long as both
// operands agree, so a lane reads 8 neighbours.
__global__ void __launch_bounds__(kThreads, 2) few_linear_kernel(const __grid_constant__ FewLinear a) {
  constexpr int kPitch = kFewWidth + 32, kSumPitch = kFewColumns + 4, kMixedPitch = kFewColumns + 8;  // different banks
  __shared__ __align__(16) bf16 x[kFewRows][kPitch], mixed[kFewRows][kMixedPitch];
  __shared__ __align__(16) float sums[kWarps][kFewRows][kSumPitch], squares[kFewRows][kWarps];
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
  const int first = static_cast<int>(blockIdx.x) * kFewColumns, channels = a.conv_end - a.conv_begin, quads = a.k / 4;
  let_next_begin();

  if (tid == 0 && a.in.weight != nullptr) bring_into_l2(a.in.weight, int64_t{4} * a.k);
  uint4 w[kPieces][kFewColumns / 8];
#pragma unroll
  for (int s = 0; s < kPieces; ++s)
#pragma unroll
    for (int i = 0; i < kFewColumns / 8; ++i) {
      const int at = 32 * (warp + kWarps * s) + 8 * t, column = first + 8 * i + g;
      w[s][i] = column < a.n && at < a.k ? *reinterpret_cast<const uint4*>(a.w + int64_t{column} * a.k + at) : uint4{};
    }
  // The value of y that a thread finishes: row `warp`, a column a lane.
  const int column = first + lane, channel = column - a.conv_begin;
  const bool ends = warp < a.rows && column < a.n, convolved = ends && channel >= 0 && channel < channels;
  bf16* const past = a.conv + int64_t{warp} * (kFewTaps - 1) * channels + channel;
  uint2 filter{};
  bf16 before[kFewTaps - 1]{};
  float conv_bias = 0;
  if (convolved) {
    filter = *reinterpret_cast<const uint2*>(a.conv_weight + kFewTaps * channel);
#pragma unroll
    for (int j = 0; j + 1 < kFewTaps; ++j) before[j] = past[int64_t{j} * channels];
    if (a.conv_bias != nullptr) conv_bias = static_cast<float>(a.conv_bias[channel]);
  }
  const float bias = ends && a.bias != nullptr ? static_cast<float>(a.bias[column]) : 0.0f;
  const int output = 16 * warp + g;  // and 8 further on
  const bool projects = a.project != nullptr && first < a.conv_end;
  uint4 project[2]{};
#pragma unroll
  for (int i = 0; i < 2; ++i)
    if (projects && output + 8 * i < a.outputs) project[i] = *reinterpret_cast<const uint4*>(a.project + int64_t{output + 8 * i} * channels + first + 8 * t);
  for (int i = tid; i < kFewRows * kPitch / 8; i += kThreads) reinterpret_cast<uint4*>(x)[i] = {};
  for (int i = tid; i < kFewRows * kMixedPitch / 8; i += kThreads) reinterpret_cast<uint4*>(mixed)[i] = {};
  __syncthreads();
  wait_for_previous();

  // A norm's weights may have been made just now.
  const float4 weight = tid < quads && a.in.weight != nullptr ? fresh(a.in.weight + 4 * tid) : float4{};
  const bool writes = blockIdx.x == gridDim.x - 1;
#pragma unroll 1
  for (int r = 0; r < a.rows; ++r) {
    float square = 0;
    if (warp * 32 < quads) {  // whole warps
      const int64_t at = int64_t{r} * a.k + 4 * tid;
      uint2 residual{};
      if (a.in.residual != nullptr) residual = fresh8(a.in.residual + at);
      uint2 u = packed(add_parts(a.in, at, r, a.rows, a.k));
      if (writes && a.in.parts > 0 && a.in.made_out != nullptr) *reinterpret_cast<uint2*>(a.in.made_out + at) = u;
      float4 v = four_masked(u);
      if (a.in.residual != nullptr) {
        u = packed(sum(v, four_masked(residual)));
        if (writes && a.in.sum != nullptr) *reinterpret_cast<uint2*>(a.in.sum + at) = u;
        v = four_masked(u);
      }
      *reinterpret_cast<uint2*>(&x[r][4 * tid]) = packed(product(v, weight));
      square = dot(v, v);
    }
    square = sum_lanes<32>(square);
    if (lane == 0) squares[r][warp] = square;
  }
  __syncthreads();
  const auto factor_of = [&](int r) {
    const float4* const s = reinterpret_cast<const float4*>(squares[r]);
    const float4 v = sum(s[0], s[1]);
    return rsqrtf((v.x + v.y + v.z + v.w) / static_cast<float>(a.k) + a.in.eps);
  };

  float acc[kFewColumns / 16][4] = {};
#pragma unroll
  for (int s = 0; s < kPieces; ++s) {
    if (32 * (warp + kWarps * s) >= a.k) break;
    const uint4 v = *reinterpret_cast<const uint4*>(&x[g][32 * (warp + kWarps * s) + 8 * t]);
#pragma unroll
    for (int i = 0; i < kFewColumns / 16; ++i) {
      const uint4 low = w[s][2 * i], high = w[s][2 * i + 1];
      mma(acc[i], {low.x, high.x, low.y, high.y}, v.x, v.y);
      mma(acc[i], {low.z, high.z, low.w, high.w}, v.z, v.w);
    }
  }
#pragma unroll
  for (int i = 0; i < kFewColumns / 16; ++i)
#pragma unroll
    for (int q = 0; q < 4; ++q)
      if (2 * t + q % 2 < a.rows) sums[warp][2 * t + q % 2][16 * i + 8 * (q / 2) + g] = acc[i][q];
  __syncthreads();

  if (ends) {
    float v = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) v += sums[i][warp][lane];
    const bf16 now = static_cast<bf16>(v * factor_of(warp) + bias);
    a.y[int64_t{warp} * a.n + column] = now;
    if (convolved) {
      const float2 w01 = two_masked(filter.x), w23 = two_masked(filter.y);
      const bf16 out = static_cast<bf16>(silu_fast(conv_bias + w01.x * static_cast<float>(before[0]) + w01.y * static_cast<float>(before[1]) +
                                              w23.x * static_cast<float>(before[2]) + w23.y * static_cast<float>(now)));
      mixed[warp][lane] = out;
      past[0] = before[1];
      past[channels] = before[2];
      past[2 * int64_t{channels}] = now;
      a.mixed[int64_t{warp} * channels + channel] = out;
    }
  }
  if (projects) {  // the same for the whole block
    __syncthreads();
    const uint4 v = *reinterpret_cast<const uint4*>(&mixed[g][8 * t]);
    float d[4] = {};
    mma(d, {project[0].x, project[1].x, project[0].y, project[1].y}, v.x, v.y);
    mma(d, {project[0].z, project[1].z, project[0].w, project[1].w}, v.z, v.w);
#pragma unroll
    for (int q = 0; q < 4; ++q)
      if (const int r = 2 * t + q % 2, o = output + q / 2 * 8; r < a.rows && o < a.outputs)
        a.part[(int64_t{r} * (a.conv_end / kFewColumns) + blockIdx.x) * a.outputs + o] = d[q];
  }
  if (writes && a.in.normed != nullptr && tid < quads)
    for (int r = 0; r < a.rows; ++r) {
      const float factor = factor_of(r);
      const float4 v = four_masked(*reinterpret_cast<const uint2*>(&x[r][4 * tid]));
      *reinterpret_cast<uint2*>(a.in.normed + int64_t{r} * a.k + 4 * tid) = packed({v.x * factor, v.y * factor, v.z * factor, v.w * factor});
      if (tid == 0 && a.in.rstd != nullptr) a.in.rstd[r] = factor;
    }
}

}  // namespace

void few_linear(const FewLinear& a, bool overlapped, Stream stream) {
  keep_shared_memory(few_linear_kernel);
  const LaunchConfig config{.grid = std::max<int64_t>(1, ceil_div(a.n, kFewColumns)), .block = kThreads, .stream = stream};
  if (overlapped)
    launch_overlapped(few_linear_kernel, config, a);
  else
    launch(few_linear_kernel, config, a);
}

}  // namespace krait::kernels::cuda
