#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/cluster_launch.cuh"
#include "kernels/cuda/exp2.cuh"
#include "kernels/cuda/few_rows.cuh"

// Mamba's and Mamba-2's states with the map behind them by columns: a block has 16 channels and all outputs; a cluster
// adds its blocks' sums, each block a share of the outputs.
namespace krait::kernels::cuda {

namespace {

using namespace few;

constexpr int kChannels = 16, kCluster = 8;
constexpr int kScanPieces = kScanMaxRank / 16;                                  // of four of dt_proj's columns a lane multiplies
constexpr int kScanOutputs = kScanMaxRank + 2 * kScanStates, kPartGroups = 12;  // a thread of each group adds parts
constexpr int kTiles = kFewWidth / 16 / kWarps;                                 // of 16 outputs that a warp multiplies

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define KRAIT_CLUSTERS 1
#else
#define KRAIT_CLUSTERS 0  // gather_steps() gathers nothing then
#endif

// A block's kChannels columns, from `first`, of the map's weights (d, e).
struct Columns {
  uint2 w[kTiles][2];
  __device__ __forceinline__ void read(const bf16* from, int d, int e, int first) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int output = 16 * (warp + kWarps * i) + 8 * half + lane / 4;
        w[i][half] = output < d && first < e ? *reinterpret_cast<const uint2*>(from + int64_t{output} * e + first + lane % 4 * 4) : uint2{};
      }
  }
};

struct Received {
  static constexpr int kShare = kFewWidth / kCluster;  // outputs that a block adds
  float2 sums[kCluster][kFewRows / 2][kShare];         // of two rows
  float2 squares[kCluster][kFewRows];
  uint64_t barrier;
};

// Before wait_for_previous(): the block can receive when the others' wait_for_cluster() returns.
__device__ __forceinline__ void expect_sums(Received& received, int rows, bool squares) {
#if KRAIT_CLUSTERS
  if (threadIdx.x == 0) {
    const uint32_t barrier = shared_address(&received.barrier);
    const int pairs = (rows + 1) / 2;
    arrivals_init(barrier);
    arrivals_expect(barrier, static_cast<uint32_t>(kCluster * (pairs * Received::kShare + (squares && cluster_rank() == 0 ? rows : 0)) * 8));
  }
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\n" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_cluster() {
#if KRAIT_CLUSTERS
  asm volatile("barrier.cluster.wait.aligned;\n" ::: "memory");
#endif
}

// part (clusters, rows, d): the cluster's sums of y (its blocks' channels) times the columns. y has been written by the
// block's threads before a barrier.
__device__ __forceinline__ void multiply(float* part, const Columns& columns, const bf16 (&y)[kFewRows][kChannels], Received& received,
                                         int rows, int d) {
#if KRAIT_CLUSTERS
  constexpr int kShare = Received::kShare;
  static_assert(kShare % 16 == 0, "a tile for one block");
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
  const int rank = static_cast<int>(cluster_rank()), pairs = (rows + 1) / 2;
  const uint32_t own = shared_address(&received.barrier), base = shared_address(&received.sums[rank][t][0]);
  const uint2 v = *reinterpret_cast<const uint2*>(&y[g][4 * t]);
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    float sums[4] = {};
    mma(sums, {columns.w[i][0].x, columns.w[i][1].x, columns.w[i][0].y, columns.w[i][1].y}, v.x, v.y);
    const int output = 16 * (warp + kWarps * i);
    const auto target = static_cast<uint32_t>(output / kShare);
    const uint32_t to = of_block(base + static_cast<uint32_t>((output % kShare + g) * 8), target), barrier = of_block(own, target);
    if (t < pairs) {
      send(to, barrier, sums[0], sums[1]);
      send(to + 64, barrier, sums[2], sums[3]);
    }
  }
  arrivals_wait(own, 0);
  const int cluster = static_cast<int>(blockIdx.x) / kCluster;
#pragma unroll 1
  for (int at = tid; at < pairs * kShare; at += kThreads) {
    const int pair = at / kShare, i = at % kShare, output = rank * kShare + i;
    float2 s{};
#pragma unroll
    for (int from = 0; from < kCluster; ++from) {
      const float2 u = received.sums[from][pair][i];
      s = {s.x + u.x, s.y + u.y};
    }
    float* const to = part + (int64_t{cluster} * rows + 2 * pair) * d + output;
    if (output < d) {
      to[0] = s.x;
      if (2 * pair + 1 < rows) to[d] = s.y;
    }
  }
#endif
}

struct ScanShared {
  Received received;
  float4 states[kFewRows / 4][kThreads];  // of the thread that reads them
  float gathered[kPartGroups][kFewRows][kScanOutputs], values[kFewRows][kScanOutputs];
  bf16 y[kFewRows][kChannels];
};

struct StateShared {
  Received received;
  float4 states[kFewRows][2][kThreads];
  bf16 BC[kFewRows][2][kHeadStates], y[kFewRows][kChannels];
  float x[kFewRows][kChannels], z[kFewRows][kChannels], squares[kFewRows][kChannels], dt[kFewRows];
};

// Four lanes have a channel of a row, four states each.
__global__ void __launch_bounds__(kThreads, 2) few_scan_kernel(const __grid_constant__ FewScan a) {
  extern __shared__ __align__(16) unsigned char shared[];
  auto& s = *reinterpret_cast<ScanShared*>(shared);
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 4, own = tid % 64 / 4;
  const int first = static_cast<int>(blockIdx.x) * kChannels, c = first + own, outputs = a.r + 2 * kScanStates, quads = outputs / 4;
  const bool alive = first < a.e;
  let_next_begin();
  expect_sums(s.received, a.rows, false);

  Columns columns;
  columns.read(a.w, a.d, a.e, first);
  uint2 ranks[kScanPieces]{};
  float4 rate{};
  float bias = 0, skip = 0;
  if (alive) {
#pragma unroll
    for (int i = 0; i < kFewRows / 4; ++i)
      if (const int row = tid / 64 + 4 * i; row < a.rows) copy_async(&s.states[i][tid], a.h + (int64_t{row} * a.e + c) * kScanStates + 4 * lane, true);
    rate = *reinterpret_cast<const float4*>(a.A_log + c * kScanStates + 4 * lane);
    bias = a.dt_bias[c];
    skip = a.D[c];
#pragma unroll
    for (int q = 0; q < kScanPieces; ++q)
      if (const int at = 4 * (lane + 4 * q); at < a.r) ranks[q] = *reinterpret_cast<const uint2*>(a.dt_proj + int64_t{c} * a.r + at);
  }
  copy_commit();
  rate = {-kLog2e * __expf(rate.x), -kLog2e * __expf(rate.y), -kLog2e * __expf(rate.z), -kLog2e * __expf(rate.w)};
  if (tid < kFewRows * kChannels) s.y[tid / kChannels][tid % kChannels] = static_cast<bf16>(0.0f);
  copy_wait<0>();
  wait_for_cluster();
  __syncthreads();

  const int group = tid / quads, quad = tid % quads, groups = min(kPartGroups, kThreads / quads);
  wait_for_previous();

  float x[kFewRows / 4]{}, z[kFewRows / 4]{};
#pragma unroll
  for (int i = 0; i < kFewRows / 4; ++i)
    if (const int row = tid / 64 + 4 * i; alive && row < a.rows) {
      x[i] = read_fresh_one(a.mixed + int64_t{row} * a.e + c);
      z[i] = read_fresh_one(a.xz + (int64_t{row} * 2 + 1) * a.e + c);
    }
  if (group < groups) {
#pragma unroll 1
    for (int r = 0; r < a.rows; ++r) {
      float4 all{};
#pragma unroll 1
      for (int base = group; base < a.projections; base += 4 * groups) {  // once, as a rule
        float4 v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int p = base + i * groups;
          v[i] = p < a.projections ? fresh(a.projected + (int64_t{r} * a.projections + p) * outputs + 4 * quad) : float4{};
        }
        all = sum(all, sum(sum(v[0], v[1]), sum(v[2], v[3])));
      }
      *reinterpret_cast<float4*>(&s.gathered[group][r][4 * quad]) = all;
    }
  }
  __syncthreads();
  if (const int i = tid % 128; i < outputs)
#pragma unroll 1
    for (int r = tid / 128; r < a.rows; r += 2) {
      float v = 0;
#pragma unroll
      for (int j = 0; j < kPartGroups; ++j) v += j < groups ? s.gathered[j][r][i] : 0.0f;
      s.values[r][i] = rounded(v);
    }
  __syncthreads();
#pragma unroll 1
  for (int i = 0; i < kFewRows / 4; ++i) {
    const int row = tid / 64 + 4 * i;
    if (row >= a.rows) break;  // whole warps
    const float* const values = s.values[row];
    float dt = 0;
#pragma unroll
    for (int q = 0; q < kScanPieces; ++q)
      if (const int at = 4 * (lane + 4 * q); at < a.r) dt += dot(four_masked(ranks[q]), *reinterpret_cast<const float4*>(values + at));
    dt = rounded(sum_lanes<4>(dt)) + bias;
    const float delta = softplus_fast(dt), in = i == 0 ? x[0] : x[1], out = i == 0 ? z[0] : z[1], add = delta * in;
    const float4 B = *reinterpret_cast<const float4*>(values + a.r + 4 * lane), C = *reinterpret_cast<const float4*>(values + a.r + kScanStates + 4 * lane);
    float4 h = s.states[i][tid];
    h = {exp2f(delta * rate.x) * h.x + add * B.x, exp2f(delta * rate.y) * h.y + add * B.y, exp2f(delta * rate.z) * h.z + add * B.z,
         exp2f(delta * rate.w) * h.w + add * B.w};
    const float all = sum_lanes<4>(dot(h, C));
    if (!alive) break;
    *reinterpret_cast<float4*>(a.h + (int64_t{row} * a.e + c) * kScanStates + 4 * lane) = h;
    if (lane != 0) continue;
    const bf16 y = static_cast<bf16>((all + skip * in) * silu_fast(out));
    s.y[row][own] = y;
    a.y[int64_t{row} * a.e + c] = y;
  }
  __syncthreads();
  multiply(a.part, columns, s.y, s.received, a.rows, a.d);
}

// Sixteen lanes have a channel of all rows in turn, eight states each; all channels of a block are of one head.
__global__ void __launch_bounds__(kThreads, 2) few_state_kernel(const __grid_constant__ FewState a) {
  extern __shared__ __align__(16) unsigned char shared[];
  auto& s = *reinterpret_cast<StateShared*>(shared);
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 16, own = tid / 16, e = a.heads * a.p;
  const int first = static_cast<int>(blockIdx.x) * kChannels, c = first + own, head = first / a.p;
  const bool alive = first < e;
  auto* const all_h = static_cast<float*>(a.h);
  let_next_begin();
  expect_sums(s.received, a.rows, true);

  // Quads `lane` and `lane` + 16 of the states: a warp reads whole lines.
  const int64_t at_h = int64_t{c} * kHeadStates + 4 * lane, row_states = int64_t{e} * kHeadStates;
  if (alive)
#pragma unroll 1
    for (int r = 0; r < a.rows; ++r)
#pragma unroll
      for (int i = 0; i < 2; ++i) copy_async(&s.states[r][i][tid], all_h + r * row_states + at_h + 64 * i, true);
  copy_commit();
  Columns columns;
  columns.read(a.w, a.d, e, first);
  float rate = 0, bias = 0, skip = 0, norm = 0;
  if (alive) {
    rate = -__expf(a.A_log[head]);
    bias = a.dt_bias[head];
    skip = a.D[a.D_columns == 1 ? head : c];
    norm = a.norm[c];
  }
  if (tid < kFewRows * kChannels) {
    s.y[tid / kChannels][tid % kChannels] = static_cast<bf16>(0.0f);
    s.squares[tid / kChannels][tid % kChannels] = 0;
  }
  copy_wait<0>();
  wait_for_cluster();
  __syncthreads();

  wait_for_previous();

  if (const int row = tid / 32, i = tid % 32; alive && row < a.rows) {  // B and C, then x, z and dt
    const bf16 *const mixed = a.mixed + int64_t{row} * a.channels, *const in = a.zxbcdt + int64_t{row} * a.input;
    const uint4 v = read_fresh(mixed + e + 8 * i);
    const float u = read_fresh_one(i < kChannels ? mixed + first + i : in + first + i - kChannels), step = read_fresh_one(in + e + a.channels + head);
    *reinterpret_cast<uint4*>(&s.BC[row][0][8 * i]) = v;
    (i < kChannels ? s.x : s.z)[row][i % kChannels] = u;
    const float raw = step + bias;
    if (i == 0) s.dt[row] = fminf(fmaxf(softplus_fast(raw), a.low), a.high);
  }
  __syncthreads();
  if (alive)
#pragma unroll 1
    for (int r = 0; r < a.rows; ++r) {
      const float dt = s.dt[r], decay = __expf(dt * rate), in = s.x[r][own], add = dt * in;
      float all = 0;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float4 B = four_masked(*reinterpret_cast<const uint2*>(&s.BC[r][0][4 * lane + 64 * i]));
        const float4 C = four_masked(*reinterpret_cast<const uint2*>(&s.BC[r][1][4 * lane + 64 * i]));
        float4 h = s.states[r][i][tid];
        h = {decay * h.x + add * B.x, decay * h.y + add * B.y, decay * h.z + add * B.z, decay * h.w + add * B.w};
        all += dot(h, C);
        *reinterpret_cast<float4*>(all_h + r * row_states + at_h + 64 * i) = h;
      }
      all = sum_lanes<16>(all);
      if (lane == 0) {
        const float gated = rounded(all + skip * in) * silu_fast(s.z[r][own]);
        const bf16 y = static_cast<bf16>(gated * norm);
        s.y[r][own] = y;
        s.squares[r][own] = gated * gated;
        a.weighted[int64_t{r} * e + c] = y;
      }
    }
  __syncthreads();
#if KRAIT_CLUSTERS
  const int rank = static_cast<int>(cluster_rank());
  if (const int r = tid / 16; r < kFewRows) {  // to the cluster's first block, with the sums
    const float square = sum_lanes<16>(s.squares[r][lane]);
    if (lane == 0 && r < a.rows)
      send(of_block(shared_address(&s.received.squares[rank][r]), 0), of_block(shared_address(&s.received.barrier), 0), square, 0.0f);
  }
#else
  const int rank = 0;
#endif
  multiply(a.part, columns, s.y, s.received, a.rows, a.d);
  if (rank == 0 && tid < a.rows) {
    float square = 0;
#pragma unroll
    for (int i = 0; i < kCluster; ++i) square += s.received.squares[i][tid].x;
    a.squares[tid * (gridDim.x / kCluster) + blockIdx.x / kCluster] = square;
  }
}

template <class Work>
void start(void (*kernel)(Work), const Work& a, int64_t e, int64_t shared, Stream stream) {
  keep_shared_memory(kernel);
  launch_with({overlapping(), clusters_of(kCluster)}, kernel, {.grid = few_parts(e) * kCluster, .block = kThreads, .shared = shared, .stream = stream}, a);
}

}  // namespace

int64_t few_parts(int64_t e) { return ceil_div(e, int64_t{kChannels} * kCluster); }
void few_scan(const FewScan& a, Stream stream) { start(few_scan_kernel, a, a.e, sizeof(ScanShared), stream); }
void few_state(const FewState& a, Stream stream) { start(few_state_kernel, a, int64_t{a.heads} * a.p, sizeof(StateShared), stream); }

}  // namespace krait::kernels::cuda
