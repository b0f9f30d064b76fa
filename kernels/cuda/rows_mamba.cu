#include "kernels/cuda/rows_mamba.h"

#include "kernels/cuda/exp2.cuh"
#include "kernels/cuda/hopper.h"
#include "kernels/cuda/launch_with.cuh"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/rows_project.cuh"
#include "kernels/cuda/rows_scan.cuh"
#include "kernels/cuda/step_values.cuh"
#include "kernels/cuda/tma.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int kWarps = 12, kThreads = 32 * kWarps;  // that compute; one warp more brings weights and states
constexpr int kBlocks = 64, kHalfRows = 32;         // 64 blocks share 32 rows; two such halves know nothing of one another
constexpr int kMaxD = 768, kMaxE = 1536, kMaxOutputs = 80;
constexpr int kInColumns = 48, kOutColumns = 24, kOutRows = 16, kRows = kScanRows, kChannels = 192, kTaps = 4;
constexpr int kInPitch = 2 * kMaxD + 64, kOutPitch = 2 * kMaxE + 64;  // bytes; neighbouring columns in different banks
constexpr int kInSums = kInColumns + 8, kOutSums = kOutColumns;       // pitches of sums: rows in different banks
constexpr int kTilePitch = kInColumns + 8;
constexpr int kInSteps = kMaxD / (32 * kWarps), kOutSteps = kMaxE / (32 * kWarps);  // pieces of 32 of k a warp
constexpr int kPasses = kChannels / (kThreads / 4), kDtPieces = (kMaxOutputs - 2 * kScanStates) / 16;

struct Shared {
  alignas(128) unsigned char in[kWarps * kHalfRows * kInSums * 4];  // in_proj's columns, then sums
  alignas(128) unsigned char out[kOutColumns * kOutPitch];          // out_proj's
  alignas(128) float4 h[kRows][kChannels][4];
  alignas(16) bf16 project[kMaxOutputs][kTilePitch];
  alignas(16) bf16 mixed[kHalfRows][kTilePitch];
  alignas(16) float gathered[kScanGroups][kRows * kMaxOutputs];
  alignas(16) float values[kRows * kMaxOutputs];
  float factor[kHalfRows];
  uint64_t in_full, out_full, h_full, in_free, out_free, h_made;
};
static_assert(kInColumns * kInPitch <= static_cast<int>(sizeof(Shared::in)) && kWarps * kOutRows * kOutSums * 4 <= static_cast<int>(sizeof(Shared::out)));
static_assert(sizeof(Shared) <= 227 * 1024);

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

enum Counter { kInDone, kScanDone, kOutDone = kScanDone + 2 };  // kScanDone of 16 rows each

__device__ __forceinline__ unsigned* counter(const RowsMamba& a, int layer, int which) {
  return a.arrived + ((layer * 2 + static_cast<int>(blockIdx.x) / kBlocks) * 4 + which) * 8;
}
__device__ __forceinline__ void arrive(unsigned* at) { asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(at) : "memory"); }
__device__ __forceinline__ void wait_for(const unsigned* at, unsigned count) {
  unsigned now = 0;
  for (int polls = 0; polls < 1 << 24; ++polls) {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(at) : "memory");
    if (now >= count) return;
  }
  __trap();  // seconds: a block of the run is not there
}
__device__ __forceinline__ void meet() { cuda::meet(1, kThreads); }  // those that compute
__device__ __forceinline__ uint4 fresh_or_zero(const bf16* p, bool inside) { return inside ? read_fresh(p) : uint4{0, 0, 0, 0}; }
__device__ __forceinline__ uint32_t fresh_pair(const bf16* p) { return __ldcg(reinterpret_cast<const unsigned*>(p)); }

/// What a block does of each layer, and what it reads of it.
struct Place {
  int half_row, block;
  int in_first, in_columns;     // columns of in_proj
  int scan_row, scan_rows, scan_first, scan_channels;
  int out_row, out_first, out_columns;
  __device__ explicit Place(const RowsMamba& a) {
    half_row = static_cast<int>(blockIdx.x) / kBlocks * kHalfRows;
    block = static_cast<int>(blockIdx.x) % kBlocks;
    in_first = block * kInColumns;
    in_columns = min(max(2 * a.e - in_first, 0), kInColumns);
    scan_row = half_row + block / 8 * kRows;
    scan_rows = min(max(a.rows - scan_row, 0), kRows);
    scan_first = block % 8 * kChannels;
    scan_channels = min(max(a.e - scan_first, 0), kChannels);
    out_row = half_row + block / 32 * kOutRows;
    out_first = block % 32 * kOutColumns;
    out_columns = min(max(a.d - out_first, 0), kOutColumns);
  }
};

/// The warp that brings weights and states: each as soon as its place is free, a layer ahead.
struct Bringer {
  const RowsMamba& a;
  Shared& s;
  const Place& at;
  int lane;

  __device__ void in(int layer) const {
    const RowsMambaLayer& l = a.layer[layer];
    const bool projects = at.in_first < a.e;
    const uint32_t column = a.d * 2, full = shared_address(&s.in_full), outputs = a.r + 2 * kScanStates;
    if (lane == 0) barrier_expect(full, at.in_columns * column + (projects ? outputs * kInColumns * 2 : 0));
    __syncwarp();
    for (int c = lane; c < at.in_columns; c += 32) bring_bytes(shared_address(s.in + c * kInPitch), l.in + int64_t{at.in_first + c} * a.d, column, full);
    if (!projects) return;
    for (int c = lane; c < static_cast<int>(outputs); c += 32)
      bring_bytes(shared_address(s.project[c]), l.project + int64_t{c} * a.e + at.in_first, kInColumns * 2, full);
    const int row = at.half_row + lane;  // the convolution's past: into L2 only
    if (row < a.rows)
      for (int j = 0; j + 1 < kTaps; ++j) bring_into_l2(l.conv + (int64_t{row} * (kTaps - 1) + j) * a.e + at.in_first, kInColumns * 2);
  }
  __device__ void out(int layer) const {
    const RowsMambaLayer& l = a.layer[layer];
    const uint32_t column = a.e * 2, full = shared_address(&s.out_full);
    const int columns = l.out != nullptr ? at.out_columns : 0;
    if (lane == 0) barrier_expect(full, columns * column);
    __syncwarp();
    if (lane < columns) bring_bytes(shared_address(s.out + lane * kOutPitch), l.out + int64_t{at.out_first + lane} * a.e, column, full);
  }
  __device__ float* states(int layer) const {
    return a.layer[layer].h + (int64_t{at.scan_row + lane} * a.e + at.scan_first) * kScanStates;
  }
  __device__ void bring_h(int layer) const {
    const RowsMambaLayer& l = a.layer[layer];
    const uint32_t bytes = at.scan_channels * kScanStates * 4, full = shared_address(&s.h_full);
    if (lane == 0) barrier_expect(full, bytes * at.scan_rows);
    __syncwarp();
    if (bytes == 0) return;
    if (lane < at.scan_rows) bring_bytes(shared_address(s.h[lane]), states(layer), bytes, full);
    if (at.block / 8 != 0 || lane != 31) return;
    bring_into_l2(l.dt_proj + int64_t{at.scan_first} * a.r, int64_t{at.scan_channels} * a.r * 2);
    bring_into_l2(l.A_log + at.scan_first * kScanStates, int64_t{at.scan_channels} * kScanStates * 4);
  }
  __device__ void store_h(int layer) const {
    if (lane < at.scan_rows && at.scan_channels > 0)
      asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(states(layer)), "r"(shared_address(s.h[lane])),
                   "r"(at.scan_channels * kScanStates * 4)
                   : "memory");
    stores_commit();
  }
  __device__ void run() const {
    in(0);
    bring_h(0);
    out(0);
#pragma unroll 1
    for (int layer = 0; layer < a.layers; ++layer) {
      const bool more = layer + 1 < a.layers;
      barrier_wait(shared_address(&s.in_free), layer % 2);
      if (more) in(layer + 1);
      barrier_wait(shared_address(&s.h_made), layer % 2);
      store_h(layer);
      stores_wait_read<0>();
      if (more) bring_h(layer + 1);
      barrier_wait(shared_address(&s.out_free), layer % 2);
      if (more) out(layer + 1);
    }
    stores_wait<0>();
  }
};

/// 32 rows by 48 columns of in_proj; x's columns are convolved and multiplied with theirs of x_proj.
__device__ __forceinline__ void in_phase(const RowsMamba& a, Shared& s, const Place& at, int layer) {
  const RowsMambaLayer& l = a.layer[layer];
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
  const bool convolves = at.in_first < a.e;
  constexpr int kPairs = kHalfRows * kInColumns / 2 / kThreads;
  static_assert(kPairs * kThreads * 2 == kHalfRows * kInColumns);
  uint32_t past[kPairs][kTaps - 1] = {}, conv_bias[kPairs] = {};
  uint4 filter[kPairs] = {};
#pragma unroll
  for (int q = 0; q < kPairs; ++q) {
    const int pair = tid + q * kThreads, row = at.half_row + pair / (kInColumns / 2), channel = at.in_first + pair % (kInColumns / 2) * 2;
    if (!convolves || row >= a.rows) continue;
    const bf16* const from = l.conv + int64_t{row} * (kTaps - 1) * a.e + channel;
#pragma unroll
    for (int j = 0; j + 1 < kTaps; ++j) past[q][j] = *reinterpret_cast<const uint32_t*>(from + int64_t{j} * a.e);
    filter[q] = *reinterpret_cast<const uint4*>(l.conv_weight + kTaps * channel);
    if (l.conv_bias != nullptr) conv_bias[q] = *reinterpret_cast<const uint32_t*>(l.conv_bias + channel);
  }
  if (layer > 0) {
    if (tid == 0) wait_for(counter(a, layer - 1, kOutDone), kBlocks);
    meet();
  }

  const bf16* const from = layer > 0 ? a.weighted : a.x;
  const int64_t from_row = layer > 0 ? a.d : a.x_row;
  uint4 x[kInSteps][4];
#pragma unroll
  for (int step = 0; step < kInSteps; ++step) {
    const int k = (step * kWarps + warp) * 32 + 8 * t;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = at.half_row + 8 * i + g;
      x[step][i] = fresh_or_zero(from + row * from_row + k, row < a.rows && k < a.d);
    }
  }
  const float* const squares = layer > 0 ? a.squares : a.x_squares;
  const int parts = layer > 0 ? mamba_squares(a.d) : a.x_parts;
  float own_squares[4] = {};  // all are asked for before one is added
  const bool adds = squares != nullptr && tid < 8 * kHalfRows && at.half_row + tid / 8 < a.rows;
  const float* const row_squares = squares + int64_t{at.half_row + tid / 8} * parts;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (adds && tid % 8 + 8 * i < parts) own_squares[i] = __ldcg(row_squares + tid % 8 + 8 * i);
  barrier_wait(shared_address(&s.in_full), layer % 2);
  float acc[2][6][4] = {};
#pragma unroll
  for (int step = 0; step < kInSteps; ++step) {
    const int piece = step * kWarps + warp;
    if (32 * piece >= a.d) break;
    const unsigned char* const w = s.in + g * kInPitch + 64 * piece + 16 * t;
    uint4 v[6];
#pragma unroll
    for (int j = 0; j < 6; ++j) v[j] = *reinterpret_cast<const uint4*>(w + 8 * j * kInPitch);
#pragma unroll
    for (int j = 0; j < 6; ++j)
#pragma unroll
      for (int m = 0; m < 2; ++m) mma(acc[m][j], {x[step][2 * m].x, x[step][2 * m + 1].x, x[step][2 * m].y, x[step][2 * m + 1].y}, v[j].x, v[j].y);
#pragma unroll
    for (int j = 0; j < 6; ++j)
#pragma unroll
      for (int m = 0; m < 2; ++m) mma(acc[m][j], {x[step][2 * m].z, x[step][2 * m + 1].z, x[step][2 * m].w, x[step][2 * m + 1].w}, v[j].z, v[j].w);
  }
  float square = (own_squares[0] + own_squares[1]) + (own_squares[2] + own_squares[3]);
  if (adds)
    for (int i = tid % 8 + 32; i < parts; i += 8) square += __ldcg(row_squares + i);
  square = sum_lanes<8>(square);
  if (tid < 8 * kHalfRows && tid % 8 == 0) s.factor[tid / 8] = squares != nullptr ? rsqrtf(square / static_cast<float>(a.d) + l.eps) : 1.0f;
  meet();  // the weights have been read
  if (tid == 0 && layer > 0) barrier_arrive(shared_address(&s.out_free));
  float* const sums = reinterpret_cast<float*>(s.in);  // (kWarps, kHalfRows, kInSums)
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int j = 0; j < 6; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        *reinterpret_cast<float2*>(sums + (warp * kHalfRows + 16 * m + 8 * i + g) * kInSums + 8 * j + 2 * t) = {acc[m][j][2 * i], acc[m][j][2 * i + 1]};
  meet();

#pragma unroll
  for (int q = 0; q < kPairs; ++q) {
    const int pair = tid + q * kThreads, local = pair / (kInColumns / 2), column = pair % (kInColumns / 2) * 2, channel = at.in_first + column;
    const int64_t row = at.half_row + local;
    if (row >= a.rows || column >= at.in_columns) continue;
    float2 sum = {0, 0};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 v = *reinterpret_cast<const float2*>(sums + (w * kHalfRows + local) * kInSums + column);
      sum = {sum.x + v.x, sum.y + v.y};
    }
    const uint32_t made = pack(sum.x * s.factor[local], sum.y * s.factor[local]);
    if (!convolves) {
      *reinterpret_cast<uint32_t*>(l.xz + row * 2 * a.e + channel) = made;
      continue;
    }
    float2 p = two(conv_bias[q]);
    const float2 w01 = two(filter[q].x), w23 = two(filter[q].y), v01 = two(filter[q].z), v23 = two(filter[q].w);
    const float2 x0 = two(past[q][0]), x1 = two(past[q][1]), x2 = two(past[q][2]), x3 = two(made);
    p.x += w01.x * x0.x + w01.y * x1.x + w23.x * x2.x + w23.y * x3.x;
    p.y += v01.x * x0.y + v01.y * x1.y + v23.x * x2.y + v23.y * x3.y;
    const uint32_t mixed = pack(silu_fast(p.x), silu_fast(p.y));
    past[q][0] = made;
    *reinterpret_cast<uint32_t*>(a.mixed + row * a.e + channel) = mixed;
    *reinterpret_cast<uint32_t*>(&s.mixed[local][column]) = mixed;
  }
  const int outputs = a.r + 2 * kScanStates;
  if (convolves) {
    meet();
#pragma unroll 1
    for (int job = warp; job < (outputs + 7) / 8 * 2; job += kWarps) {
      const int output = job / 2 * 8, m = job % 2;
      const bf16 *const left = &s.mixed[16 * m + g][2 * t], *const right = &s.project[min(output + g, outputs - 1)][2 * t];
      float d[4] = {};
      project_tile<kInColumns / 16>(d, left, right, kTilePitch);
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (const int row = at.half_row + 16 * m + 8 * i + g; row < a.rows && output + 2 * t < outputs)
          *reinterpret_cast<float2*>(a.part + (int64_t{row} * mamba_parts(a.e) + at.block) * outputs + output + 2 * t) = {d[2 * i], d[2 * i + 1]};
    }
  }
  if (l.rstd != nullptr && at.block == 0 && tid < kHalfRows && at.half_row + tid < a.rows) l.rstd[at.half_row + tid] = s.factor[tid];
  if (l.normed != nullptr) {
    const int width = (a.d + kBlocks - 1) / kBlocks;
    for (int i = tid; i < kHalfRows * width; i += kThreads) {
      const int local = i / width, c = at.block * width + i % width;
      const int64_t row = at.half_row + local;
      if (row < a.rows && c < a.d) l.normed[row * a.d + c] = static_cast<bf16>(read_fresh_one(from + row * from_row + c) * s.factor[local]);
    }
  }
  publish_shared();
  meet();
  if (tid == 0) arrive(counter(a, layer, kInDone));
  if (!convolves) return;
#pragma unroll
  for (int q = 0; q < kPairs; ++q) {  // what no other block reads
    const int pair = tid + q * kThreads, channel = at.in_first + pair % (kInColumns / 2) * 2;
    const int64_t row = at.half_row + pair / (kInColumns / 2);
    if (row >= a.rows) continue;
    bf16* const state = l.conv + row * (kTaps - 1) * a.e + channel;
    *reinterpret_cast<uint32_t*>(state) = past[q][1];
    *reinterpret_cast<uint32_t*>(state + a.e) = past[q][2];
    *reinterpret_cast<uint32_t*>(state + 2 * int64_t{a.e}) = past[q][0];
    *reinterpret_cast<uint32_t*>(l.xz + row * 2 * a.e + channel) = past[q][0];
  }
}

/// Four rows of 192 channels, as rows_scan_kernel.
__device__ __forceinline__ void scan_phase(const RowsMamba& a, Shared& s, const Place& at, int layer) {
  const RowsMambaLayer& l = a.layer[layer];
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 4, outputs = a.r + 2 * kScanStates, pieces = a.r / 4, count = at.scan_rows;
  float4 rate[kPasses] = {};
  uint2 weight[kPasses][kDtPieces] = {};
  float bias[kPasses] = {}, skip[kPasses] = {};
#pragma unroll
  for (int p = 0; p < kPasses; ++p) {
    const int local = p * (kThreads / 4) + tid / 4, c = at.scan_first + local;
    if (local >= at.scan_channels) continue;
    rate[p] = *reinterpret_cast<const float4*>(l.A_log + int64_t{c} * kScanStates + 4 * lane);
#pragma unroll
    for (int q = 0; q < kDtPieces; ++q)
      if (lane + 4 * q < pieces) weight[p][q] = *reinterpret_cast<const uint2*>(l.dt_proj + int64_t{c} * a.r + 4 * (lane + 4 * q));
    bias[p] = l.dt_bias[c];
    skip[p] = l.D[c];
  }
#pragma unroll
  for (int p = 0; p < kPasses; ++p)
    rate[p] = {-kLog2e * __expf(rate[p].x), -kLog2e * __expf(rate[p].y), -kLog2e * __expf(rate[p].z), -kLog2e * __expf(rate[p].w)};
  if (tid == 0) wait_for(counter(a, layer, kInDone), kBlocks);
  meet();

  const int quads = outputs / 4, items = kRows * quads, parts = mamba_parts(a.e), each = (parts + kScanGroups - 1) / kScanGroups;
  if (tid < items * kScanGroups) {
    const int item = tid % items, group = tid / items, row = item / quads, o = item % quads * 4;
    float4 sum{};
    if (row < count) {
      const float* const from = a.part + int64_t{at.scan_row + row} * parts * outputs + o;
      const int end = min(parts, (group + 1) * each);
#pragma unroll 8
      for (int i = group * each; i < end; ++i) {
        const float4 v = __ldcg(reinterpret_cast<const float4*>(from + int64_t{i} * outputs));
        sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
      }
    }
    *reinterpret_cast<float4*>(&s.gathered[group][4 * item]) = sum;
  }
  float own_x[kPasses] = {}, own_z[kPasses] = {};
  const int64_t own_row = at.scan_row + lane;
#pragma unroll
  for (int p = 0; p < kPasses; ++p) {
    const int local = p * (kThreads / 4) + tid / 4, c = at.scan_first + local;
    if (local >= at.scan_channels || lane >= count) continue;
    own_x[p] = read_fresh_one(a.mixed + own_row * a.e + c);
    own_z[p] = read_fresh_one(l.xz + own_row * 2 * a.e + a.e + c);
  }
  meet();
  if (tid == 0) barrier_arrive(shared_address(&s.in_free));
  if (tid < kRows * outputs) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kScanGroups; ++i) sum += s.gathered[i][tid];
    s.values[tid] = static_cast<float>(static_cast<bf16>(sum));
  }
  barrier_wait(shared_address(&s.h_full), layer % 2);
  meet();
#pragma unroll
  for (int p = 0; p < kPasses; ++p) {
    const int local = p * (kThreads / 4) + tid / 4, c = at.scan_first + local;
    float part[kRows] = {};
#pragma unroll
    for (int q = 0; q < kDtPieces; ++q) {
      if (lane + 4 * q >= pieces) break;
      const float4 v = four(weight[p][q]);
#pragma unroll
      for (int i = 0; i < kRows; ++i) part[i] += dot(v, *reinterpret_cast<const float4*>(s.values + i * outputs + 4 * (lane + 4 * q)));
    }
    const float dt = static_cast<float>(static_cast<bf16>(sum_own(part, lane))) + bias[p];
    const float delta = softplus_fast(dt), x = own_x[p], add = delta * x;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int from = tid % 32 / 4 * 4 + i;
      const float own_delta = __shfl_sync(0xffffffffu, delta, from), own_add = __shfl_sync(0xffffffffu, add, from);
      const float4 B = *reinterpret_cast<const float4*>(s.values + i * outputs + a.r + 4 * lane);
      const float4 C = *reinterpret_cast<const float4*>(s.values + i * outputs + a.r + kScanStates + 4 * lane);
      float4 now = s.h[i][local][lane];
      now.x = exp2_fast(own_delta * rate[p].x) * now.x + own_add * B.x;
      now.y = exp2_fast(own_delta * rate[p].y) * now.y + own_add * B.y;
      now.z = exp2_fast(own_delta * rate[p].z) * now.z + own_add * B.z;
      now.w = exp2_fast(own_delta * rate[p].w) * now.w + own_add * B.w;
      s.h[i][local][lane] = now;
      part[i] = now.x * C.x + now.y * C.y + now.z * C.z + now.w * C.w;
    }
    const float sum = sum_own(part, lane), z = own_z[p];
    if (local < at.scan_channels && lane < count)
      l.y[own_row * a.e + c] = static_cast<bf16>(__fdividef((sum + skip[p] * x) * z, 1.0f + __expf(-z)));
  }
  publish_shared();
  meet();
  if (tid == 0) {
    arrive(counter(a, layer, kScanDone + at.block / 32));
    if (l.out == nullptr) barrier_arrive(shared_address(&s.h_made));
  }
}

/// 16 rows by 24 columns of out_proj, their sum with the residual stream.
__device__ __forceinline__ void out_phase(const RowsMamba& a, Shared& s, const Place& at, int layer) {
  const RowsMambaLayer& l = a.layer[layer];
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
  const int local = tid / 16, column = tid % 16 * 2, c = at.out_first + column;
  const int64_t row = at.out_row + local;
  const bool finishes = local < kOutRows && column < at.out_columns && row < a.rows;
  uint32_t residual = 0;
  float2 weight{};
  if (finishes) {
    residual = fresh_pair(l.residual + row * a.d + c);
    weight = *reinterpret_cast<const float2*>(l.weight + c);
  }
  if (tid == 0) wait_for(counter(a, layer, kScanDone + at.block / 32), kBlocks / 2);
  meet();

  uint4 x[kOutSteps][2];
#pragma unroll
  for (int step = 0; step < kOutSteps; ++step) {
    const int k = (step * kWarps + warp) * 32 + 8 * t;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t from = at.out_row + 8 * i + g;
      x[step][i] = fresh_or_zero(l.y + from * a.e + k, from < a.rows && k < a.e);
    }
  }
  barrier_wait(shared_address(&s.out_full), layer % 2);
  float acc[3][4] = {};
#pragma unroll
  for (int step = 0; step < kOutSteps; ++step) {
    const int piece = step * kWarps + warp;
    if (32 * piece >= a.e) break;
    const unsigned char* const w = s.out + g * kOutPitch + 64 * piece + 16 * t;
    uint4 v[3];
#pragma unroll
    for (int j = 0; j < 3; ++j) v[j] = *reinterpret_cast<const uint4*>(w + 8 * j * kOutPitch);
#pragma unroll
    for (int j = 0; j < 3; ++j) mma(acc[j], {x[step][0].x, x[step][1].x, x[step][0].y, x[step][1].y}, v[j].x, v[j].y);
#pragma unroll
    for (int j = 0; j < 3; ++j) mma(acc[j], {x[step][0].z, x[step][1].z, x[step][0].w, x[step][1].w}, v[j].z, v[j].w);
  }
  meet();  // the weights have been read
  if (tid == 0) barrier_arrive(shared_address(&s.h_made));
  float* const sums = reinterpret_cast<float*>(s.out);  // (kWarps, kOutRows, kOutSums)
#pragma unroll
  for (int j = 0; j < 3; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      *reinterpret_cast<float2*>(sums + (warp * kOutRows + 8 * i + g) * kOutSums + 8 * j + 2 * t) = {acc[j][2 * i], acc[j][2 * i + 1]};
  meet();
  float square = 0;
  uint32_t made = 0, sum = 0;
  if (finishes) {
    float2 v = {0, 0};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 one = *reinterpret_cast<const float2*>(sums + (w * kOutRows + local) * kOutSums + column);
      v = {v.x + one.x, v.y + one.y};
    }
    made = pack(v.x, v.y);
    const float2 m = two(made), before = two(residual);
    sum = pack(m.x + before.x, m.y + before.y);
    const float2 u = two(sum);
    *reinterpret_cast<uint32_t*>(a.weighted + row * a.d + c) = pack(u.x * weight.x, u.y * weight.y);
    square = u.x * u.x + u.y * u.y;
  }
  square = sum_lanes<16>(square);
  if (finishes && column == 0) a.squares[row * mamba_squares(a.d) + at.block % 32] = square;
  publish_shared();
  meet();
  if (tid == 0) arrive(counter(a, layer, kOutDone));
  if (!finishes) return;
  *reinterpret_cast<uint32_t*>(l.made + row * a.d + c) = made;  // what no other block reads
  *reinterpret_cast<uint32_t*>(l.sum + row * a.d + c) = sum;
}

#endif

/// The layers of a run. Weights and states are in shared memory before they are used; what bounds a layer is three times
/// the way of values between blocks through the L2 cache.
__global__ void __launch_bounds__(kThreads + 32, 1) rows_mamba_kernel(const __grid_constant__ RowsMamba a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char mamba_shared[];
  Shared& s = *reinterpret_cast<Shared*>(mamba_shared);
  if (threadIdx.x == 0) {
    for (uint64_t* barrier : {&s.in_full, &s.out_full, &s.h_full, &s.in_free, &s.out_free, &s.h_made}) barrier_init(shared_address(barrier), 1);
    barriers_visible();
  }
  __syncthreads();
  const Place at(a);
  if (threadIdx.x >= kThreads) return Bringer{a, s, at, static_cast<int>(threadIdx.x) % 32}.run();
#pragma unroll 1
  for (int layer = 0; layer < a.layers; ++layer) {
    in_phase(a, s, at, layer);
    scan_phase(a, s, at, layer);
    if (a.layer[layer].out != nullptr) out_phase(a, s, at, layer);
  }
  if (threadIdx.x == 0) barrier_arrive(shared_address(&s.out_free));
#endif
}

}  // namespace

bool rows_mamba_fits(const RowsLinear& in, int64_t e, int64_t r, Device device) {
  return in.rows > kHalfRows && in.rows <= 2 * kHalfRows && in.n == 2 * e && in.k <= kMaxD && in.k % 32 == 0 && e <= kMaxE && e % 96 == 0 && r % 4 == 0 &&
         r + 2 * kScanStates <= kMaxOutputs && in.bias == nullptr && in.epilogue == Epilogue::none && in.y_row == in.n &&
         hopper_multiprocessors(device, reinterpret_cast<const void*>(rows_mamba_kernel)) >= 2 * kBlocks;
}

void rows_mamba(const RowsMamba& a, Stream stream) {
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  launch_with({together}, rows_mamba_kernel, {.grid = 2 * kBlocks, .block = kThreads + 32, .shared = sizeof(Shared), .stream = stream}, a);
}

}  // namespace krait::kernels::cuda
