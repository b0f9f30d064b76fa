#pragma once
#include "kernels/attention.h"

namespace krait {
namespace kernels {

/// Dropout of the probabilities in a form that kernels of both backends take by value. One Philox call numbers four
/// neighbouring keys of a row: the call of (b, h, i, j) is row(b, h, i) + j / 4, and its word is j % 4. In a part of a
/// larger attention, h, i and j count from the part's first, whose calls begin at `first`.
struct AttentionDropout {
  uint64_t key = 0;
  const int64_t* step = nullptr;  // null: no dropout
  uint32_t threshold = 0;         // a probability is kept where 24 random bits reach this
  int64_t batch = 0;              // global index of sequence 0
  int64_t hq, lq, row_calls;      // of the larger attention
  uint64_t first = 0;
  double keep_scale = 1;  // 1 / (1 - p)

  AttentionDropout(const Tensor& q, const Tensor& k, const AttentionOptions& options)
      : hq(options.part.heads ? options.part.heads : q.size(2)),
        lq(options.part.queries ? options.part.queries : q.size(1)),
        row_calls(((options.part.keys ? options.part.keys : k.size(1)) + 3) / 4) {
    const DropoutMask& mask = options.dropout;
    const AttentionPart& part = options.part;
    first = static_cast<uint64_t>((part.head * lq + part.query) * row_calls + part.key / 4);
    if (mask.p == 0) return;
    key = mask.key;
    step = mask.step.data<int64_t>();
    threshold = dropout_threshold(mask.p);
    batch = mask.offset;
    keep_scale = 1.0 / (1.0 - mask.p);
  }

  KRAIT_HOST_DEVICE uint64_t row(int64_t b, int64_t h, int64_t i) const {
    return static_cast<uint64_t>(((b + batch) * hq + h) * lq + i) * static_cast<uint64_t>(row_calls) + first;
  }
  /// Bit w: the probability numbered by word w of this call is kept.
  KRAIT_HOST_DEVICE uint32_t kept(uint64_t call, uint64_t now) const {
    const Philox r = philox(key, call, now);
    uint32_t bits = 0;
    for (int w = 0; w < 4; ++w) bits |= static_cast<uint32_t>((r.word[w] >> 8) >= threshold) << w;
    return bits;
  }
};

}  // namespace kernels
}  // namespace krait
