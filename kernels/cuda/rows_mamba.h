#pragma once
#include "core/dtype.h"
#include "core/stream.h"
#include "kernels/cuda/rows_linear.h"
#include "kernels/cuda/rows_scan.h"

namespace krait::kernels::cuda {

/// A layer of Mamba in a decoding step, in bf16 but for states, norms and dt_bias, A_log, D (rows_linear.h, rows_scan.h):
/// in_proj behind the norm, convolution, x_proj, scan, out_proj, the sum with the residual stream, weighted by the next norm.
struct RowsMambaLayer {
  const bf16 *in, *conv_weight, *conv_bias, *project;
  bf16 *conv, *xz;
  bf16* normed = nullptr;  // may be null, as rstd: what in_proj read, scaled
  float* rstd;
  float eps;
  const bf16* dt_proj;
  const float *dt_bias, *A_log, *D;
  float* h;
  bf16* y;
  const bf16 *out = nullptr, *residual = nullptr;  // null: the run ends behind the scan
  const float* weight = nullptr;
  bf16 *made = nullptr, *sum = nullptr;
};

inline constexpr int kMambaLayers = 32;  // of a run

/// Layers behind one another. Of those behind the first, in_proj reads the sum with the residual stream of the layer in
/// front, weighted by the norm between them, and `residual` is that sum.
struct RowsMamba {
  RowsMambaLayer layer[kMambaLayers];
  int layers, rows, d, e, r;
  const bf16* x;  // of the first layer
  int64_t x_row;
  const float* x_squares;  // null: no norm
  int x_parts;
  bf16* weighted;     // (rows, d), of the last layer when it has an `out`, as
  float* squares;     // (rows, mamba_squares())
  void* exchange;     // mamba_exchange() bytes, what blocks send one another
  unsigned* counters;  // mamba_counters(), zeros
};

constexpr int mamba_squares(int d) { return (d + 23) / 24; }
constexpr int mamba_counters(int layers) { return layers * 2 * 8; }
int64_t mamba_exchange();

/// Whether sizes and addresses suit the kernel: `in` as for rows_linear, with x_proj behind the convolution.
bool rows_mamba_fits(const RowsLinear& in, int64_t e, int64_t r, Device device);

/// One kernel for all layers, whose blocks wait for one another: it needs the whole GPU.
void rows_mamba(const RowsMamba& a, Stream stream);

}  // namespace krait::kernels::cuda
