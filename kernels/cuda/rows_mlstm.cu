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

constexpr int kWarps = 12, kThreads = 32 * kWarps;         // that read states
constexpr int kSmallWarps = 4, kSmall = 32 * kSmallWarps;  // that make the rest of a head
constexpr int kBlock = kThreads + 32 + kSmall;             // and a warp that brings states
constexpr int kBounds = 896;  // as many threads would have 72 registers each, which leaves room beside for the maps in front
constexpr int kStageBytes = 24 * 1024, kMaxStages = 9;
/// Pieces under way: more stand in the way of the kernel in front, and of every other read of the block.
template <class S>
constexpr int kFlight = sizeof(S) == 2 ? 2 : 3;
constexpr int kParts = 4 * kThreads;  // values at most of all groups that read states
constexpr int kMaxHead = 512, kMaxRecent = 16;
constexpr int64_t kMaxShared = 227 * 1024;

template <class T>
struct Job {
  T* y;
  void* c;  // fp32 or bf16
  float *n, *m;
  T *recent_k, *recent_v;
  float2* recent_gates;  // log sigmoid(f), i
  int32_t* count;
  unsigned* arrived;  // 0 between steps
  float* partial;     // (blocks, 2, dv + 4)
  const T *q, *k, *v, *x_c, *z, *skip;
  const float *gates, *gate_bias, *norm;  // gates (rows, parts, 2 heads)
  int64_t z_row;
  int parts, heads, dq, dv, size;
  int piece, pieces, total, stages;  // rows of C in a piece, pieces of a head, of all heads
  float scale, eps, norm_eps;
};

__device__ __forceinline__ float log_sigmoid(float x) { return fminf(x, 0.0f) - log1pf(expf(-fabsf(x))); }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
/// Of the small warps.
__device__ __forceinline__ void meet_small() { meet(1, kSmall); }
#endif

template <class T>
__device__ __forceinline__ float4 four_of(const T* p) {
  const Side<T, 4> v = load_four(p);
  return {static_cast<float>(v.at[0]), static_cast<float>(v.at[1]), static_cast<float>(v.at[2]), static_cast<float>(v.at[3])};
}
__device__ __forceinline__ float4& quad_at(float* p) { return *reinterpret_cast<float4*>(p); }
__device__ __forceinline__ float4 quad_of(const float* p) { return *reinterpret_cast<const float4*>(p); }
__device__ __forceinline__ void add_product(float4& a, float f, float4 b) { a = {a.x + f * b.x, a.y + f * b.y, a.z + f * b.z, a.w + f * b.w}; }

/// What a block holds of the head that is read and, where there are two, of the one behind it.
struct Held {
  uint64_t full[kMaxStages], empty[kMaxStages];
  uint64_t q_full[2], rest_full, parts_full[2];
  int count[2];
  float weight[kMaxRecent], keep, top;  // of positions, of the state; the stabiliser
  float products[kMaxRecent + 1];       // of q with k, and with n
  float sums[kSmallWarps], squares[kSmallWarps];
  int ready, last;
};
constexpr int kHeldBytes = (static_cast<int>(sizeof(Held)) + 127) / 128 * 128;

template <class T>
struct Rooms {
  float *q, *n, *parts, *add, *k;  // (2, dq), (2, dq), (2, groups, dv), (dv); weighted keys (size, dq)
  T *keys, *values;                // (2, size, dq), (2, size, dv)
  unsigned char* ring;
  __device__ Rooms(unsigned char* at, const Job<T>& j) {
    q = reinterpret_cast<float*>(at + kHeldBytes);
    n = q + 2 * j.dq;
    parts = n + 2 * j.dq;
    add = parts + 2 * kParts;
    k = add + j.dv;
    keys = reinterpret_cast<T*>(k + kMaxRecent * j.dq);
    values = keys + 2 * kMaxRecent * j.dq;
    ring = at + (kHeldBytes + bytes(j.dq, j.dv) + 127) / 128 * 128;
  }
  static constexpr int bytes(int dq, int dv) {
    return (4 * dq + 2 * kParts + dv + kMaxRecent * dq) * 4 + 2 * kMaxRecent * (dq + dv) * static_cast<int>(sizeof(T));
  }
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

/// What the weights of a head are made from, in the lanes of a warp.
struct Gates {
  float2 before;  // of earlier positions
  float m, i, f;  // i, f: without what other lanes have
};

template <class T>
__device__ __forceinline__ Gates read_gates(const Job<T>& j, int64_t unit, int m, int lane) {
  const int64_t row = unit / j.heads, head = unit % j.heads;
  Gates g{lane < m ? j.recent_gates[unit * j.size + lane] : float2{}, j.m[unit], lane == 0 ? j.gate_bias[head] : 0.0f,
          lane == 0 ? j.gate_bias[j.heads + head] : 0.0f};
  for (int p = lane; p < j.parts; p += 32) {
    const float* const gates = j.gates + (row * j.parts + p) * 2 * j.heads + head;
    g.i += gates[0];
    g.f += gates[j.heads];
  }
  return g;
}

/// With position m the one of this step: its gates, which are written down where the block `keeps` what is recent, the
/// stabiliser and the weights of state and positions. One warp.
template <class T>
__device__ __forceinline__ void weigh(const Job<T>& j, Held& s, const Gates& g, int64_t unit, int m, bool keeps, int lane) {
  const float i = sum_lanes<32>(g.i), f = sum_lanes<32>(g.f);
  const float2 gate = lane == m ? float2{log_sigmoid(f), i} : g.before;
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
  float top = fmaxf(weight, g.m + all);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
  if (lane < kMaxRecent) s.weight[lane] = expf(weight - top);
  if (lane == 0) {
    s.keep = expf(g.m + all - top);
    s.top = top;
  }
  if (keeps && lane == m) j.recent_gates[unit * j.size + m] = gate;
}

/// `count` (a multiple of 16 bytes' worth) values into shared memory, by all small threads.
template <class V>
__device__ __forceinline__ void copy_values(V* to, const V* from, int count, int t) {
  constexpr int kEach = 16 / sizeof(V);
#pragma unroll 4
  for (int x = kEach * t; x < count; x += kEach * kSmall) copy_async(to + x, from + x, true);
}

/// The small warps. What a head needs is on its way while the head in front is read: under this load a read takes long.
template <class T>
struct Small {
  const Job<T>& j;
  Held& s;
  const Rooms<T>& rooms;
  const Range& range;
  int t;

  __device__ __forceinline__ bool closes(int unit) const { return range.to(unit) == range.pieces; }
  __device__ __forceinline__ T* keys(int i) const { return rooms.keys + i % 2 * kMaxRecent * j.dq; }
  __device__ __forceinline__ T* values(int i) const { return rooms.values + i % 2 * kMaxRecent * j.dv; }
  __device__ __forceinline__ bool needs(int unit, int m) const { return closes(unit) || m + 1 == j.size; }

  /// The positions that are not in the state, which older kernels wrote.
  __device__ __forceinline__ void bring_recent(int64_t unit, int i, int m) const {
    if (!needs(static_cast<int>(unit), m)) return;
    copy_values(keys(i), j.recent_k + unit * j.size * j.dq, m * j.dq, t);
    copy_values(values(i), j.recent_v + unit * j.size * j.dv, m * j.dv, t);
    copy_values(rooms.n + i % 2 * j.dq, j.n + unit * j.dq, j.dq, t);
  }

  /// What this step brings; q is what reading the state asks for.
  __device__ __forceinline__ Gates bring_own(int64_t unit, int i, int m) const {
    const int at = i % 2;
    if (needs(static_cast<int>(unit), m)) {
      copy_values(keys(i) + m * j.dq, j.k + unit * j.dq, j.dq, t);
      copy_values(values(i) + m * j.dv, j.v + unit * j.dv, j.dv, t);
    }
    copy_commit();
    Gates g{};
    if (t < 32) g = read_gates(j, unit, m, t);
    float* const q = rooms.q + at * j.dq;
    if (const int x = 4 * t; x < j.dq) {
      const float4 v = four_of(j.q + unit * j.dq + x);
      quad_at(q + x) = {j.scale * v.x, j.scale * v.y, j.scale * v.z, j.scale * v.w};
    }
    if (t == 0) s.count[at] = m;
    barrier_arrive(shared_address(s.q_full) + 8 * at);
    return g;
  }

  /// The weights; where the head's last piece is the block's, what its positions add, and n; what goes into the state.
  __device__ __forceinline__ void make_rest(int64_t unit, int i, int m, const Gates& gates) const {
    const int lane = t % 32, warp = t / 32, x = 4 * t;
    const bool writes = m + 1 == j.size, last = closes(static_cast<int>(unit));
    const float *const q = rooms.q + i % 2 * j.dq, *const n = rooms.n + i % 2 * j.dq;
    const T *const key = keys(i), *const value = values(i);
    copy_wait<1>();
    meet_small();
    if (warp == 0) weigh(j, s, gates, unit, m, last && !writes, lane);
    if (last) {
#pragma unroll 1
      for (int p = warp; p <= m + 1; p += kSmallWarps) {
        float sum = 0;
        for (int c = 4 * lane; c < j.dq; c += 128) sum += dot(p <= m ? four_of(key + p * j.dq + c) : quad_of(n + c), quad_of(q + c));
        sum = sum_lanes<32>(sum);
        if (lane == 0) s.products[p] = sum;
      }
    }
    meet_small();
    if (last && x < j.dv) {
      float4 sum{};
#pragma unroll 4
      for (int p = 0; p <= m; ++p) add_product(sum, s.weight[p] * s.products[p], four_of(value + p * j.dv + x));
      quad_at(rooms.add + x) = sum;
      if (!writes) *reinterpret_cast<Side<T, 4>*>(j.recent_v + (unit * j.size + m) * j.dv + x) = load_four(value + m * j.dv + x);
    }
    if (last && !writes && x < j.dq) *reinterpret_cast<Side<T, 4>*>(j.recent_k + (unit * j.size + m) * j.dq + x) = load_four(key + m * j.dq + x);
    if (writes && x < j.dq) {
      float4 sum{};
      if (last) add_product(sum, s.keep, quad_of(n + x));
#pragma unroll 4
      for (int p = 0; p <= m; ++p) {
        const float f = s.weight[p];
        const float4 k = four_of(key + p * j.dq + x), own{f * k.x, f * k.y, f * k.z, f * k.w};
        quad_at(rooms.k + p * j.dq + x) = own;
        add_product(sum, 1.0f, own);
      }
      if (last) quad_at(j.n + unit * j.dq + x) = sum;
    }
    barrier_arrive(shared_address(&s.rest_full));
  }

  /// What stands beside the cell's output.
  struct Beside {
    Side<T, 4> x_c, z, skip;
    float4 norm;
  };
  __device__ __forceinline__ Beside read_beside(int64_t unit) const {
    const int64_t row = unit / j.heads, head = unit % j.heads, column = 4 * t;
    if (column >= j.dv) return {};
    return {load_four(j.x_c + unit * j.dv + column), load_four(j.z + row * j.z_row + head * j.dv + column), load_four(j.skip + head * j.dv + column),
            quad_of(j.norm + head * j.dv + column)};
  }

  /// What the groups read, with the other blocks' parts, and all that follows the cell.
  __device__ __forceinline__ void finish(int unit, int i, const Beside& beside) const {
    const int lane = t % 32, warp = t / 32, at = i % 2, column = 4 * t, lanes = j.dv / 4, groups = kThreads / lanes;
    const bool first = column < j.dv, last = closes(unit), begins = range.from(unit) == 0;
    const int64_t own = int64_t{unit} * j.dv + column;
    const int width = j.dv + 4, block = static_cast<int>(blockIdx.x);
    const auto part = [&](int b, int which) { return j.partial + (int64_t{b} * 2 + which) * width; };
    const int first_block = begins ? block : Range::block_of(j.total, unit * range.pieces);
    const int last_block = last ? block : Range::block_of(j.total, (unit + 1) * range.pieces - 1);
    const unsigned others = static_cast<unsigned>(last_block - first_block);
    const auto of_others = [&](float4& sum, float& r) {
      for (int b = first_block + 1; b <= last_block; ++b)
        if (first) add_product(sum, 1.0f, __ldcg(reinterpret_cast<const float4*>(part(b, 0) + column)));
      r = __ldcg(part(last_block, 0) + j.dv);
    };
    const auto& [x_c, z, skip, norm] = beside;
    float r = 0;
    if (last) {
      r = s.keep * s.products[s.count[at] + 1];
      for (int p = 0; p <= s.count[at]; ++p) r += s.weight[p] * s.products[p];
    }
    float4 rest{};
    bool ready = false;
    if (begins && !last) {  // the others are most often done before
      if (t == 0) {
        unsigned seen;
        asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(seen) : "l"(j.arrived + unit) : "memory");
        s.ready = seen == others;
      }
      meet_small();
      ready = s.ready != 0;
      if (ready) of_others(rest, r);
    }
    barrier_wait(shared_address(s.parts_full) + 8 * at, i / 2 % 2);
    float4 made{};
    if (first) {
      const float* const parts = rooms.parts + at * kParts + column;
#pragma unroll 4
      for (int g = 0; g < groups; ++g) add_product(made, s.keep, quad_of(parts + g * j.dv));
      if (last) add_product(made, 1.0f, quad_of(rooms.add + column));
    }
    if (ready) {
      if (t == 0) j.arrived[unit] = 0;
    } else if (others > 0) {
      float* const here = part(block, begins ? 1 : 0);
      if (first) quad_at(here + column) = made;
      if (t == 0) here[j.dv] = r;
      __threadfence();
      meet_small();
      if (t == 0) {
        s.last = atomicInc(j.arrived + unit, others) == others;
        __threadfence();
      }
      meet_small();
      if (s.last == 0) return;
      if (first) made = __ldcg(reinterpret_cast<const float4*>(part(first_block, 1) + column));
      of_others(rest, r);
    }
    add_product(made, 1.0f, rest);

    const float dv = static_cast<float>(j.dv);
    float mean = sum_lanes<32>(first ? made.x + made.y + made.z + made.w : 0.0f);
    if (lane == 0) s.sums[warp] = mean;
    meet_small();
    mean = 0;
#pragma unroll
    for (int w = 0; w < kSmallWarps; ++w) mean += s.sums[w];
    mean /= dv;
    const float4 off{made.x - mean, made.y - mean, made.z - mean, made.w - mean};
    float squares = sum_lanes<32>(first ? dot(off, off) : 0.0f);
    if (lane == 0) s.squares[warp] = squares;
    meet_small();
    squares = 0;
#pragma unroll
    for (int w = 0; w < kSmallWarps; ++w) squares += s.squares[w];
    const float inverse = 1.0f / mlstm_denominator(r, s.top, j.eps);
    const float factor = inverse * rsqrtf(squares / dv * inverse * inverse + j.norm_eps);
    if (first) {
      const float h[4] = {off.x * (1.0f + norm.x), off.y * (1.0f + norm.y), off.z * (1.0f + norm.z), off.w * (1.0f + norm.w)};
      float y[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) y[c] = (h[c] * factor + static_cast<float>(skip.at[c]) * static_cast<float>(x_c.at[c])) * silu_of(static_cast<float>(z.at[c]));
      store_four(j.y + own, y);
    }
    if (t == 0) {  // all blocks of the head have read these
      const int m = s.count[at];
      const bool writes = m + 1 == j.size;
      j.count[unit] = writes ? 0 : m + 1;
      if (writes) j.m[unit] = s.top;
    }
  }

  __device__ __forceinline__ void run() const {
    const int first = range.first_unit(), end = range.last_unit() + 1;
    int m = j.count[first], m_next = first + 1 < end ? j.count[first + 1] : 0;
    bring_recent(first, 0, m);
    wait_for_previous();
    let_next_begin();
    Gates gates = bring_own(first, 0, m);
#pragma unroll 1
    for (int unit = first, i = 0; unit < end; ++unit, ++i) {
      Gates next{};
      int behind = 0;
      if (unit + 1 < end) {
        if (unit + 2 < end) behind = j.count[unit + 2];
        bring_recent(unit + 1, i + 1, m_next);
        next = bring_own(unit + 1, i + 1, m_next);
      } else {
        copy_commit();
      }
      const Beside beside = read_beside(unit);
      make_rest(unit, i, m, gates);
      finish(unit, i, beside);
      gates = next;
      m = m_next;
      m_next = behind;
    }
  }
};

/// Four rows of C, scaled, take in positions 0 to m of the block's head, and go back to memory.
template <class T, class S>
__device__ __forceinline__ void take_in(float4 (&c)[4], S* to, const Job<T>& j, float keep, const float* k, const T* v, int m) {
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
  for (int r = 0; r < 4; ++r) {
    const float four[4] = {c[r].x, c[r].y, c[r].z, c[r].w};
    store_four(to + int64_t{r} * j.dv, four);
  }
}

/// The threads that read states: C^T q of the block's pieces, by groups of threads.
template <class T, class S>
__device__ __forceinline__ void read_states(const Job<T>& j, Held& s, const Rooms<T>& rooms, const Range& range, int t) {
  const uint32_t full = shared_address(s.full), empty = shared_address(s.empty);
  const int lane = t % 32, lanes = j.dv / 4, groups = kThreads / lanes, group = t / lanes, column = 4 * (t % lanes);
  int stage = 0, phase = 0;
#pragma unroll 1
  for (int unit = range.first_unit(), i = 0; unit <= range.last_unit(); ++unit, ++i) {
    const int at = i % 2, end = range.to(unit);
    barrier_wait(shared_address(s.q_full) + 8 * at, i / 2 % 2);
    const int m = s.count[at];
    const bool writes = m + 1 == j.size;
    if (writes) barrier_wait(shared_address(&s.rest_full), i % 2);
    const float* const q = rooms.q + at * j.dq;
    float4 sum{};
#pragma unroll 1
    for (int piece = range.from(unit); piece < end; ++piece) {
      const int top = piece * j.piece, rows = min(j.piece, j.dq - top);
      barrier_wait(full + 8 * stage, phase);
      const S* const from = reinterpret_cast<const S*>(rooms.ring + stage * kStageBytes);
      for (int x = 4 * group; x < rows; x += 4 * groups) {
        if (group >= groups) break;
        float4 c[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) c[r] = four_of(from + (x + r) * j.dv + column);
        const float4 own = quad_of(q + top + x);
        add_product(sum, own.x, c[0]);
        add_product(sum, own.y, c[1]);
        add_product(sum, own.z, c[2]);
        add_product(sum, own.w, c[3]);
        if (writes)
          take_in(c, static_cast<S*>(j.c) + (int64_t{unit} * j.dq + top + x) * j.dv + column, j, s.keep, rooms.k + top + x, rooms.values + i % 2 * kMaxRecent * j.dv + column, m);
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(empty + 8 * stage);
      if (++stage == j.stages) {
        stage = 0;
        phase ^= 1;
      }
    }
    if (group < groups) quad_at(rooms.parts + at * kParts + group * j.dv + column) = sum;
    __syncwarp();
    if (lane == 0) barrier_arrive(shared_address(s.parts_full) + 8 * at);
  }
}

#endif

/// A block: its share of all pieces of all heads' states, which lie behind one another. With the positions since C was
/// written, qs . k_p among themselves and weights w_p (weigh()), C_now^T qs = keep C^T qs + sum_p w_p (qs . k_p) v_p; the last of
/// `size` positions puts all of them into C. Parts of a head that lie in several blocks meet in memory: the last block to
/// arrive finishes. Bound by reading C, which a warp of its own brings, from before the kernel in front ends.
template <class T, class S>
__global__ void __launch_bounds__(kBounds) rows_mlstm_kernel(const __grid_constant__ Job<T> j) {
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
      barrier_init(shared_address(s.parts_full) + 8 * i, kWarps);
    }
    barrier_init(shared_address(&s.rest_full), kSmall);
    barriers_visible();
  }
  __syncthreads();
  if (t < kThreads) return read_states<T, S>(j, s, rooms, range, t);
  if (t >= kThreads + 32) return Small<T>{j, s, rooms, range, t - kThreads - 32}.run();
  if (t > kThreads) return;
  const int flight = min(kFlight<S>, j.stages);  // a stage's barrier is asked for its last phase, not for one before that
#pragma unroll 1
  for (int i = 0; i < range.end - range.begin; ++i) {
    const int stage = i % j.stages, unit = (range.begin + i) / j.pieces, top = (range.begin + i) % j.pieces * j.piece;
    const uint32_t bytes = static_cast<uint32_t>(min(j.piece, j.dq - top) * j.dv) * sizeof(S);
    if (i >= j.stages) barrier_wait(empty + 8 * stage, (i / j.stages - 1) % 2);
    if (const int old = i - flight; old >= 0) barrier_wait(full + 8 * (old % j.stages), old / j.stages % 2);
    barrier_expect(full + 8 * stage, bytes);
    bring_bytes(shared_address(rooms.ring) + stage * kStageBytes, static_cast<const S*>(j.c) + (int64_t{unit} * j.dq + top) * j.dv, bytes, full + 8 * stage);
  }
#endif
}

/// In front of the ring, and the stages of that.
template <class T>
int64_t rest_of(int64_t dq, int64_t dv) {
  return (kHeldBytes + Rooms<T>::bytes(static_cast<int>(dq), static_cast<int>(dv)) + 127) / 128 * 128;
}
int64_t stages_of(DType dtype, int64_t dq, int64_t dv) {
  return std::min<int64_t>(kMaxStages, (kMaxShared - (dtype == DType::bf16 ? rest_of<bf16>(dq, dv) : rest_of<float>(dq, dv))) / kStageBytes);
}

template <class T, class S>
void run(Tensor& y, MlstmState& state, MlstmRecent& recent, const MlstmStepMaps& in, const Tensor& z, const MlstmStepOutputWeights& w) {
  KRAIT_CHECK(aligned(in.q, in.k, in.v), "mlstm_step: q, k and v of a state behind its positions must begin at multiples of 16 bytes");
  Job<T> j{};
  const int64_t units = state.m.numel();
  j.y = y.data<T>();
  j.c = state.c.raw_data();
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
  j.piece = std::min(kStageBytes / (4 * j.dv * static_cast<int>(sizeof(S))) * 4, j.dq);
  j.pieces = (j.dq + j.piece - 1) / j.piece;
  j.total = static_cast<int>(units) * j.pieces;
  j.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(j.dq)));
  j.eps = static_cast<float>(w.eps);
  j.norm_eps = static_cast<float>(w.norm_eps);
  const int64_t grid = std::min<int64_t>(kMultiprocessors, j.total), rest = rest_of<T>(j.dq, j.dv);
  j.stages = static_cast<int>(stages_of(y.dtype(), j.dq, j.dv));
  const Tensor partial = empty({grid, 2, j.dv + 4}, DType::f32, y.device());
  j.partial = partial.data<float>();
  keep_shared_memory(rows_mlstm_kernel<T, S>);
  launch_overlapped(rows_mlstm_kernel<T, S>, {.grid = grid, .block = kBlock, .shared = rest + j.stages * int64_t{kStageBytes}, .stream = current_stream(y.device())}, j);
  known_to_step(y);
}

}  // namespace

void mlstm_recent_fits(bool& fits, const MlstmState& state, const Tensor& conv, const MlstmStepMapsWeights& w) {
  const int64_t rows = state.c.size(0), dq = state.c.size(2), dv = state.c.size(3);
  const DType dtype = conv.dtype();
  fits = runs_sm90(conv.device()) && (dtype == DType::bf16 || dtype == DType::f32) && rows > kFewRows && dq % 8 == 0 && dv % 8 == 0 && dq <= kMaxHead &&
         dv <= kMaxHead && state.m.numel() * dq < (int64_t{1} << 31) && stages_of(dtype, dq, dv) >= 2 && aligned(state.c, state.n) &&
         mlstm_maps_fit(rows, conv, w);
}

void mlstm_step_output(Tensor& y, MlstmState& state, MlstmRecent& recent, const MlstmStepMaps& in, const Tensor& z, const MlstmStepOutputWeights& w) {
  const bool narrow = state.c.dtype() == DType::bf16;
  if (y.dtype() == DType::f32)
    narrow ? run<float, bf16>(y, state, recent, in, z, w) : run<float, float>(y, state, recent, in, z, w);
  else
    narrow ? run<bf16, bf16>(y, state, recent, in, z, w) : run<bf16, float>(y, state, recent, in, z, w);
}

}  // namespace krait::kernels::cuda
