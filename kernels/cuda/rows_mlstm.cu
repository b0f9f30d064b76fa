// The cell of an mLSTM block with what follows it, for one position of many rows whose states lie behind their positions.
#include <algorithm>
#include <cmath>

#include "kernels/cuda/aligned.h"
#include "kernels/cuda/mlstm_block.cuh"
#include "kernels/cuda/mlstm_common.cuh"
#include "kernels/cuda/mlstm_step_maps.h"
#include "kernels/cuda/multiprocessors.h"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/step_known.h"
#include "kernels/cuda/step_values.cuh"
#include "kernels/cuda/tma.cuh"
#include "kernels/mlstm_step.h"
#include "kernels/step_scope.h"

namespace krait::kernels::cuda {

namespace {

constexpr int kWarps = 12, kThreads = 32 * kWarps;            // that read states
constexpr int kSmallWarps = 4, kSmall = 32 * kSmallWarps;     // that make the rest of a head
constexpr int kBlock = kThreads + 32 + kSmall;                // and a warp that brings states
constexpr int kStageBytes = 24 * 1024, kMaxStages = 5;
constexpr int kFlight = 3;                                    // pieces under way: more stand in the way of what the kernel in front still reads
constexpr int kMaxHead = 512, kMaxRecent = 16;
constexpr int64_t kMaxShared = 227 * 1024;

template <class T>
struct Job {
  T* y;
  float *c, *n, *m;
  T *recent_k, *recent_v;
  float2* recent_gates;  // log sigmoid(f), i
  int32_t* count;
  unsigned* arrived;     // 0 between steps
  float* partial;        // (blocks, 2, dv + 4)
  const T *q, *k, *v, *x_c, *z, *skip;
  const float *gates, *gate_bias, *norm;  // gates (rows, parts, 2 heads)
  int64_t z_row;
  int parts, heads, dq, dv, size;
  int piece, pieces, stages;  // rows of C in a piece, pieces of a head
  int total;                          // pieces of all heads
  float scale, eps, norm_eps;
};

__device__ __forceinline__ float log_sigmoid(float x) { return fminf(x, 0.0f) - log1pf(expf(-fabsf(x))); }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
/// The threads that read states, and those of the small warps.
__device__ __forceinline__ void meet_readers() { meet(1, kThreads); }
__device__ __forceinline__ void meet_small() { meet(2, kSmall); }
#endif

template <class T>
__device__ __forceinline__ float4 four_of(const T* p) {
  const Side<T, 4> v = load_four(p);
  return {static_cast<float>(v.at[0]), static_cast<float>(v.at[1]), static_cast<float>(v.at[2]), static_cast<float>(v.at[3])};
}
__device__ __forceinline__ float4& quad_at(float* p) { return *reinterpret_cast<float4*>(p); }
__device__ __forceinline__ float4 quad_of(const float* p) { return *reinterpret_cast<const float4*>(p); }
__device__ __forceinline__ void add_product(float4& a, float f, float4 b) { a = {a.x + f * b.x, a.y + f * b.y, a.z + f * b.z, a.w + f * b.w}; }

/// What a block holds of the head that is read and of the one behind it, and of all.
struct Held {
  uint64_t full[kMaxStages], empty[kMaxStages];
  uint64_t q_full[2], rest_full[2], free[2];
  float coefficient[2][kMaxRecent], keep[2], top[2], r[2];
  int count[2];
  float products[kMaxRecent + 1];  // of q with k, and with n
  float sums[kWarps], squares[kWarps];
  int last;
};
constexpr int kHeldBytes = (static_cast<int>(sizeof(Held)) + 127) / 128 * 128;

template <class T>
struct Rooms {
  float *q, *add, *parts, *k;  // (2, dq), (2, dv), (groups, dv), (size, dq)
  T* v;                        // (size, dv)
  unsigned char* ring;
  __device__ Rooms(unsigned char* at, const Job<T>& j) {
    q = reinterpret_cast<float*>(at + kHeldBytes);
    add = q + 2 * j.dq;
    parts = add + 2 * j.dv;
    k = parts + 4 * kThreads;
    v = reinterpret_cast<T*>(k + kMaxRecent * j.dq);
    ring = at + (kHeldBytes + bytes(j.dq, j.dv) + 127) / 128 * 128;
  }
  static constexpr int bytes(int dq, int dv) { return (2 * dq + 2 * dv + 4 * kThreads + kMaxRecent * dq) * 4 + kMaxRecent * dv * static_cast<int>(sizeof(T)); }
};

/// The pieces of a block, and those of them that belong to a head.
struct Range {
  int begin, end, pieces;
  __device__ Range(int total, int pieces_of_head) : pieces(pieces_of_head) {
    begin = static_cast<int>(int64_t{total} * blockIdx.x / gridDim.x);
    end = static_cast<int>(int64_t{total} * (blockIdx.x + 1) / gridDim.x);
  }
  __device__ int first_unit() const { return begin / pieces; }
  __device__ int last_unit() const { return (end - 1) / pieces; }
  __device__ int from(int unit) const { return max(begin - unit * pieces, 0); }
  __device__ int to(int unit) const { return min(end - unit * pieces, pieces); }
  static __device__ int block_of(int total, int piece) { return static_cast<int>(((int64_t{piece} + 1) * gridDim.x - 1) / total); }
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

/// With position m the one of this step: its gates, which the block that keeps what is recent writes down, the stabiliser
/// and the weights of state and positions.
template <class T>
__device__ __forceinline__ void weigh(const Job<T>& j, Held& s, int at, int64_t unit, int m, bool keeps, int lane) {
  const int64_t row = unit / j.heads, head = unit % j.heads;
  const float2 before = lane < m ? j.recent_gates[unit * j.size + lane] : float2{};
  const float m_state = j.m[unit], bias_i = j.gate_bias[head], bias_f = j.gate_bias[j.heads + head];
  float i = 0, f = 0;
  for (int p = lane; p < j.parts; p += 32) {
    const float* const gates = j.gates + (row * j.parts + p) * 2 * j.heads + head;
    i += gates[0];
    f += gates[j.heads];
  }
  i = sum_lanes<32>(i) + bias_i;
  f = sum_lanes<32>(f) + bias_f;
  const float2 gate = lane == m ? float2{log_sigmoid(f), i} : before;
  float since = gate.x;  // of this position and all later ones
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const float later = __shfl_down_sync(0xffffffffu, since, offset);
    if (lane + offset < 32) since += later;
  }
  const float all = __shfl_sync(0xffffffffu, since, 0);
  float behind = __shfl_down_sync(0xffffffffu, since, 1);  // later ones alone
  if (lane == 31) behind = 0;
  const float weight = lane <= m ? behind + gate.y : -INFINITY;
  float top = fmaxf(weight, m_state + all);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
  if (lane < kMaxRecent) s.coefficient[at][lane] = expf(weight - top);
  if (lane == 0) {
    s.keep[at] = expf(m_state + all - top);
    s.top[at] = top;
  }
  if (keeps && lane == m) j.recent_gates[unit * j.size + m] = gate;
}

/// The small warps: of every head q, the weights, and in the block with the head's last piece what its positions add.
template <class T>
__device__ __forceinline__ void make_small(const Job<T>& j, Held& s, const Rooms<T>& rooms, const Range& range, int t) {
  const int lane = t % 32, warp = t / 32;
  const uint32_t q_full = shared_address(s.q_full), rest_full = shared_address(s.rest_full), free = shared_address(s.free);
  if (t == 0) {
    const int64_t unit = range.first_unit();
    const int m = j.count[unit];
    bring_into_l2(j.recent_k + unit * j.size * j.dq, int64_t{m} * j.dq * static_cast<int64_t>(sizeof(T)));
    bring_into_l2(j.recent_v + unit * j.size * j.dv, int64_t{m} * j.dv * static_cast<int64_t>(sizeof(T)));
    bring_into_l2(j.n + unit * j.dq, int64_t{j.dq} * 4);
  }
  wait_for_previous();
  let_next_begin();
#pragma unroll 1
  for (int unit = range.first_unit(), i = 0; unit <= range.last_unit(); ++unit, ++i) {
    const int at = i % 2, m = j.count[unit];
    if (i >= 2) barrier_wait(free + 8 * at, (i / 2 - 1) % 2);
    float* const q = rooms.q + at * j.dq;
    for (int x = 4 * t; x < j.dq; x += 4 * kSmall) {
      float4 v = four_of(j.q + int64_t{unit} * j.dq + x);
      quad_at(q + x) = {j.scale * v.x, j.scale * v.y, j.scale * v.z, j.scale * v.w};
    }
    if (t == 0) s.count[at] = m;
    barrier_arrive(q_full + 8 * at);
    const bool writes = m + 1 == j.size, closes = range.to(unit) == range.pieces;
    if (warp == 0) weigh(j, s, at, unit, m, closes && !writes, lane);
    meet_small();
    const auto key = [&](int p) { return p < m ? j.recent_k + (int64_t{unit} * j.size + p) * j.dq : j.k + int64_t{unit} * j.dq; };
    const auto value = [&](int p) { return p < m ? j.recent_v + (int64_t{unit} * j.size + p) * j.dv : j.v + int64_t{unit} * j.dv; };
    float* const n = j.n + int64_t{unit} * j.dq;
    if (closes) {
#pragma unroll 1
      for (int p = warp; p <= m + 1; p += kSmallWarps) {
        float sum = 0;
#pragma unroll
        for (int r = 0; r < kMaxHead / 128; ++r) {
          const int x = 4 * lane + 128 * r;
          if (x < j.dq) sum += dot(p <= m ? four_of(key(p) + x) : quad_of(n + x), quad_of(q + x));
        }
        sum = sum_lanes<32>(sum);
        if (lane == 0) s.products[p] = sum;
      }
      meet_small();
      float* const add = rooms.add + at * j.dv;
      for (int x = 4 * t; x < j.dv; x += 4 * kSmall) {
        float4 sum{};
#pragma unroll 4
        for (int p = 0; p <= m; ++p) add_product(sum, s.coefficient[at][p] * s.products[p], four_of(value(p) + x));
        quad_at(add + x) = sum;
      }
      if (t == 0) {
        float r = s.keep[at] * s.products[m + 1];
        for (int p = 0; p <= m; ++p) r += s.coefficient[at][p] * s.products[p];
        s.r[at] = r;
      }
      if (!writes) {
        for (int x = 4 * t; x < j.dq; x += 4 * kSmall)
          *reinterpret_cast<Side<T, 4>*>(j.recent_k + (int64_t{unit} * j.size + m) * j.dq + x) = load_four(key(m) + x);
        for (int x = 4 * t; x < j.dv; x += 4 * kSmall)
          *reinterpret_cast<Side<T, 4>*>(j.recent_v + (int64_t{unit} * j.size + m) * j.dv + x) = load_four(value(m) + x);
      }
    }
    if (writes) {
      if (i >= 1) barrier_wait(free + 8 * (1 - at), ((i - 1) / 2) % 2);  // the head before has read what comes here
      for (int x = 4 * t; x < j.dq; x += 4 * kSmall) {
        float4 sum{};
        if (closes) add_product(sum, s.keep[at], quad_of(n + x));
#pragma unroll 4
        for (int p = 0; p <= m; ++p) {
          const float f = s.coefficient[at][p];
          const float4 k = four_of(key(p) + x), own{f * k.x, f * k.y, f * k.z, f * k.w};
          quad_at(rooms.k + p * j.dq + x) = own;
          add_product(sum, 1.0f, own);
        }
        if (closes) quad_at(n + x) = sum;
      }
      for (int x = 4 * t; x < j.dv; x += 4 * kSmall)
#pragma unroll 4
        for (int p = 0; p <= m; ++p) *reinterpret_cast<Side<T, 4>*>(rooms.v + p * j.dv + x) = load_four(value(p) + x);
    }
    barrier_arrive(rest_full + 8 * at);
    meet_small();  // products and weights have been read
  }
}

/// Four rows of C, scaled, take in positions 0 to m of the block's head, and go back to memory.
template <class T>
__device__ __forceinline__ void take_in(float4 (&c)[4], float* to, const Job<T>& j, float keep, const float* k, const T* v, int m) {
#pragma unroll
  for (int r = 0; r < 4; ++r) c[r] = {keep * c[r].x, keep * c[r].y, keep * c[r].z, keep * c[r].w};
#pragma unroll 2
  for (int p = 0; p <= m; ++p) {
    const float4 value = four_of(v + p * j.dv), key = quad_of(k + p * j.dq);
    add_product(c[0], key.x, value);
    add_product(c[1], key.y, value);
    add_product(c[2], key.z, value);
    add_product(c[3], key.w, value);
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) quad_at(to + int64_t{r} * j.dv) = c[r];
}

/// The threads that read states: C^T q of the block's pieces, and the rest of each head whose last part comes from here.
template <class T>
__device__ __forceinline__ void read_states(const Job<T>& j, Held& s, const Rooms<T>& rooms, const Range& range, int t) {
  const uint32_t full = shared_address(s.full), empty = shared_address(s.empty), q_full = shared_address(s.q_full);
  const uint32_t rest_full = shared_address(s.rest_full), free = shared_address(s.free);
  const int lane = t % 32, warp = t / 32, lanes = j.dv / 4, groups = kThreads / lanes, group = t / lanes, column = 4 * (t % lanes);
  const bool first = t < lanes;  // has four columns of what the groups made
  const float dv = static_cast<float>(j.dv);
  wait_for_previous();
  int item = 0;
#pragma unroll 1
  for (int unit = range.first_unit(), i = 0; unit <= range.last_unit(); ++unit, ++i) {
    const int at = i % 2, begin = range.from(unit), end = range.to(unit);
    barrier_wait(q_full + 8 * at, i / 2 % 2);
    const int m = s.count[at];
    const bool writes = m + 1 == j.size;
    if (writes) barrier_wait(rest_full + 8 * at, i / 2 % 2);
    const float* const q = rooms.q + at * j.dq;
    float4 sum{};
#pragma unroll 1
    for (int piece = begin; piece < end; ++piece, ++item) {
      const int stage = item % j.stages, top = piece * j.piece, rows = min(j.piece, j.dq - top);
      barrier_wait(full + 8 * stage, item / j.stages % 2);
      const float* const from = reinterpret_cast<const float*>(rooms.ring + stage * kStageBytes);
      for (int x = 4 * group; x < rows; x += 4 * groups) {
        if (group >= groups) break;
        float4 c[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) c[r] = quad_of(from + (x + r) * j.dv + column);
        const float4 own = quad_of(q + top + x);
        add_product(sum, own.x, c[0]);
        add_product(sum, own.y, c[1]);
        add_product(sum, own.z, c[2]);
        add_product(sum, own.w, c[3]);
        if (writes)
          take_in(c, j.c + (int64_t{unit} * j.dq + top + x) * j.dv + column, j, s.keep[at], rooms.k + top + x, rooms.v + column, m);
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(empty + 8 * stage);
    }
    if (!writes) barrier_wait(rest_full + 8 * at, i / 2 % 2);
    if (group < groups) quad_at(rooms.parts + group * j.dv + column) = sum;

    const int64_t row = unit / j.heads, head = unit % j.heads, own = int64_t{unit} * j.dv + column;
    float4 x_c{}, z{}, skip{}, norm{};
    if (first) {
      x_c = four_of(j.x_c + own);
      z = four_of(j.z + row * j.z_row + head * j.dv + column);
      skip = four_of(j.skip + head * j.dv + column);
      norm = quad_of(j.norm + head * j.dv + column);
    }
    meet_readers();
    float4 made{};
    if (first) {
#pragma unroll 4
      for (int g = 0; g < groups; ++g) add_product(made, s.keep[at], quad_of(rooms.parts + g * j.dv + column));
      if (end == range.pieces) add_product(made, 1.0f, quad_of(rooms.add + at * j.dv + column));
    }
    float r = end == range.pieces ? s.r[at] : 0.0f;
    bool finishes = true;
    if (begin > 0 || end < range.pieces) {
      const int width = j.dv + 4, block = static_cast<int>(blockIdx.x);
      const auto part = [&](int b, int which) { return j.partial + (int64_t{b} * 2 + which) * width; };
      const int first_block = Range::block_of(j.total, unit * range.pieces), last_block = Range::block_of(j.total, (unit + 1) * range.pieces - 1);
      float* const here = part(block, begin > 0 ? 0 : 1);
      if (first) quad_at(here + column) = made;
      if (t == 0) here[j.dv] = r;
      __threadfence();
      meet_readers();
      if (t == 0) {
        const unsigned others = static_cast<unsigned>(last_block - first_block);
        s.last = atomicInc(j.arrived + unit, others) == others;
        __threadfence();
      }
      meet_readers();
      finishes = s.last != 0;
      if (finishes) {
        made = {};
        if (first)
          for (int b = first_block; b <= last_block; ++b) add_product(made, 1.0f, __ldcg(reinterpret_cast<const float4*>(part(b, b > first_block ? 0 : 1) + column)));
        r = __ldcg(part(last_block, last_block > first_block ? 0 : 1) + j.dv);
      }
    }
    if (finishes) {
      float mean = sum_lanes<32>(first ? made.x + made.y + made.z + made.w : 0.0f);
      if (lane == 0) s.sums[warp] = mean;
      meet_readers();
      mean = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) mean += s.sums[w];
      mean /= dv;
      const float4 off{made.x - mean, made.y - mean, made.z - mean, made.w - mean};
      float squares = sum_lanes<32>(first ? dot(off, off) : 0.0f);
      if (lane == 0) s.squares[warp] = squares;
      meet_readers();
      squares = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) squares += s.squares[w];
      const float inverse = 1.0f / mlstm_denominator(r, s.top[at], j.eps);
      const float factor = inverse * rsqrtf(squares / dv * inverse * inverse + j.norm_eps);
      if (first) {
        const float y[4] = {(off.x * factor * (1.0f + norm.x) + skip.x * x_c.x) * silu_of(z.x), (off.y * factor * (1.0f + norm.y) + skip.y * x_c.y) * silu_of(z.y),
                            (off.z * factor * (1.0f + norm.z) + skip.z * x_c.z) * silu_of(z.z), (off.w * factor * (1.0f + norm.w) + skip.w * x_c.w) * silu_of(z.w)};
        store_four(j.y + own, y);
      }
      if (t == 0) {  // all blocks of the head have read these
        j.count[unit] = writes ? 0 : m + 1;
        if (writes) j.m[unit] = s.top[at];
      }
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(free + 8 * at);
  }
}

#endif

/// A block: its share of all pieces of all heads' states, which lie behind one another. With the positions since C was
/// written, qs . k_p among themselves and weights w_p (weigh()), C_now^T qs = keep C^T qs + sum_p w_p (qs . k_p) v_p; the last of
/// `size` positions puts all of them into C. Parts of a head that lie in several blocks meet in memory: the last block to
/// arrive finishes. Bound by reading C, which a warp of its own brings, from before the kernel in front ends.
template <class T>
__global__ void __launch_bounds__(kBlock) rows_mlstm_kernel(const __grid_constant__ Job<T> j) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char mlstm_shared[];
  Held& s = *reinterpret_cast<Held*>(mlstm_shared);
  const Rooms<T> rooms(mlstm_shared, j);
  const Range range(j.total, j.pieces);
  const int t = static_cast<int>(threadIdx.x);
  const uint32_t full = shared_address(s.full), empty = shared_address(s.empty);
  if (t == 0) {
    for (int i = 0; i < j.stages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, kWarps);
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(shared_address(s.q_full) + 8 * i, kSmall);
      barrier_init(shared_address(s.rest_full) + 8 * i, kSmall);
      barrier_init(shared_address(s.free) + 8 * i, kWarps);
    }
    barriers_visible();
  }
  __syncthreads();
  if (t < kThreads) return read_states(j, s, rooms, range, t);
  if (t >= kThreads + 32) return make_small(j, s, rooms, range, t - kThreads - 32);
  if (t > kThreads) return;
#pragma unroll 1
  for (int i = 0; i < range.end - range.begin; ++i) {
    const int stage = i % j.stages, unit = (range.begin + i) / j.pieces, top = (range.begin + i) % j.pieces * j.piece;
    const uint32_t bytes = static_cast<uint32_t>(min(j.piece, j.dq - top) * j.dv) * 4;
    if (i >= j.stages) barrier_wait(empty + 8 * stage, (i / j.stages - 1) % 2);
    if (i >= kFlight) barrier_wait(full + 8 * ((i - kFlight) % j.stages), (i - kFlight) / j.stages % 2);
    barrier_expect(full + 8 * stage, bytes);
    bring_bytes(shared_address(rooms.ring) + stage * kStageBytes, j.c + (int64_t{unit} * j.dq + top) * j.dv, bytes, full + 8 * stage);
  }
#endif
}

template <class T>
void run(Tensor& y, MlstmState& state, MlstmRecent& recent, const MlstmStepMaps& in, const Tensor& z, const MlstmStepOutputWeights& w) {
  Job<T> j{};
  const int64_t units = state.m.numel();
  j.y = y.data<T>();
  j.c = state.c.data<float>();
  j.n = state.n.data<float>();
  j.m = state.m.data<float>();
  j.recent_k = recent.k.data<T>();
  j.recent_v = recent.v.data<T>();
  j.recent_gates = reinterpret_cast<float2*>(recent.gates.data<float>());
  j.count = recent.count.data<int32_t>();
  j.arrived = reinterpret_cast<unsigned*>(recent.arrived.data<int32_t>());
  j.q = in.q.data<T>();
  j.k = in.k.data<T>();
  j.v = in.v.data<T>();
  j.x_c = in.x_c.data<T>();
  j.z = z.data<T>();
  j.skip = w.skip.data<T>();
  j.gates = in.gates.data<float>();
  j.gate_bias = w.gate_bias.data<float>();
  j.norm = w.norm.data<float>();
  j.z_row = z.stride(0);
  j.parts = static_cast<int>(in.gates.size(1));
  j.heads = static_cast<int>(state.c.size(1));
  j.dq = static_cast<int>(state.c.size(2));
  j.dv = static_cast<int>(state.c.size(3));
  j.size = static_cast<int>(recent.k.size(2));
  j.piece = std::min(kStageBytes / (16 * j.dv) * 4, j.dq);
  j.pieces = (j.dq + j.piece - 1) / j.piece;
  j.total = static_cast<int>(units) * j.pieces;
  j.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(j.dq)));
  j.eps = static_cast<float>(w.eps);
  j.norm_eps = static_cast<float>(w.norm_eps);
  const int64_t grid = std::min<int64_t>(kMultiprocessors, j.total), rest = (kHeldBytes + Rooms<T>::bytes(j.dq, j.dv) + 127) / 128 * 128;
  j.stages = static_cast<int>(std::min<int64_t>(kMaxStages, (kMaxShared - rest) / kStageBytes));
  const Tensor partial = empty({grid, 2, j.dv + 4}, DType::f32, y.device());
  j.partial = partial.data<float>();
  keep_shared_memory(rows_mlstm_kernel<T>);
  launch_overlapped(rows_mlstm_kernel<T>, {.grid = grid, .block = kBlock, .shared = rest + j.stages * int64_t{kStageBytes}, .stream = current_stream(y.device())}, j);
  known_to_step(y);
}

}  // namespace

void mlstm_recent_fits(bool& fits, const MlstmState& state, const Tensor& conv, const MlstmStepMapsWeights& w) {
  const int64_t rows = state.c.size(0), dq = state.c.size(2), dv = state.c.size(3);
  const DType dtype = conv.dtype();
  fits = runs_sm90(conv.device()) && (dtype == DType::bf16 || dtype == DType::f32) && rows > kFewRows && dq % 4 == 0 && dv % 4 == 0 && dq <= kMaxHead &&
         dv <= kMaxHead && state.m.numel() * dq < (int64_t{1} << 31) && aligned(state.c, state.n) && mlstm_maps_fit(rows, conv, w);
}

void mlstm_step_output(Tensor& y, MlstmState& state, MlstmRecent& recent, const MlstmStepMaps& in, const Tensor& z, const MlstmStepOutputWeights& w) {
  y.dtype() == DType::bf16 ? run<bf16>(y, state, recent, in, z, w) : run<float>(y, state, recent, in, z, w);
}

}  // namespace krait::kernels::cuda
