#pragma once
#include "core/comm/process_group.h"
#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

struct CrossEntropyOptions {
  int64_t ignore_index = -100;   // rows with this target count for nothing
  double label_smoothing = 0.0;  // eps
  double z_loss = 0.0;           // z
  int64_t valid_vocab = 0;       // columns from here on are padding, masked to -inf; 0: all columns are valid
  double logit_cap = 0.0;        // c: s below is c tanh(logits / c), in the precision of the sums; 0: the logits
};

/// Cross entropy of logits s (t, v) with targets y (t), over the V valid columns:
///   lse = log sum_j exp s_j          nll = lse - s_y
///   row loss = (1 - eps) nll + eps (lse - mean_j s_j) + z lse^2, 0 for ignored rows
///   loss = scale sum(row loss) / max(count, 1)
///   ds_j = scale / max(count, 1) [p_j (1 + 2 z lse) - (1 - eps) (j = y) - eps / V], 0 for ignored rows and padding
///   with a cap: dlogits_j = ds_j (1 - (s_j / c)^2)
/// s fp32, bf16 or fp64; y int64 or int32. Everything else is fp32 (fp64 for fp64 logits): loss is a scalar, nll and
/// lse are (t); nll is 0 where ignored, lse is not. count, a fp32 scalar on the device, is the number of kept targets
/// unless given: a caller that spreads the batch over ranks gives the global count.
/// A target outside [0, V) that is not ignore_index: an error on a CPU; on CUDA its row loss, nll and gradient are
/// NaN.
struct CrossEntropyOut {
  Tensor loss, nll, lse, count;
};
CrossEntropyOut cross_entropy_forward(const Tensor& logits, const Tensor& targets, const CrossEntropyOptions& options,
                                      const Tensor& count = {});
/// dlogits for the scalar dloss. `dlogits` may be the logits themselves.
void cross_entropy_backward(Tensor& dlogits, const Tensor& dloss, const Tensor& logits, const Tensor& targets,
                            const Tensor& lse, const Tensor& count, const CrossEntropyOptions& options);

/// The number of targets other than ignore_index, a fp32 scalar on their device. On a CPU all targets are checked.
Tensor count_targets(const Tensor& targets, int64_t valid_vocab, int64_t ignore_index);

/// Mean cross entropy of the logits x w^T, which never exist whole: chunks of rows are multiplied, turned into their
/// gradient in place, and multiplied back; on Hopper the logits exist nowhere (head_loss.h). x (t, d), w (v, d),
/// targets (t).
struct LinearCrossEntropyOut {
  Tensor loss;     // scalar, times loss_scale
  Tensor nll_sum;  // scalar: sum of nll over kept targets
  Tensor count;
  Tensor dx;       // (t, d) when wanted
};
/// That w (v, d) is rows [first, first + v) of a whole vocabulary whose other rows are with the other members of the
/// group (Shoeybi et al. 2019, section 3). The logits stay apart: of every token the members exchange the maximum, and
/// then sum_j exp(s_j - max), s_y and, with smoothing, sum_j s_j. targets, valid_vocab and V are the whole vocabulary's;
/// all results are the same on every member but dx, which is this one's part of the sum.
struct VocabularyShard {
  comm::GroupPtr group = {};  // null, or of one: w is whole
  int64_t first = 0, whole = 0;
};
struct LinearCrossEntropyJob {
  CrossEntropyOptions options = {};
  double loss_scale = 1.0;
  int64_t chunk_rows = 0;  // 0: chosen from the size of a row of logits
  Tensor count = {};       // as above
  bool want_dx = false;
  Tensor dw_sum = {};      // when defined, the gradient of w is added to it
  VocabularyShard shard = {};
};
LinearCrossEntropyOut linear_cross_entropy(const Tensor& x, const Tensor& w, const Tensor& targets,
                                           const LinearCrossEntropyJob& job);
/// The same without gradients: nll per token (t), fp32 (fp64 for fp64), for evaluation.
Tensor linear_cross_entropy_nll(const Tensor& x, const Tensor& w, const Tensor& targets,
                                const CrossEntropyOptions& options = {}, int64_t chunk_rows = 0,
                                const VocabularyShard& shard = {});

/// t *= factor, a scalar on t's device. With `must_be_one` any other factor is an error (CPU) or makes t NaN (CUDA).
void scale_by(Tensor& t, const Tensor& factor, bool must_be_one);

/// Which of the vocabulary's V valid columns are here: `valid` of them, from `first` on. Those after them are padding.
struct VocabularyColumns {
  int64_t first = 0, valid = 0, whole = 0;  // whole: V
};

// rows: row losses. dlogits may be undefined (no gradient) or alias logits. valid is V, resolved.
// gradient: factor = dloss / max(count, 1).
// partial: over the columns here, top (t) = max_j s_j (the lowest value where there are none) and
// sums (3, t) = sum_j exp(s_j - top), s_y or 0, sum_j s_j (with smoothing only). rescale: sums from one maximum to a
// larger one. finish: the row results from everybody's top and sums.
// reduce: out = scale sum(rows) / max(count, 1), count undefined: 1.
KRAIT_BACKENDS(void cross_entropy_rows(Tensor& rows, Tensor& nll, Tensor& lse, Tensor& dlogits, const Tensor& logits,
                                       const Tensor& targets, const Tensor& count, double scale, int64_t valid,
                                       const CrossEntropyOptions& options);
               void cross_entropy_gradient(Tensor& dlogits, const Tensor& dloss, const Tensor& logits,
                                           const Tensor& targets, const Tensor& lse, const Tensor& count,
                                           VocabularyColumns columns, const CrossEntropyOptions& options);
               void cross_entropy_partial(Tensor& top, Tensor& sums, const Tensor& logits, const Tensor& targets,
                                          VocabularyColumns columns, const CrossEntropyOptions& options);
               void cross_entropy_rescale(Tensor& sums, const Tensor& from, const Tensor& to);
               void cross_entropy_finish(Tensor& rows, Tensor& nll, Tensor& lse, const Tensor& top, const Tensor& sums,
                                         const Tensor& targets, int64_t valid, const CrossEntropyOptions& options);
               void cross_entropy_reduce(Tensor& out, const Tensor& rows, const Tensor& count, double scale);
               void cross_entropy_count(Tensor& count, const Tensor& targets, int64_t valid, int64_t ignore_index);
               void scale_by(Tensor& t, const Tensor& factor, bool must_be_one))

}  // namespace kernels
}  // namespace krait
