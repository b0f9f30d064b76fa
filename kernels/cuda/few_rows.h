#pragma once
#include <cstdint>

#include "core/dtype.h"
#include "core/stream.h"
#include "kernels/cuda/rows_scan.h"
#include "kernels/cuda/rows_state.h"
#include "kernels/step_scope.h"

// A decoding step of up to kFewRows rows: two kernels a layer of Mamba, whose sums over all channels are left in parts that the
// next kernel adds. All matrices are bf16, sums fp32. A kernel lets the next begin at once, and reads states and weights
// (but those of the norm in front of a map) before the kernels in front have finished: what wrote them must lie before one
// that was not overlapped. Every block adds all parts of all rows, so that more than kFewScanRows
// are served better by rows_linear.h.
namespace krait::kernels::cuda {

inline constexpr int kFewWidth = 768, kFewTaps = 4;
inline constexpr int kFewColumns = 32;  // of y, a block of FewLinear
inline constexpr int kFewParts = 12;  // that are read together

/// Rows of k values on their way through the residual stream and RMSNorm, x = made (+ residual):
///   made = round(factor * sum of parts), or what is there when there are no parts
///   sum = round(made + residual)       normed = round(sum rstd weight)
/// with factor 1, or (sum of `squares` over their parts / width + squares_eps)^(-1/2). What may be null: residual, and of
/// the results all.
struct FewInput {
  const bf16* made;
  const float *part, *squares;  // (parts, rows, k), (rows, parts)
  int parts, width;  // width: of a row before the map whose parts these are
  float squares_eps;
  const bf16* residual;
  const float* weight;
  float eps;
  bf16 *made_out, *sum, *normed;
  float* rstd;
};

/// y = normed w^T + bias and what may stand behind it, as in RowsLinear (rows_linear.h).
struct FewLinear {
  FewInput in;
  const bf16 *w, *bias;
  bf16* y;
  int rows, n, k;
  bf16 *conv, *mixed;
  const bf16 *conv_weight, *conv_bias;
  int conv_begin, conv_end;
  const bf16* project;
  float* part;  // (rows, conv_end / kFewColumns, outputs)
  int outputs;
};

/// Mamba's scan behind FewLinear's parts, and the map behind that: part (clusters, rows, d), whose sum is y w^T.
struct FewScan : RowsScan {
  const bf16* w;  // (d, e)
  float* part;
  int d;
};

/// The same of Mamba-2, whose h is fp32 and holds every position: the sum of the parts lacks the gated norm's factor, which
/// squares, here (rows, clusters), make.
struct FewState : RowsState {
  const bf16* w;
  float* part;
  int d;
};

/// rows <= kFewRows; k is a multiple of 128, at most kFewWidth; kFewTaps taps. With `project` conv_begin is 0, conv_end a
/// multiple of kFewColumns, and there are at most 128 outputs. n may be 0: the rows are all that is wanted. Addresses are
/// multiples of 16.
void few_linear(const FewLinear& a, bool overlapped, Stream stream);
/// e is a multiple of 16, r of 4, at most kScanMaxRank; d at most kFewWidth.
void few_scan(const FewScan& a, Stream stream);
/// p is a multiple of 16; one group of kHeadStates.
void few_state(const FewState& a, Stream stream);
/// Clusters that serve e channels.
int64_t few_parts(int64_t e);

}  // namespace krait::kernels::cuda
