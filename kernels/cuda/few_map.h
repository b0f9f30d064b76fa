#pragma once
#include <cstdint>

#include "core/dtype.h"
#include "core/stream.h"
#include "kernels/linear.h"
#include "kernels/step_scope.h"

namespace krait::kernels::cuda {

/// A linear map of a decoding step of 1 to kFewRows rows with what stands before and behind it, all matrices bf16:
///   x = norm(x), with a weight, to which weight_offset is added: layer norm where centred, else RMSNorm; normed, mean and rstd receive what they name
///   y = epilogue(x w^T + bias)
///   gated: w (2 n, k), gates first, whose products go to y (rows, 2 n); units = silu(gate) up, n of them; no bias
///   with `total`: total = added + y
struct FewMap {
  const bf16 *x, *w, *bias;  // bias may be null
  bf16* y;
  int64_t x_row, y_row;  // elements between rows
  int rows, n, k;
  Epilogue epilogue;

  const float *norm_weight, *norm_bias;  // (k); null: no norm; null: no bias
  float eps, weight_offset;
  bool centred;
  bf16* normed;  // (rows, k), may be null like mean and rstd
  float *mean, *rstd;

  bf16* units;  // (rows, n); null: not gated
  const bf16* added;
  bf16* total;  // (rows, n); null: nothing is added

  uint64_t* likeliest;  // (rows, blocks): the largest key (likeliest.cuh) among a block's part of the first `choices` columns; may be null
  int choices;
};

/// Blocks of a map that may be asked for its likeliest columns; 0: it may not.
int64_t few_map_choosing_blocks(const FewMap& a);

/// Whether sizes and addresses suit the kernel.
bool few_map_fits(const FewMap& a);
/// Weights are read before the kernels in front have finished: what wrote them must be further back than any that can be
/// under way. With `early` the next kernel may begin before those in front of this one have finished.
void few_map(const FewMap& a, bool early, Stream stream);

}  // namespace krait::kernels::cuda
