#pragma once
#include "kernels/cuda/rows_linear.h"
#include "kernels/cuda/rows_state.h"

namespace krait::kernels::cuda {

/// A layer of Mamba-2 in a decoding step, in bf16 but for norms, steps and perhaps states: in_proj behind the norm, with the
/// convolution (rows_linear.h); the states behind their last positions (rows_state.h); out_proj, the sum with the residual
/// stream, weighted by the next norm.
struct RowsMamba2Layer {
  const bf16 *in, *conv_weight, *conv_bias;
  bf16* conv;
  bf16* zxbcdt = nullptr;  // may be null: in_proj's rows
  bf16* normed = nullptr;  // may be null, as rstd: what in_proj read, scaled
  float* rstd;
  float eps;
  void* h;
  const float *dt_bias, *A_log, *D, *norm;
  float low, high, gated_eps;
  bf16* gated = nullptr;  // may be null: the gated norm's rows, scaled
  bf16 *recent_x, *recent_B;
  float* recent_steps;
  int32_t* count;
  const bf16 *out = nullptr, *residual = nullptr;  // null: the run ends behind the states
  const float* weight = nullptr;
  bf16 *made = nullptr, *sum = nullptr;
};

inline constexpr int kMamba2Layers = 32;

/// Layers behind one another, no two of which share what they keep. Of those behind the first, in_proj reads what the layer
/// in front made, and `residual` is that one's sum. The last one's map makes weighted (rows, d), squares (rows,
/// mamba2_squares()); where it has none, its states make between (rows, e), between_squares (rows,
/// mamba2_state_squares()).
struct RowsMamba2 {
  RowsMamba2Layer layer[kMamba2Layers];
  int layers, rows, d, n, heads, D_columns;  // n columns of in_proj
  bool narrow;                               // states are bf16
  const bf16* x;                             // of the first layer
  int64_t x_row;
  const float* x_squares;  // null: no norm
  int x_parts;
  bf16 *weighted, *between;
  float *squares, *between_squares;
  void* exchange;      // mamba2_exchange() bytes, what blocks send one another
  unsigned* counters;  // mamba2_counters(), zeros
};

constexpr int mamba2_squares(int d) { return (d + 15) / 16; }
constexpr int mamba2_state_squares(int heads) { return heads * (kHeadChannels / 16); }
constexpr int mamba2_counters(int layers) { return layers * 16; }
int64_t mamba2_exchange();

/// Whether sizes and addresses suit the kernel: `in` as for rows_linear, with the convolution; and rows_state_fits.
bool rows_mamba2_fits(const RowsLinear& in, const RowsState& state, Device device);

/// One kernel for all layers, whose blocks wait for one another: it needs the whole GPU.
void rows_mamba2(const RowsMamba2& a, Stream stream);

}  // namespace krait::kernels::cuda
