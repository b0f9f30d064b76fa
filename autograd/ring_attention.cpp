#include "autograd/ring_attention.h"

#include <array>
#include <cmath>
#include <optional>

#include "core/comm/collectives.h"
#include "kernels/accumulate.h"
#include "kernels/attention_merge.h"

namespace krait::autograd {

namespace {

void put(Tensor to, const Tensor& from) { copy_(to, from); }

// Positions of the whole sequence.
struct Block {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Pieces of l positions on S members, cut in halves: block 2 s and 2 s + 1 lie on member s. For work they are dealt
// out anew: member s has block s, then 2 S - 1 - s. One of the two is even, so that all have l rows for odd l too.
struct Ring {
  comm::GroupPtr group;
  int64_t l;
  int size, rank;
  Ring(comm::GroupPtr g, int64_t length) : group(std::move(g)), l(length), size(group->size()), rank(group->rank()) {}

  Block block(int i) const { return {i * l / 2, (i + 1) * l / 2}; }
  std::array<Block, 2> blocks(int member) const { return {block(member), block(2 * size - 1 - member)}; }
  int left(int distance) const { return (rank - distance + size) % size; }
  int right(int distance) const { return (rank + distance) % size; }

  // Who works on block i, and which block of this parity a member works on.
  int worker(int i) const { return i < size ? i : 2 * size - 1 - i; }
  int work_of(int member, int parity) const { return member % 2 == parity ? member : 2 * size - 1 - member; }

  Tensor swap(const Tensor& mine, int to, int from) const {
    if (to == rank || mine.numel() == 0) return mine;
    Tensor theirs = empty(mine.shape(), mine.dtype(), mine.device());
    group->exchange(mine.contiguous(), to, theirs, from).wait();
    return theirs;
  }
  // x (b, l, ...) in the sequence's order to the order of work, and back.
  Tensor deal(const Tensor& x) const {
    Tensor out = empty(x.shape(), x.dtype(), x.device());
    for (const int parity : {0, 1}) {
      const Tensor half = parity == 0 ? x.slice(1, 0, l / 2) : x.slice(1, l / 2, l);
      const bool first = rank % 2 == parity;
      put(out.slice(1, first ? 0 : l - half.size(1), first ? half.size(1) : l),
          swap(half, worker(2 * rank + parity), work_of(rank, parity) / 2));
    }
    return out;
  }
  Tensor collect(const Tensor& x) const {
    Tensor out = empty(x.shape(), x.dtype(), x.device());
    for (const int parity : {0, 1}) {
      const int64_t n = parity == 0 ? l / 2 : l - l / 2;
      const Tensor half = rank % 2 == parity ? x.slice(1, 0, n) : x.slice(1, l - n, l);
      put(parity == 0 ? out.slice(1, 0, n) : out.slice(1, l - n, l),
          swap(half, work_of(rank, parity) / 2, worker(2 * rank + parity)));
    }
    return out;
  }
};

// Keys and values of a member's two blocks in one buffer, each block contiguous; or their gradients.
struct KeyValues {
  std::array<Tensor, 2> k, v;
  KeyValues(const Tensor& flat, const Shape& shape, const std::array<Block, 2>& blocks) {
    int64_t at = 0;
    for (size_t i = 0; i < 2; ++i)
      for (Tensor* part : {&k[i], &v[i]}) {
        const Shape own = shape.with(1, blocks[i].size());
        *part = flat.slice(0, at, at + own.numel()).view(own);
        at += own.numel();
      }
  }
};

// Which keys of a block the queries of another see: none, or what a call needs to know of it.
std::optional<AttentionOptions> relation(const Block& q, const Block& k, const AttentionOptions& whole,
                                         const Tensor& segments, int64_t length) {
  const int64_t w = whole.window;
  if (q.size() == 0 || k.size() == 0 || k.begin >= q.end || (w > 0 && q.begin - (k.end - 1) >= w)) return {};
  AttentionOptions o = whole;
  o.q_offset = q.begin - k.begin;
  // All keys to all queries: what libraries know as full attention.
  if (k.end <= q.begin + 1 && (w == 0 || q.end - 1 - k.begin < w) && !whole.alibi_slopes.defined()) {
    o.causal = false;
    o.window = 0;
    o.q_offset = 0;
  }
  if (segments.defined()) {
    o.q_segments = segments.slice(1, q.begin, q.end);
    o.k_segments = segments.slice(1, k.begin, k.end);
  }
  o.part.query = q.begin;
  o.part.key = k.begin;
  o.part.queries = o.part.keys = length;
  return o;
}

// What one member holds of the whole attention, in the order of work.
struct RingWork {
  Ring ring;
  AttentionOptions options;
  Tensor segments;  // (b, L) of the whole sequence, or undefined
  Tensor q;         // (b, l, hq, d)
  Tensor flat;      // own keys and values, see KeyValues
  Shape kv_shape;   // (b, l, hkv, d)

  RingWork(const Tensor& qkv, int64_t hq, int64_t hkv, const AttentionOptions& o, const comm::GroupPtr& group)
      : ring(group, qkv.size(1)), options(o) {
    const int64_t b = qkv.size(0), l = qkv.size(1), heads = hq + 2 * hkv, d = qkv.size(2) / heads;
    if (options.scale == 0) options.scale = 1 / std::sqrt(static_cast<double>(d));
    if (o.q_segments.defined()) segments = comm::all_gather(o.q_segments, 1, *group);
    options.q_segments = options.k_segments = {};
    kv_shape = {b, l, hkv, d};
    const Tensor dealt = ring.deal(qkv).view({b, l, heads, d});
    q = dealt.slice(2, 0, hq).contiguous();
    flat = empty({2 * kv_shape.numel()}, qkv.dtype(), qkv.device());
    const KeyValues own(flat, kv_shape, ring.blocks(ring.rank));
    for (size_t i = 0; i < 2; ++i) {
      put(own.k[i], rows(dealt, i).slice(2, hq, hq + hkv));
      put(own.v[i], rows(dealt, i).slice(2, hq + hkv, heads));
    }
  }

  // The rows of the own block i of x (b, l, ...).
  Tensor rows(const Tensor& x, size_t i) const {
    const int64_t n = ring.blocks(ring.rank)[0].size();
    return i == 0 ? x.slice(1, 0, n) : x.slice(1, n, x.size(1));
  }

  // f(i, j, member, keys and values, options) for every pair of an own block i of queries and a block j of keys that
  // has something to see; after_member() when a member's blocks are done. The next ones travel meanwhile.
  template <class F, class G>
  void around(F f, G after_member) const {
    Tensor here = flat;
    for (int hop = 0; hop < ring.size; ++hop) {
      const int member = ring.left(hop);
      Tensor next;
      comm::Work travel;
      if (hop + 1 < ring.size) {
        next = empty_like(flat);
        travel = ring.group->exchange(here, ring.right(1), next, ring.left(1));
      }
      const auto own = ring.blocks(ring.rank), theirs = ring.blocks(member);
      const KeyValues kv(here, kv_shape, theirs);
      for (size_t i = 0; i < 2; ++i)
        for (size_t j = 0; j < 2; ++j)
          if (const auto o = relation(own[i], theirs[j], options, segments, ring.size * ring.l)) f(i, j, member, kv, *o);
      after_member();
      travel.wait();
      here = next;
    }
  }
};

}  // namespace

Variable ring_attention(const Variable& qkv, int64_t hq, int64_t hkv, const AttentionOptions& options,
                        const comm::GroupPtr& group) {
  KRAIT_CHECK(hq > 0 && hkv > 0 && qkv.ndim() == 3 && qkv.size(2) % (hq + 2 * hkv) == 0 && qkv.size(2) > 0,
              "ring_attention: {} does not split into {} query and 2 x {} key and value heads", qkv.shape(), hq, hkv);
  KRAIT_CHECK(options.dropout.p == 0 || qkv.size(1) % 8 == 0,
              "ring_attention: dropout of the probabilities needs a multiple of 8 positions on each of the {} ranks, not "
              "{}; set attention.sequence_parallel: all_to_all, or attention.dropout: 0",
              group->size(), qkv.size(1));
  const auto w = std::make_shared<const RingWork>(qkv.data(), hq, hkv, options, group);
  const Tensor& q = w->q;
  const DType wide = accum_dtype(q.dtype());
  std::array<Tensor, 2> o, lse;  // of the own blocks
  w->around(
      [&](size_t i, size_t j, int, const KeyValues& kv, const AttentionOptions& call) {
        const auto part = kernels::attention_forward(w->rows(q, i), kv.k[j], kv.v[j], call);
        if (o[i].defined()) {
          kernels::attention_merge(o[i], lse[i], part.o, part.lse);
        } else {
          o[i] = part.o.to(wide);
          lse[i] = part.lse;
        }
      },
      [] {});
  const Tensor joined = empty(q.shape(), q.dtype(), q.device());
  for (size_t i = 0; i < 2; ++i)
    if (o[i].defined()) put(w->rows(joined, i), o[i]);
  const Shape packed{q.size(0), q.size(1), q.size(2) * q.size(3)};

  return record("ring_attention", {qkv}, w->ring.collect(joined).view(packed),
                [w, joined, lse, hq, hkv, wide](const Tensor& dy) -> Grads {
    const Ring& ring = w->ring;
    const Tensor do_ = ring.deal(dy.reshape(joined.shape()));
    std::array<Tensor, 2> dq;
    Tensor dkv, arriving;  // fp32 gradients of the keys and values that are here; those on their way to this member
    comm::Work travel;
    w->around(
        [&](size_t i, size_t j, int member, const KeyValues& kv, const AttentionOptions& call) {
          const Tensor o_i = w->rows(joined, i);
          auto g = kernels::attention_backward(w->rows(do_, i), w->rows(w->q, i), kv.k[j], kv.v[j], o_i, lse[i], call);
          if (!dq[i].defined())
            dq[i] = g.dq.to(wide).contiguous();
          else
            kernels::accumulate(dq[i], g.dq);
          if (!dkv.defined()) dkv = zeros(w->flat.shape(), wide, joined.device());
          KeyValues to(dkv, w->kv_shape, ring.blocks(member));
          kernels::accumulate(to.k[j], g.dk);
          kernels::accumulate(to.v[j], g.dv);
        },
        [&] {
          if (!dkv.defined()) dkv = zeros(w->flat.shape(), wide, joined.device());
          // What the members before this one found for these keys has travelled during the work above.
          travel.wait();
          if (arriving.defined()) kernels::accumulate(dkv, arriving);
          arriving = empty_like(dkv);
          travel = ring.group->exchange(dkv, ring.right(1), arriving, ring.left(1));
          dkv = {};
        });
    travel.wait();
    const KeyValues home(arriving, w->kv_shape, ring.blocks(ring.rank));
    const int64_t d = joined.size(3), heads = hq + 2 * hkv;
    const Tensor dqkv = empty({joined.size(0), joined.size(1), heads, d}, joined.dtype(), joined.device());
    for (size_t i = 0; i < 2; ++i) {
      const Tensor to = w->rows(dqkv, i);
      if (to.size(1) == 0) continue;
      put(to.slice(2, 0, hq), dq[i]);
      put(to.slice(2, hq, hq + hkv), home.k[i]);
      put(to.slice(2, hq + hkv, heads), home.v[i]);
    }
    return {ring.collect(dqkv).view({joined.size(0), joined.size(1), heads * d})};
  });
}

}  // namespace krait::autograd
