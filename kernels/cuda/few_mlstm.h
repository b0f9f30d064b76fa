#pragma once
#include "kernels/cuda/few_map.h"

namespace krait::kernels::cuda {

inline constexpr int kFewMlstmGates = 8;

/// What follows the first e columns x_m of an mLSTM block's up-projection, as in mlstm_step_maps (kernels/mlstm_step.h):
/// a convolution of 4 taps, maps in blocks of 4, the gates of the channels that a block of threads has.
struct FewMlstm {
  bf16 *q, *k, *v, *x_c;  // (rows, e)
  bf16* conv;             // (rows, 3, e)
  float* gates;           // (rows, few_mlstm_parts, n_gates)
  const bf16 *conv_weight, *conv_bias, *w_q, *w_k, *w_v, *g;  // conv_bias may be null
  int e, n_gates;
  bool ahead;  // conv was written before the kernels that can be under way
};

/// The parts that gates come in; 0: no kernel serves.
int few_mlstm_parts(const FewMap& a, int64_t e, int64_t n_gates);
/// few_map(a), whose y is [x_m; z], and what follows.
void few_mlstm(const FewMap& a, const FewMlstm& b, bool early, Stream stream);

}  // namespace krait::kernels::cuda
