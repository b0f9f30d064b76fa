// Backward of attention on Hopper, heads of 128, in one kernel with five products instead of the seven of
// attention_wgmma.cu:
//   a block owns 128 keys, a warpgroup 64 of them, and walks the queries, 64 a step:
//       S^T = k q^T    dP^T = v do^T    dv += P^T do    dk += dS^T q
//   dS^T goes to shared memory. A step later both warpgroups make dq = dS k over the 128 keys, half of the columns
//   each, and a thread adds that to sums in global memory (bulk reductions of fp32).
// The same bits at every run: dq of 64 queries is added in the order in which blocks took their tiles. For each block
// of queries a counter says whose turn it is; the thread that adds waits for it, the warpgroups go on. Who waits, waits
// for a tile that was taken before and so is being worked on: any number of blocks comes to the end. With a head's
// tiles taken from the last keys to the first, each walking from its diagonal on, turns come by themselves: a tile
// reaches the same queries two steps after the tile that was taken before it.
#include <algorithm>
#include <cmath>

#include "core/cuda/launch.cuh"
#include "kernels/cuda/attention_own.h"
#include "kernels/cuda/attention_wgmma.cuh"
#include "kernels/cuda/hopper.h"
#include "kernels/cuda/overlap.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int kD = 128, kTilePanel = kPanel<kD>;
constexpr int kDsPanel = kRows * 128;  // bytes of dS^T of 64 keys, 64 queries: lines are keys, swizzled as a box is
constexpr int kDqPanel = kRows * 64 * 4;  // of dq of 64 queries, 64 columns: 16 bytes of each of 128 threads, 8 times

// (b, l, heads, d) as plain memory.
struct Plain {
  bf16* data;
  int64_t batch, row, head;
  __device__ bf16* at(int b, int h) const { return data + b * batch + h * head; }
};
Plain plain_of(const Rows& r) { return {static_cast<bf16*>(const_cast<void*>(r.data)), r.batch, r.row, r.head}; }

// Key heads are numbered over the batch; query heads n too, those of key head n / per_key().
struct Joint {
  int lq, lk, hq, hkv, heads;  // heads: b hkv
  bool causal;
  float scale;
  const float* stats;  // (b hq, query_blocks(), 2, 64): lse log2(e), infinite from row lq on, and D
  uint32_t* state;     // zeros at first: tiles taken; then (b hq, query_blocks(), 2) parts of dq that are added
  float* sums;         // (b hq, query_blocks(), 2) panels of dq

  static constexpr int kState = 4;
  __host__ __device__ int per_key() const { return hq / hkv; }
  __host__ __device__ int query_blocks() const { return (lq + kRows - 1) / kRows; }
  __host__ __device__ int tiles() const { return (lk + kTile - 1) / kTile; }
  __host__ __device__ int items() const { return heads * tiles(); }
  __host__ __device__ int64_t panels() const { return int64_t{heads} * per_key() * query_blocks() * kGroups; }
  __device__ void find(int item, int& head, int& tile) const {
    head = item / tiles();
    tile = tiles() - 1 - item % tiles();
  }
  __device__ int begin(int tile) const { return causal ? tile * kGroups : 0; }
  // Parts of dq of query block i; and how many are added before that of a tile: those of later keys.
  __device__ int turns(int i) const { return causal ? i / kGroups + 1 : tiles(); }
  __device__ int turn(int tile, int i) const { return turns(i) - 1 - tile; }
};

// Shared memory: k and v of the tile, a ring of q, do and the rows' lse and D, two steps' dS, dq on its way out. A
// barrier pair is "full" and, 8 bytes on, "empty".
struct Side {
  static constexpr int kStages = 2, kOut = 2;
  static constexpr int kK = 0, kV = kK + kGroups * kTilePanel, kRing = kV + kGroups * kTilePanel,
                       kDs = kRing + kStages * 2 * kTilePanel, kDq = kDs + 2 * kGroups * kDsPanel,
                       kStats = kDq + kGroups * kOut * kDqPanel, kResident = kStats + kStages * kStatBytes,
                       kFull = kResident + 32, kDsFull = kFull + 16 * kStages, kDqFull = kDsFull + 32,
                       kBytes = kDqFull + 16 * kGroups * kOut + 1024;
};

// D = do . o and lse as the steps read them. 16 threads a row. Bound by memory.
__global__ void __launch_bounds__(256)
    row_stats_kernel(float* stats, Plain o, Plain do_, const float* lse, int hq, int l, int blocks, int64_t rows) {
  constexpr int kLanes = kD / 8;
  const int64_t at = (int64_t{blockIdx.x} * 256 + threadIdx.x) / kLanes, n = at / (blocks * kRows);
  const int lane = threadIdx.x % kLanes, row = static_cast<int>(at % (blocks * kRows));
  float sum = 0;
  if (at < rows && row < l) {
    const int b = static_cast<int>(n / hq), h = static_cast<int>(n % hq);
    const uint4 x = *reinterpret_cast<const uint4*>(o.at(b, h) + row * o.row + 8 * lane);
    const uint4 y = *reinterpret_cast<const uint4*>(do_.at(b, h) + row * do_.row + 8 * lane);
    sum = dot_pair(x.x, y.x) + dot_pair(x.y, y.y) + dot_pair(x.z, y.z) + dot_pair(x.w, y.w);
  }
#pragma unroll
  for (int m = kLanes / 2; m > 0; m /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, m);
  if (lane == 0 && at < rows) {
    float* to = stats + (n * blocks + row / kRows) * (2 * kRows) + row % kRows;
    to[0] = row < l ? lse[n * l + row] * kLog2e : INFINITY;
    to[kRows] = sum;
  }
}

// A warpgroup's accumulator of 64 rows times a factor to rows [first, first + 64) below `rows`; the four lanes of a row
// change values so that each stores 16 bytes at a time.
template <int N>
__device__ __forceinline__ void write_rows(bf16* to, int64_t pitch, const float (&acc)[N], float factor, int first,
                                           int rows) {
  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first + threadIdx.x % 128 / 32 * 16 + g + 8 * half;
#pragma unroll
    for (int j = 0; j < N / 4; j += 4) {
      uint32_t r[4];
#pragma unroll
      for (int x = 0; x < 4; ++x)
        r[x] = pack(acc[4 * (j + x) + 2 * half] * factor, acc[4 * (j + x) + 2 * half + 1] * factor);
#pragma unroll
      for (int x = 0; x < 4; x += 2) {
        const uint32_t got = __shfl_xor_sync(0xffffffffu, c & 1 ? r[x] : r[x + 1], 1);
        (c & 1 ? r[x] : r[x + 1]) = got;
      }
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        const uint32_t got = __shfl_xor_sync(0xffffffffu, c & 2 ? r[x] : r[x + 2], 2);
        (c & 2 ? r[x] : r[x + 2]) = got;
      }
      if (row < rows) *reinterpret_cast<uint4*>(to + row * pitch + 8 * (j + c)) = uint4{r[0], r[1], r[2], r[3]};
    }
  }
}

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
// dq of 64 queries from the sums. Begins where blocks of joint_gradient_kernel have ended, beside the last of them: it
// waits for the sums it needs. Bound by memory.
__global__ void __launch_bounds__(kGroups * 128) round_sums_kernel(Plain dq, const Joint p) {
  const int blocks = p.query_blocks(), at = blockIdx.x, n = at / blocks, i = at % blocks, half = threadIdx.x / 128;
  if (threadIdx.x % 128 == 0)
    while (load_acquire(p.state + Joint::kState + int64_t{at} * kGroups + half) != p.turns(i)) __nanosleep(200);
  __syncthreads();
  const float4* from =
      reinterpret_cast<const float4*>(p.sums) + (int64_t{at} * kGroups + half) * (kDqPanel / 16) + threadIdx.x % 128;
  float acc[32];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float4 v = __ldcg(from + j * 128);
    acc[4 * j] = v.x;
    acc[4 * j + 1] = v.y;
    acc[4 * j + 2] = v.z;
    acc[4 * j + 3] = v.w;
  }
  write_rows(dq.at(n / p.hq, n % p.hq) + half * 64, dq.row, acc, p.scale, i * kRows, p.lq);
  if (at == gridDim.x - 1) wait_for_previous();  // so that what comes after this kernel comes after that one
}

#if KRAIT_WGMMA_BODY

__device__ __forceinline__ void store_release(uint32_t* p, uint32_t v) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
// Bulk additions after it come after what load_acquire saw.
__device__ __forceinline__ void sums_fence() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
__device__ __forceinline__ void store_bytes(void* to, uint32_t from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void store_matrices(uint32_t to, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}
__device__ __forceinline__ void store_quad(uint32_t to, float a, float b, float c, float d) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}
// Hides where a value comes from: what is made of it stays in its loop and takes no registers outside.
__device__ __forceinline__ uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// The thread that takes tiles and brings what they need. The first steps of a tile are brought while the tile before
// still has its keys.
__device__ __forceinline__ void bring_tiles(const CUtensorMap& q, const CUtensorMap& k, const CUtensorMap& v,
                                            const CUtensorMap& do_, const Joint& p, uint32_t shared) {
  const uint32_t resident = shared + Side::kResident;
  const int items = p.items(), blocks = p.query_blocks(), per_key = p.per_key();
  Steps<kD, Side::kStages> steps(shared + Side::kRing, shared + Side::kFull);
  for (uint32_t parity = 1;; parity ^= 1) {
    const int item = min(static_cast<int>(atomicAdd(p.state, 1)), items);
    int head = 0, tile = 0;
    if (item < items) p.find(item, head, tile);
    const int hk = head % p.hkv, batch = head / p.hkv, begin = p.begin(tile),
              all = item < items ? (blocks - begin) * per_key : 0;
    int i = begin, n = head * per_key, t = 0;
    const auto bring = [&] {
      const uint32_t barrier = steps.bring(q, do_, i * kRows, n % p.hq, batch, kStatBytes);
      bring_bytes(shared + Side::kStats + steps.ring.stage * kStatBytes,
                  p.stats + (int64_t{n} * blocks + i) * (2 * kRows), kStatBytes, barrier);
      steps.ring.advance();
      if (++i == blocks) {
        i = begin;
        ++n;
      }
    };
#pragma unroll 1
    for (; t < min(Side::kStages, all); ++t) bring();
    barrier_wait(resident + 8, parity);
    asm volatile("st.shared.s32 [%0], %1;" ::"r"(resident + 16), "r"(item) : "memory");
    if (item == items) break;
    barrier_expect(resident, 2 * kGroups * kTilePanel);
#pragma unroll 1
    for (int g = 0; g < kGroups; ++g) {
      const int row = (tile * kGroups + g) * kRows;
      bring_rows<kD>(shared + Side::kK + g * kTilePanel, k, resident, row, hk, batch);
      bring_rows<kD>(shared + Side::kV + g * kTilePanel, v, resident, row, hk, batch);
    }
#pragma unroll 1
    for (; t < all; ++t) bring();
  }
  barrier_arrive(resident);
}

// The thread that adds one warpgroup's columns of dq, each panel in its turn.
__device__ __forceinline__ void add_queries(const Joint& p, uint32_t shared, int group) {
  const uint32_t resident = shared + Side::kResident;
  const int items = p.items(), blocks = p.query_blocks(), per_key = p.per_key();
  Ring<Side::kOut> out;
  uint32_t parity = 0;
  for (int item; (item = next_item(resident, parity)) < items;) {
    barrier_arrive(resident + 8);
    int head, tile;
    p.find(item, head, tile);
#pragma unroll 1
    for (int n = head * per_key; n < (head + 1) * per_key; ++n)
#pragma unroll 1
      for (int i = p.begin(tile); i < blocks; ++i, out.advance()) {
        const uint32_t at = group * Side::kOut + out.stage, barrier = shared + Side::kDqFull + 16 * at,
                       from = shared + Side::kDq + at * kDqPanel;
        const int64_t panel = (int64_t{n} * blocks + i) * kGroups + group;
        uint32_t* added = p.state + Joint::kState + panel;
        float* to = p.sums + panel * (kDqPanel / 4);
        const uint32_t turn = p.turn(tile, i);
        barrier_wait(barrier, out.parity);
        if (turn == 0) {
          store_bytes(to, from, kDqPanel);
        } else {
          while (load_acquire(added) != turn) continue;
          sums_fence();
          add_values(to, from, kDqPanel);
        }
        stores_commit();
        stores_wait_read<0>();
        barrier_arrive(barrier + 8);
        stores_wait<0>();
        store_release(added, turn + 1);
      }
  }
}

// A warpgroup that computes. Few registers are free beside both accumulators: k and v stay in shared memory, each pair
// of scores is gone as soon as its weights are made, and dq leaves while dv and dk are under way.
template <bool kCausal>
__device__ __forceinline__ void compute(const Plain& dk, const Plain& dv, const Joint& p, uint32_t shared, int group) {
  const uint32_t resident = shared + Side::kResident;
  const int items = p.items(), blocks = p.query_blocks(), per_key = p.per_key();
  const int lane = threadIdx.x % 32, c = lane % 4, row0 = threadIdx.x % 128 / 32 * 16 + lane / 4;
  const int put_row = threadIdx.x % 128 / 32 * 16 + lane % 16;
  const float to_exponent = p.scale * kLog2e;
  const uint32_t own_k = shared + Side::kK + group * kTilePanel, own_v = shared + Side::kV + group * kTilePanel;
  Steps<kD, Side::kStages> steps(shared + Side::kRing, shared + Side::kFull);
  Ring<2> to_ds;
  Ring<Side::kOut> out;
  uint32_t parity = 0;
  const auto ds_barrier = [&](int stage) { return shared + Side::kDsFull + 16 * stage; };
  const auto ds_panel = [&](int stage, int g) { return shared + Side::kDs + (stage * kGroups + g) * kDsPanel; };
  // dq, this group's columns, of the step whose dS lies in `stage`.
  const auto multiply_keys = [&](float(&dq)[32], int stage) {
    const uint64_t a = across_lines(ds_panel(stage, 0), kBox),
                   b = across_lines(opaque(shared + Side::kK + group * kBox), kBox);
#pragma unroll
    for (int x = 0; x < 4 * kGroups; ++x)
      wgmma<1, 1>(dq, further(a, x * 2048), further(b, x / 4 * kTilePanel + x % 4 * 2048), x > 0);
    wgmma_commit();
  };
  const auto put_dq = [&](const float(&dq)[32]) {
    const uint32_t at = group * Side::kOut + out.stage, barrier = shared + Side::kDqFull + 16 * at,
                   to = shared + Side::kDq + at * kDqPanel + threadIdx.x % 128 * 16;
    barrier_wait(barrier + 8, out.parity ^ 1);
#pragma unroll
    for (int j = 0; j < 8; ++j) store_quad(to + j * 2048, dq[4 * j], dq[4 * j + 1], dq[4 * j + 2], dq[4 * j + 3]);
    publish_shared();
    release(barrier);
    out.advance();
  };
  const auto wait_ds_room = [&] { barrier_wait(ds_barrier(to_ds.stage) + 8, to_ds.parity ^ 1); };
  const auto publish_ds = [&] {
    publish_shared();
    release(ds_barrier(to_ds.stage));
    to_ds.advance();
  };
  // Of the step before the one that to_ds stands at.
  const auto wait_ds = [&](int before) { barrier_wait(ds_barrier(before), to_ds.parity ^ before); };

  for (int item; (item = next_item(resident, parity)) < items;) {
    int head, tile;
    p.find(item, head, tile);
    const int block = tile * kGroups + group;
    float acc_k[kD / 2], acc_v[kD / 2];
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) acc_k[i] = acc_v[i] = 0;
#pragma unroll 1
    for (int h = 0; h < per_key; ++h) {
      int i = p.begin(tile);
      bool pending = false;         // dS of the step before waits for its product
      if (kCausal && group == 1) {  // the first queries are before all of these keys
        steps.skip(0, 1);
        wait_ds_room();
#pragma unroll
        for (int x = 0; x < kDsPanel / 2048; ++x)
          store_quad(ds_panel(to_ds.stage, 1) + x * 2048 + threadIdx.x % 128 * 16, 0, 0, 0, 0);
        publish_ds();
        pending = true;
        ++i;
      }
      for (; i < blocks; ++i) {
        float s[32], dp[32], dq[32];  // here: none of them is alive from step to step
        steps.scores(s, dp, opaque(own_k), opaque(own_v));
        const uint32_t panels = steps.at(), stats = shared + Side::kStats + steps.ring.stage * kStatBytes + 8 * c;
        wgmma_wait<0>();
        hold(s);
        hold(dp);
        if (kCausal && i == block) {
#pragma unroll
          for (int e = 0; e < 32; ++e)
            if (e / 4 * 8 + 2 * c + e % 2 < row0 + e % 4 / 2 * 8) s[e] = -INFINITY;
        }
        if (!kCausal && (block + 1) * kRows > p.lk) {
#pragma unroll
          for (int e = 0; e < 32; ++e)
            if (block * kRows + row0 + e % 4 / 2 * 8 >= p.lk) s[e] = -INFINITY;
        }
        uint32_t w[4][4], ds[4][4];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float2 lse = load_pair(stats + 32 * j), delta = load_pair(stats + kRows * 4 + 32 * j);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int e = 4 * j + 2 * half;
            const float x = exp2_fast(fmaf(s[e], to_exponent, -lse.x)),
                        y = exp2_fast(fmaf(s[e + 1], to_exponent, -lse.y));
            w[j / 2][j % 2 * 2 + half] = pack(x, y);
            ds[j / 2][j % 2 * 2 + half] = pack(x * (dp[e] - delta.x), y * (dp[e + 1] - delta.y));
          }
        }
        // Also where none is pending, of whatever lies there: a branch around it would make the products wait for each
        // other.
        const int before = to_ds.stage ^ 1;
        if (pending) wait_ds(before);
        wgmma_begin();
        multiply_keys(dq, before);
        accumulate<kD>(acc_v, w, panels + kTilePanel);
        wgmma_commit();
        accumulate<kD>(acc_k, ds, panels);
        wgmma_commit();
        wait_ds_room();
#pragma unroll
        for (int x = 0; x < 4; ++x)
          store_matrices(ds_panel(to_ds.stage, group) + put_row * 128 + (((2 * x + lane / 16) ^ lane % 8) << 4), ds[x]);
        publish_ds();
        wgmma_wait<2>();
        hold(dq);
        if (pending) {
          release(ds_barrier(before) + 8);
          put_dq(dq);
        }
        pending = true;
        wgmma_wait<0>();
        hold(acc_v);
        hold(acc_k);
        steps.done_with(steps.ring.stage);
        steps.ring.advance();
      }
      float dq[32];
      const int before = to_ds.stage ^ 1;
      wait_ds(before);
      wgmma_begin();
      multiply_keys(dq, before);
      wgmma_wait<0>();
      hold(dq);
      release(ds_barrier(before) + 8);
      put_dq(dq);
    }
    release(resident + 8);
    const int hk = head % p.hkv, batch = head / p.hkv;
    write_rows(dk.at(batch, hk), dk.row, acc_k, p.scale, block * kRows, p.lk);
    write_rows(dv.at(batch, hk), dv.row, acc_v, 1.0f, block * kRows, p.lk);
  }
}

#endif

template <bool kCausal>
__global__ void __launch_bounds__(kThreads, 1)
    joint_gradient_kernel(const Plain dk, const Plain dv, const __grid_constant__ CUtensorMap q,
                          const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v,
                          const __grid_constant__ CUtensorMap do_, const Joint p) {
#if KRAIT_WGMMA_BODY
  let_next_begin();
  const uint32_t shared = aligned_shared();
  if (threadIdx.x == 0) {
    const auto pair = [&](int offset, int i, uint32_t full, uint32_t empty) {
      barrier_init(shared + offset + 16 * i, full);
      barrier_init(shared + offset + 16 * i + 8, empty);
    };
    pair(Side::kResident, 0, 1, 4 * kGroups + kGroups);
    for (int i = 0; i < Side::kStages; ++i) pair(Side::kFull, i, 1, 4 * kGroups);
    for (int i = 0; i < 2; ++i) pair(Side::kDsFull, i, 4 * kGroups, 4 * kGroups);
    for (int i = 0; i < kGroups * Side::kOut; ++i) pair(Side::kDqFull, i, 4, 1);
    barriers_visible();
  }
  __syncthreads();
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 - kGroups * 4;
  if (group == kGroups) {
    give_registers<40>();
    if (threadIdx.x % 32 != 0) return;
    if (warp == 0) bring_tiles(q, k, v, do_, p, shared);
    if (warp == 1 || warp == 2) add_queries(p, shared, warp - 1);
  } else {
    take_registers<232>();
    compute<kCausal>(dk, dv, p, shared, group);
  }
#endif
}

int multiprocessors(Device device) {
  return hopper_multiprocessors(device, reinterpret_cast<const void*>(joint_gradient_kernel<true>));
}

int64_t bytes_of_sequence(const Tensor& q) { return q.size(2) * ceil_div(q.size(1), kRows) * kGroups * kDqPanel; }

void joint_backward(const Rows& dq, const Rows& dk, const Rows& dv, const Rows& do_, const Rows& q, const Rows& k,
                    const Rows& v, const Rows& o, const float* lse, float* stats, const Joint& p, int multiprocessors,
                    Stream stream) {
  const int64_t rows = p.panels() / kGroups * kRows;
  launch(row_stats_kernel, {.grid = ceil_div(rows * (kD / 8), 256), .block = 256, .stream = stream}, stats, plain_of(o),
         plain_of(do_), lse, p.hq, p.lq, p.query_blocks(), rows);
  launch(p.causal ? joint_gradient_kernel<true> : joint_gradient_kernel<false>,
         {.grid = std::min(multiprocessors, p.items()), .block = kThreads, .shared = Side::kBytes, .stream = stream},
         plain_of(dk), plain_of(dv), map_of(q), map_of(k), map_of(v), map_of(do_), p);
  launch_overlapped(round_sums_kernel, {.grid = p.panels() / kGroups, .block = kGroups * 128, .stream = stream},
                    plain_of(dq), p);
}

}  // namespace

// Where it was measured to be faster (one H100): so many tiles that the blocks end at about the same time, though in
// causal heads the longest come last, and that waiting for the first turns is little of it; at least as many queries as
// keys; causal query heads that share keys only where they are long.
bool attention_backward_wgmma_joint_serves(const Tensor& q, const Tensor& k, const AttentionOptions& options) {
  const int64_t heads = k.size(0) * k.size(2), tiles = ceil_div(k.size(1), kTile), blocks = multiprocessors(q.device());
  const int64_t shortest = options.causal && q.size(2) > k.size(2) ? 4096 : 1536;
  return q.size(3) == kD && k.size(1) >= shortest && q.size(1) >= k.size(1) && blocks > 0 &&
         heads * (tiles + 1) >= 7 * blocks && bytes_of_sequence(q) <= options.vendor_bytes;
}

void attention_backward_wgmma_joint(const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& do_,
                                    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o,
                                    const Tensor& lse, const AttentionOptions& options) {
  const Device device = q.device();
  const int64_t b = q.size(0), most = options.vendor_bytes / bytes_of_sequence(q);
  for (int64_t begin = 0; begin < b; begin += most) {
    const auto part = [&](const Tensor& t) { return t.slice(0, begin, std::min(b, begin + most)); };
    const Tensor pq = part(q), pk = part(k);
    Joint p{static_cast<int>(pq.size(1)),
            static_cast<int>(pk.size(1)),
            static_cast<int>(pq.size(2)),
            static_cast<int>(pk.size(2)),
            static_cast<int>(pk.size(0) * pk.size(2)),
            options.causal,
            static_cast<float>(options.scale),
            nullptr,
            nullptr,
            nullptr};
    Tensor stats = empty({p.panels() / kGroups, 2, kRows}, DType::f32, device);
    Tensor state = empty({Joint::kState + p.panels()}, DType::i32, device);
    Tensor sums = empty({p.panels(), kDqPanel / 4}, DType::f32, device);
    zero_(state);
    p.stats = stats.data<float>();
    p.state = reinterpret_cast<uint32_t*>(state.data<int32_t>());
    p.sums = sums.data<float>();
    joint_backward(rows_of(part(dq)), rows_of(part(dk)), rows_of(part(dv)), rows_of(part(do_)), rows_of(pq),
                   rows_of(pk), rows_of(part(v)), rows_of(part(o)), part(lse).data<float>(), stats.data<float>(), p,
                   multiprocessors(device), current_stream(device));
  }
}

}  // namespace krait::kernels::cuda
