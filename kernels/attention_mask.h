#pragma once
#include "kernels/attention.h"

namespace krait {
namespace kernels {

/// Which keys a query sees, in a form that kernels of both backends take by value. Apart from segments it is one
/// interval [key_begin, key_end) per query, and both ends never decrease from one query to the next.
struct AttentionMask {
  int64_t lq, lk;
  int64_t window;                // 0: none
  int64_t offset;                // position of query 0, or of query 0 relative to k_length[b]
  bool causal;
  const int64_t* k_length;       // (b), or null
  const float* alibi;            // (hq), or null
  const int32_t* q_segments;     // (b, lq), or null
  const int32_t* k_segments;     // (b, lk)
  bool offset_from_length;

  AttentionMask(const Tensor& q, const Tensor& k, const AttentionOptions& options)
      : lq(q.size(1)), lk(k.size(1)), window(options.window), offset(options.q_offset.value_or(-q.size(1))),
        causal(options.causal), k_length(options.k_length.defined() ? options.k_length.data<int64_t>() : nullptr),
        alibi(options.alibi_slopes.defined() ? options.alibi_slopes.data<float>() : nullptr),
        q_segments(options.q_segments.defined() ? options.q_segments.data<int32_t>() : nullptr),
        k_segments(options.k_segments.defined() ? options.k_segments.data<int32_t>() : nullptr),
        offset_from_length(!options.q_offset.has_value()) {}

  KRAIT_HOST_DEVICE int64_t length(int64_t batch) const {
    if (!k_length) return lk;
    const int64_t n = k_length[batch];
    return n < 0 ? 0 : n < lk ? n : lk;
  }
  KRAIT_HOST_DEVICE int64_t position(int64_t batch, int64_t i) const {
    return (offset_from_length ? length(batch) + offset : offset) + i;
  }
  KRAIT_HOST_DEVICE int64_t key_end(int64_t batch, int64_t i) const {
    const int64_t n = length(batch);
    if (!causal) return n;
    const int64_t p = position(batch, i) + 1;
    return p < 0 ? 0 : p < n ? p : n;
  }
  KRAIT_HOST_DEVICE int64_t key_begin(int64_t batch, int64_t i) const {
    if (window == 0) return 0;
    const int64_t p = position(batch, i) + 1 - window, end = key_end(batch, i);
    return p < 0 ? 0 : p < end ? p : end;
  }
  /// Queries [query_begin(j0), query_end(j1)) are those that see a key of [j0, j1), segments aside.
  KRAIT_HOST_DEVICE int64_t query_begin(int64_t batch, int64_t j0) const {
    if (j0 >= length(batch)) return lq;
    if (!causal) return 0;
    const int64_t i = j0 - position(batch, 0);
    return i < 0 ? 0 : i < lq ? i : lq;
  }
  KRAIT_HOST_DEVICE int64_t query_end(int64_t batch, int64_t j1) const {
    if (window == 0) return lq;
    const int64_t i = j1 + window - 1 - position(batch, 0);
    return i < 0 ? 0 : i < lq ? i : lq;
  }
};

}  // namespace kernels
}  // namespace krait
