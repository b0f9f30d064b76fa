#include "autograd/sequence_attention.h"

#include <numeric>

#include "autograd/attention.h"
#include "autograd/collective.h"
#include "autograd/ring_attention.h"
#include "autograd/sequence_exchange.h"
#include "autograd/shape.h"
#include "core/comm/collectives.h"

namespace krait::autograd {

const char* name_of(SequenceAttention way) {
  return way == SequenceAttention::ring ? "ring, balanced" : way == SequenceAttention::halo ? "halo" : "all-to-all by heads";
}

SequenceAttention choose_sequence_attention(const std::string& wanted, int64_t hq, int64_t l,
                                            const AttentionOptions& options, const comm::ProcessGroup& group) {
  const int64_t S = group.size(), w = options.window;
  const bool dropout = options.dropout.p > 0;
  const bool halo = w > 0 && 2 * (w - 1) < S * l && (!dropout || l % 4 == 0);
  const bool ring = !dropout || l % 8 == 0, heads = hq % S == 0;
  if (wanted == "all_to_all") {
    KRAIT_CHECK(heads, "attention.sequence_parallel: all_to_all: {} heads do not spread over {} ranks; use ring, or "
                "another parallelism.sequence", hq, S);
    return SequenceAttention::all_to_all;
  }
  if (halo) return SequenceAttention::halo;
  if (wanted == "auto" && heads) return SequenceAttention::all_to_all;
  KRAIT_CHECK(ring, "attention: dropout of the probabilities on a ring of {} ranks needs a multiple of 8 positions on "
              "each, not {}; {}", S, l,
              heads ? "set attention.sequence_parallel: all_to_all"
                    : "set attention.dropout: 0, or a data.context with more factors of 2");
  return SequenceAttention::ring;
}

namespace {

// Each member's heads side by side: q, k, v of member 0, of member 1, ... (b, l, S (hq + 2 hkv) / S, d). Key heads that
// are fewer than the members, or do not spread over them, are repeated until they do.
Variable by_member(const Variable& qkv, int64_t hq, int64_t hkv, int64_t repeats, int64_t members) {
  const int64_t b = qkv.size(0), l = qkv.size(1), d = qkv.size(3);
  Vars parts;
  int64_t at = 0;
  for (const int64_t n : {hq, hkv, hkv}) {
    Variable heads = slice(qkv, 2, at, at + n);
    at += n;
    if (n == hkv && repeats > 1 && at > hq)
      heads = reshape(expand(reshape(heads, {b, l, n, 1, d}), {b, l, n, repeats, d}), {b, l, n * repeats, d});
    parts.push_back(reshape(heads, {b, l, members, heads.size(2) / members, d}));
  }
  const Variable all = concat(parts, 3);
  return reshape(all, {b, l, members * all.size(3), d});
}

Variable by_heads(const Variable& qkv, int64_t hq, int64_t hkv, const AttentionOptions& options,
                  const comm::GroupPtr& group) {
  const int64_t S = group->size(), b = qkv.size(0), l = qkv.size(1), d = qkv.size(2) / (hq + 2 * hkv);
  const int64_t key_heads = std::lcm(hkv, S);  // divides hq, as both do
  const Variable mine = all_to_all(by_member(reshape(qkv, {b, l, hq + 2 * hkv, d}), hq, hkv, key_heads / hkv, S), 2, 1, group);
  const int64_t own = hq / S, first = group->rank() * own;
  AttentionOptions o = options;
  o.part.heads = options.part.heads ? options.part.heads : hq;
  o.part.head += first;
  if (o.alibi_slopes.defined()) o.alibi_slopes = o.alibi_slopes.slice(0, first, first + own);
  if (o.q_segments.defined()) o.q_segments = comm::all_gather(o.q_segments, 1, *group);
  const Variable y = attention_qkv(reshape(mine, {b, S * l, mine.size(2) * d}), own, key_heads / S, o);
  return all_to_all(y, 1, 2, group);
}

Variable with_halo(const Variable& qkv, int64_t hq, int64_t hkv, const AttentionOptions& options,
                   const comm::GroupPtr& group) {
  const int64_t S = group->size(), b = qkv.size(0), l = qkv.size(1), heads = hq + 2 * hkv, d = qkv.size(2) / heads;
  const int64_t begin = group->rank() * l;
  const Variable all = reshape(qkv, {b, l, heads, d});
  Variable kv = slice(all, 2, hq, heads);
  int64_t rows = options.window - 1;
  if (options.dropout.p > 0) rows = (rows + 3) / 4 * 4;
  const Variable before = halo_from_left(kv, rows, group);
  const int64_t seen = std::min(rows, begin);  // those in front of the sequence are no keys
  // Also without rows to add: the halo's backward is where the others' gradients of these keys arrive.
  if (before.defined()) kv = concat({slice(before, 1, rows - seen, rows), kv}, 1);
  AttentionOptions o = options;
  o.part.query = begin;
  o.part.key = begin - seen;
  o.part.queries = o.part.keys = S * l;
  if (o.q_segments.defined()) {
    const Tensor ids = comm::all_gather(o.q_segments, 1, *group);
    o.k_segments = ids.slice(1, begin - seen, begin + l);
  }
  const Variable y = attention(slice(all, 2, 0, hq), slice(kv, 2, 0, hkv), slice(kv, 2, hkv, 2 * hkv), o);
  return reshape(y, {b, l, hq * d});
}

}  // namespace

Variable sequence_attention(SequenceAttention way, const Variable& qkv, int64_t hq, int64_t hkv,
                            const AttentionOptions& options, const comm::GroupPtr& group) {
  KRAIT_CHECK(hq > 0 && hkv > 0 && qkv.ndim() == 3 && qkv.size(2) % (hq + 2 * hkv) == 0 && qkv.size(2) > 0,
              "sequence_attention: {} does not split into {} query and 2 x {} key and value heads", qkv.shape(), hq, hkv);
  if (way == SequenceAttention::ring) return ring_attention(qkv, hq, hkv, options, group);
  if (way == SequenceAttention::halo) return with_halo(qkv, hq, hkv, options, group);
  return by_heads(qkv, hq, hkv, options, group);
}

}  // namespace krait::autograd
