// Backward of full and of causal attention on Hopper: wgmma on tiles that bulk copies bring.
//
// Two kernels, each making the scores again, so that every sum stays in the registers of one warpgroup: no sums of dq in
// global memory, no exchange of dS between warpgroups, and the same bits at every run.
//   query_gradient: a warpgroup owns 64 queries, walks the keys:      S = q k^T    dP = do v^T    dq += dS k
//   key_gradient:   a warpgroup owns 64 keys, walks the queries:      S^T = k q^T  dP^T = v do^T  dv += P^T do  dk += dS^T q
// An accumulator of wgmma has the layout of a left operand in registers: P and dS never leave them. Seven products
// instead of five, two exponentials a score instead of one. Long heads of 128: attention_wgmma_joint.cu.
// One block a multiprocessor: two warpgroups that compute (and take turns by themselves: one's exponentials under the
// other's products) and a warp that brings tiles. Blocks stay for many tiles; those of the next come during the last.
#include <algorithm>
#include <cmath>

#include "core/cuda/launch.cuh"
#include "kernels/cuda/attention_own.h"
#include "kernels/cuda/attention_wgmma.cuh"
#include "kernels/cuda/hopper.h"

namespace krait::kernels::cuda {

namespace {

struct Problem {
  int b, lq, lk, hq, hkv;
  bool causal;
  float scale;
  const float* lse;  // (b, hq, lq)
  float* stats;      // (b, hq, query_blocks(), 2, 64): lse log2(e), infinite from row lq on, and D
  uint32_t* tickets;  // one for each kernel
  __host__ __device__ int query_blocks() const { return (lq + kRows - 1) / kRows; }
  __host__ __device__ int key_blocks() const { return (lk + kRows - 1) / kRows; }
};

// Shared memory of query_gradient: q, do and o of the tile, a ring of keys and values, dq on its way out. A barrier pair
// is "full" and, 8 bytes on, "empty".
template <int kD>
struct QuerySide {
  static constexpr int kPanel = cuda::kPanel<kD>, kStages = kD == 64 ? 6 : 3;
  static constexpr int kQ = 0, kDo = kQ + kGroups * kPanel, kO = kDo + kGroups * kPanel, kOut = kO + kGroups * kPanel,
                       kRing = kOut + kGroups * kPanel, kResident = kRing + kStages * 2 * kPanel, kFull = kResident + 32,
                       kBytes = kFull + 16 * kStages + 1024;
};

template <int kD>
__global__ void __launch_bounds__(kThreads, 1)
query_gradient_kernel(const __grid_constant__ CUtensorMap dq, const __grid_constant__ CUtensorMap q,
                      const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v,
                      const __grid_constant__ CUtensorMap o, const __grid_constant__ CUtensorMap do_, const Problem p,
                      const Order order) {
#if KRAIT_WGMMA_BODY
  using Side = QuerySide<kD>;
  constexpr int kPanel = Side::kPanel;
  const uint32_t shared = aligned_shared(), resident = shared + Side::kResident, full = shared + Side::kFull;
  init_barriers(resident, full, Side::kStages);
  const int group = threadIdx.x / 128, key_blocks = p.key_blocks(), query_blocks = p.query_blocks();
  const auto block_steps = [&](int tile) { return p.causal ? min(key_blocks, (tile + 1) * kGroups) : key_blocks; };
  Steps<kD, Side::kStages> steps(shared + Side::kRing, full);
  uint32_t parity = 0;  // of the resident tile
  if (group == kGroups) {
    give_registers<24>();
    if (threadIdx.x != kGroups * 128) return;
    hand_out(p.tickets, order, resident, [&](int item) {
      int head, tile;
      order.find(item, head, tile);
      const int h = head % p.hq, batch = head / p.hq, hk = h / (p.hq / p.hkv);
      barrier_expect(resident, 3 * kGroups * kPanel);
#pragma unroll 1
      for (int g = 0; g < kGroups; ++g) {
        const int row = (tile * kGroups + g) * kRows;
        bring_rows<kD>(shared + Side::kQ + g * kPanel, q, resident, row, h, batch);
        bring_rows<kD>(shared + Side::kDo + g * kPanel, do_, resident, row, h, batch);
        bring_rows<kD>(shared + Side::kO + g * kPanel, o, resident, row, h, batch);
      }
#pragma unroll 1
      for (int j = 0, n = block_steps(tile); j < n; ++j, steps.ring.advance()) steps.bring(k, v, j * kRows, hk, batch);
    });
    return;
  }
  take_registers<240>();
  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4, row0 = threadIdx.x % 128 / 32 * 16 + g;
  const float to_exponent = p.scale * kLog2e;
  const uint32_t out = shared + Side::kOut + group * kPanel;
  for (int item; (item = next_item(resident, parity)) < order.items();) {
    int head, tile;
    order.find(item, head, tile);
    const int h = head % p.hq, batch = head / p.hq, block = tile * kGroups + group;
    const int all = block_steps(tile), n = block >= query_blocks ? 0 : p.causal ? min(all, block + 1) : all;
    uint32_t fq[kD / 16][4], fdo[kD / 16][4];
    float lse[2], delta[2] = {0, 0};
    load_rows<kD>(fq, shared + Side::kQ + group * kPanel);
    load_rows<kD>(fdo, shared + Side::kDo + group * kPanel);
    {
      uint32_t fo[kD / 16][4];
      load_rows<kD>(fo, shared + Side::kO + group * kPanel);
#pragma unroll
      for (int x = 0; x < kD / 16; ++x)
#pragma unroll
        for (int i = 0; i < 4; ++i) delta[i % 2] += dot_pair(fo[x][i], fdo[x][i]);
    }
    release(resident + 8);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = block * kRows + row0 + 8 * half;
      delta[half] = row_sum(delta[half]);
      lse[half] = row < p.lq ? p.lse[int64_t{head} * p.lq + row] * kLog2e : INFINITY;
      if (c == 0 && block < query_blocks) {
        float* stats = p.stats + (int64_t{head} * query_blocks + block) * (2 * kRows) + row0 + 8 * half;
        stats[0] = lse[half];
        stats[kRows] = delta[half];
      }
    }

    float acc[kD / 2], s[32], dp[32];
    int before = -1;  // the stage of the step before
    if (n > 0) {
      steps.scores(s, dp, fq, fdo);
      for (int j = 0;;) {
        wgmma_wait<1>();
        hold(s);
        if (j > 0) {
          hold(acc);
          steps.done_with(before);
        }
        if (p.causal ? j == block : (j + 1) * kRows > p.lk) {
          const int last0 = p.causal ? row0 : p.lk - 1 - j * kRows, last1 = p.causal ? row0 + 8 : last0;
#pragma unroll
          for (int i = 0; i < 32; ++i)
            if (i / 4 * 8 + 2 * c + i % 2 > (i % 4 / 2 ? last1 : last0)) s[i] = -INFINITY;
        }
#pragma unroll
        for (int i = 0; i < 32; ++i) s[i] = exp2_fast(fmaf(s[i], to_exponent, -lse[i % 4 / 2]));
        wgmma_wait<0>();
        hold(dp);
#pragma unroll
        for (int i = 0; i < 32; ++i) s[i] *= dp[i] - delta[i % 4 / 2];
        uint32_t ds[4][4];
        to_operand(ds, s);
        wgmma_begin();
        accumulate<kD>(acc, ds, steps.at(), j > 0);
        wgmma_commit();
        before = steps.ring.stage;
        steps.ring.advance();
        if (++j == n) break;  // here, not in the loop's head: the compiler must see which products can be under way
        steps.scores(s, dp, fq, fdo);
      }
      wgmma_wait<0>();
      hold(acc);
      steps.done_with(before);
    }
    steps.skip(n, all);
    if (threadIdx.x % 128 == 0) stores_wait_read<0>();
    meet(1 + group, 128);
    put_rows<kD>(out, acc, p.scale);
    publish_shared();
    meet(1 + group, 128);
    if (threadIdx.x % 128 == 0) {
      store_rows<kD>(dq, out, block * kRows, h, batch);
      stores_commit();
    }
  }
  if (threadIdx.x % 128 == 0) stores_wait_read<0>();
#endif
}

// Shared memory of key_gradient: k and v of the tile, a ring of q, do, and the rows' lse and D; dk and dv on their way out.
template <int kD>
struct KeySide {
  static constexpr int kPanel = cuda::kPanel<kD>, kStages = kD == 64 ? 6 : 3;
  static constexpr int kK = 0, kV = kK + kGroups * kPanel, kOut = kV + kGroups * kPanel,
                       kRing = kOut + kGroups * 2 * kPanel, kStats = kRing + kStages * 2 * kPanel,
                       kResident = kStats + kStages * kStatBytes, kFull = kResident + 32,
                       kBytes = kFull + 16 * kStages + 1024;
};

template <int kD>
__global__ void __launch_bounds__(kThreads, 1)
key_gradient_kernel(const __grid_constant__ CUtensorMap dk, const __grid_constant__ CUtensorMap dv,
                    const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
                    const __grid_constant__ CUtensorMap v, const __grid_constant__ CUtensorMap do_, const Problem p,
                    const Order order) {
#if KRAIT_WGMMA_BODY
  using Side = KeySide<kD>;
  constexpr int kPanel = Side::kPanel;
  constexpr bool kInRegisters = kD == 64;  // k and v
  const uint32_t shared = aligned_shared(), resident = shared + Side::kResident, full = shared + Side::kFull;
  init_barriers(resident, full, Side::kStages);
  const int group = threadIdx.x / 128, query_blocks = p.query_blocks(), per_key = p.hq / p.hkv;
  Steps<kD, Side::kStages> steps(shared + Side::kRing, full);
  uint32_t parity = 0;
  if (group == kGroups) {
    give_registers<24>();
    if (threadIdx.x != kGroups * 128) return;
    hand_out(p.tickets + 1, order, resident, [&](int item) {
      int head, tile;
      order.find(item, head, tile);
      const int hk = head % p.hkv, batch = head / p.hkv;
      barrier_expect(resident, 2 * kGroups * kPanel);
#pragma unroll 1
      for (int g = 0; g < kGroups; ++g) {
        const int row = (tile * kGroups + g) * kRows;
        bring_rows<kD>(shared + Side::kK + g * kPanel, k, resident, row, hk, batch);
        bring_rows<kD>(shared + Side::kV + g * kPanel, v, resident, row, hk, batch);
      }
#pragma unroll 1
      for (int h = hk * per_key; h < (hk + 1) * per_key; ++h)
#pragma unroll 1
        for (int i = p.causal ? tile * kGroups : 0; i < query_blocks; ++i, steps.ring.advance()) {
          const uint32_t barrier = steps.bring(q, do_, i * kRows, h, batch, kStatBytes);
          bring_bytes(shared + Side::kStats + steps.ring.stage * kStatBytes,
                      p.stats + ((int64_t{batch} * p.hq + h) * query_blocks + i) * (2 * kRows), kStatBytes, barrier);
        }
    });
    return;
  }
  take_registers<240>();
  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4, row0 = threadIdx.x % 128 / 32 * 16 + g;
  const float to_exponent = p.scale * kLog2e;
  const uint32_t out = shared + Side::kOut + group * 2 * kPanel;
  const uint32_t own_k = shared + Side::kK + group * kPanel, own_v = shared + Side::kV + group * kPanel;
  for (int item; (item = next_item(resident, parity)) < order.items();) {
    int head, tile;
    order.find(item, head, tile);
    const int hk = head % p.hkv, batch = head / p.hkv, block = tile * kGroups + group;
    const int begin = p.causal ? tile * kGroups : 0, own_begin = p.causal ? min(block, query_blocks) : 0;
    uint32_t fk[kD / 16][4], fv[kD / 16][4];
    if constexpr (kInRegisters) {
      load_rows<kD>(fk, own_k);
      load_rows<kD>(fv, own_v);
      release(resident + 8);
    }
    float acc_k[kD / 2], acc_v[kD / 2], s[32], dp[32];
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) acc_k[i] = acc_v[i] = 0;
    const auto scores = [&] {
      if constexpr (kInRegisters)
        steps.scores(s, dp, fk, fv);
      else
        steps.scores(s, dp, own_k, own_v);
    };
    for (int h = 0; h < per_key; ++h) {
      steps.skip(begin, own_begin);  // queries before all of these keys
      if (own_begin == query_blocks) continue;
      scores();
      int before = -1;
      for (int i = own_begin;;) {
        const uint32_t at = steps.at(), stats = shared + Side::kStats + steps.ring.stage * kStatBytes + 8 * c;
        uint32_t w[4][4], ds[4][4];
        if constexpr (kInRegisters) {
          wgmma_wait<1>();
          hold(s);
          if (i > own_begin) {
            hold(acc_k);
            hold(acc_v);
            steps.done_with(before);
          }
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const float2 lse = load_pair(stats + 32 * j);
            s[4 * j] = exp2_fast(fmaf(s[4 * j], to_exponent, -lse.x));
            s[4 * j + 1] = exp2_fast(fmaf(s[4 * j + 1], to_exponent, -lse.y));
            s[4 * j + 2] = exp2_fast(fmaf(s[4 * j + 2], to_exponent, -lse.x));
            s[4 * j + 3] = exp2_fast(fmaf(s[4 * j + 3], to_exponent, -lse.y));
          }
          if (p.causal && i == block) {
#pragma unroll
            for (int e = 0; e < 32; ++e)
              if (e / 4 * 8 + 2 * c + e % 2 < row0 + e % 4 / 2 * 8) s[e] = 0;
          }
          to_operand(w, s);
          wgmma_begin();
          accumulate<kD>(acc_v, w, at + kPanel);
          wgmma_commit();
          wgmma_wait<1>();
          hold(dp);
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const float2 delta = load_pair(stats + kRows * 4 + 32 * j);
            s[4 * j] *= dp[4 * j] - delta.x;
            s[4 * j + 1] *= dp[4 * j + 1] - delta.y;
            s[4 * j + 2] *= dp[4 * j + 2] - delta.x;
            s[4 * j + 3] *= dp[4 * j + 3] - delta.y;
          }
          to_operand(ds, s);
        } else {  // few registers are free: both scores first, each pair of numbers gone as soon as its weights are made
          wgmma_wait<0>();
          hold(s);
          hold(dp);
          if (i > own_begin) steps.done_with(before);
          const bool diagonal = p.causal && i == block;
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const float2 lse = load_pair(stats + 32 * j), delta = load_pair(stats + kRows * 4 + 32 * j);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int e = 4 * j + 2 * half, column = 8 * j + 2 * c, row = row0 + 8 * half;
              float x = exp2_fast(fmaf(s[e], to_exponent, -lse.x)), y = exp2_fast(fmaf(s[e + 1], to_exponent, -lse.y));
              if (diagonal && column < row) x = 0;
              if (diagonal && column + 1 < row) y = 0;
              w[j / 2][j % 2 * 2 + half] = pack(x, y);
              ds[j / 2][j % 2 * 2 + half] = pack(x * (dp[e] - delta.x), y * (dp[e + 1] - delta.y));
            }
          }
          wgmma_begin();
          accumulate<kD>(acc_v, w, at + kPanel);
          wgmma_commit();
        }
        wgmma_begin();
        accumulate<kD>(acc_k, ds, at);
        wgmma_commit();
        if constexpr (!kInRegisters) wgmma_wait<0>();  // w and ds are free for the next scores
        before = steps.ring.stage;
        steps.ring.advance();
        if (++i == query_blocks) break;
        scores();
      }
      wgmma_wait<0>();
      hold(acc_k);
      hold(acc_v);
      steps.done_with(before);
    }
    if constexpr (!kInRegisters) release(resident + 8);
    if (threadIdx.x % 128 == 0) stores_wait_read<0>();
    meet(1 + group, 128);
    put_rows<kD>(out, acc_k, p.scale);
    put_rows<kD>(out + kPanel, acc_v, 1.0f);
    publish_shared();
    meet(1 + group, 128);
    if (threadIdx.x % 128 == 0) {
      store_rows<kD>(dk, out, block * kRows, hk, batch);
      store_rows<kD>(dv, out + kPanel, block * kRows, hk, batch);
      stores_commit();
    }
  }
  if (threadIdx.x % 128 == 0) stores_wait_read<0>();
#endif
}

template <int kD>
void backward(const Rows& dq, const Rows& dk, const Rows& dv, const Rows& do_, const Rows& q, const Rows& k, const Rows& v,
              const Rows& o, const Problem& p, int multiprocessors, Stream stream) {
  const auto order = [&](int heads, int blocks) { return Order{heads, (blocks + kGroups - 1) / kGroups}; };
  const Order queries = order(p.b * p.hq, p.query_blocks()), keys = order(p.b * p.hkv, p.key_blocks());
  const CUtensorMap mq = map_of(q), mk = map_of(k), mv = map_of(v), mdo = map_of(do_);
  launch(query_gradient_kernel<kD>,
         {.grid = std::min(multiprocessors, queries.items() / 2), .block = kThreads, .shared = QuerySide<kD>::kBytes, .stream = stream},
         map_of(dq), mq, mk, mv, map_of(o), mdo, p, queries);
  launch(key_gradient_kernel<kD>,
         {.grid = std::min(multiprocessors, keys.items() / 2), .block = kThreads, .shared = KeySide<kD>::kBytes, .stream = stream},
         map_of(dk), map_of(dv), mq, mk, mv, mdo, p, keys);
}

int multiprocessors(Device device) {
  return hopper_multiprocessors(device, reinterpret_cast<const void*>(key_gradient_kernel<64>));
}

}  // namespace

bool attention_backward_wgmma_serves(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options) {
  const int64_t b = q.size(0), lq = q.size(1), lk = k.size(1), d = q.size(3);
  const bool plain = !options.alibi_slopes.defined() && !options.q_segments.defined() && !options.k_length.defined() &&
                     options.window == 0 && options.dropout.p == 0;
  const bool mask = !options.causal || (lq == lk && options.q_offset == 0);
  const bool counts = b * q.size(2) * std::max(lq, lk) < (int64_t{1} << 31);
  return options.hopper_kernel && q.dtype() == DType::bf16 && plain && mask && counts && (d == 64 || d == 128) && lq > 1 && lk > 1 &&
         serves(q) && serves(k) && serves(v) && multiprocessors(q.device()) > 0;
}

bool attention_backward_wgmma(Tensor& dq, Tensor& dk, Tensor& dv, const Tensor& do_, const Tensor& q, const Tensor& k,
                              const Tensor& v, const Tensor& o, const Tensor& lse, const AttentionOptions& options) {
  for (const Tensor& t : {do_, o, dq, dk, dv})
    if (!serves(t)) return false;
  if (attention_backward_wgmma_joint_serves(q, k, options)) {
    attention_backward_wgmma_joint(dq, dk, dv, do_, q, k, v, o, lse, options);
    return true;
  }
  Problem p{static_cast<int>(q.size(0)), static_cast<int>(q.size(1)), static_cast<int>(k.size(1)),
            static_cast<int>(q.size(2)), static_cast<int>(k.size(2)), options.causal,
            static_cast<float>(options.scale), lse.data<float>(), nullptr, nullptr};
  const Tensor stats = empty({p.b, p.hq, p.query_blocks(), 2, kRows}, DType::f32, q.device());
  p.stats = stats.data<float>();
  Tensor tickets = empty({2}, DType::i32, q.device());
  zero_(tickets);
  p.tickets = reinterpret_cast<uint32_t*>(tickets.data<int32_t>());
  const auto run = q.size(3) == 64 ? backward<64> : backward<128>;
  run(rows_of(dq), rows_of(dk), rows_of(dv), rows_of(do_), rows_of(q), rows_of(k), rows_of(v), rows_of(o), p,
      multiprocessors(q.device()), current_stream(q.device()));
  return true;
}

}  // namespace krait::kernels::cuda
