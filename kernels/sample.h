#pragma once
#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait::kernels {

/// How a token is drawn from logits s (v). With temperature 0: the first largest. Otherwise
///   w_i = floor(2^40 e^((s_i - max s) / temperature))
/// (whole numbers: sums do not depend on their order). Kept are the tokens of largest s: at most top_k of them (0: no
/// limit), and the fewest that hold the share top_p of all weight (nucleus sampling, Holtzman et al. 2020); tokens
/// as likely as the last kept one stay too. The token is the first, by index, at which the kept weight passes u times its sum.
struct SampleOptions {
  double temperature = 1, top_p = 1;
  int64_t top_k = 0;
  uint64_t key = 0;
};

/// logits (b, v) fp32, bf16 or fp64, rows may be apart; step (1) int64 on their device: u of row r is uniform word 0 of
/// philox(key, step, r). Returns (b) int64.
Tensor sample(const Tensor& logits, const Tensor& step, const SampleOptions& options);

/// sample() and what follows it in a captured loop: last (b, 1) int64 = the tokens; made[:, step] = the tokens (b, room),
/// unless step is past it; position (b) int32 and step go up by one.
void sample_next(Tensor& made, Tensor& last, Tensor& position, Tensor& step, const Tensor& logits, const SampleOptions& options);

KRAIT_BACKENDS(void sample(Tensor& tokens, const Tensor& logits, const Tensor& step, const SampleOptions& options);
               void sample_next(Tensor& made, Tensor& last, Tensor& position, Tensor& step, const Tensor& logits, const SampleOptions& options))

}  // namespace krait::kernels
