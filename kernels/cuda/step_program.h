#pragma once
#include "core/device.h"
#include "core/dtype.h"
#include "kernels/linear.h"

// What the persistent decoding kernel is told to do: a list of operations, one behind the other, on few rows. All
// activations and matrices are bf16, everything else fp32; convolutions have four taps. Pointers are to contiguous tensors.
namespace krait::kernels::cuda {

inline constexpr int kMaxStepOps = 128, kMaxStepRows = 8;
inline constexpr int kStepStageBytes = 24 * 1024;  // of the ring that weights come through; a column fits
inline constexpr int kStepRowBytes = 48 * 1024;    // input rows of a linear map, or what a mixer shares
inline constexpr int kScanLanes = 16, kScanRanks = 8;  // lanes of a channel; values of d that a lane reads ahead
inline constexpr int kStateQuads = 2;                  // of 4 states of a channel that a lane of a warp holds

/// Neighbouring warps that share a row of a norm, each lane with up to kStepVectors vectors of 8 values.
inline constexpr int kStepVectors = 6;
KRAIT_HOST_DEVICE constexpr int warps_of_row(int rows) { return rows == 1 ? 8 : rows == 2 ? 4 : rows <= 4 ? 2 : 1; }
constexpr bool norm_fits(int64_t rows, int64_t k) {
  return rows >= 1 && rows <= kMaxStepRows && k % 8 == 0 && k <= 256 * warps_of_row(static_cast<int>(rows)) * (rows == 1 ? 1 : kStepVectors);
}

/// `input`: what a linear map does to its input, alone. `pause`: nothing, for an operation that reads ahead what the one
/// before it writes.
enum class StepKind : int { linear, input, mamba_scan, mamba2_state, attention, pause };

/// What a linear map does to its input rows first; every block does it for itself.
enum class StepInput : int { plain, norm, convolved, gated };

/// y = norm(x + residual), kernels/norm.h. w and b are fp32; mean only when centred. The first block writes the outputs.
struct NormStep {
  const bf16 *x, *residual;
  bf16 *y, *sum;
  float *mean, *rstd;
  const float *w, *b;
  float eps;
  int centred;
};

/// x~ = silu(conv(x)) of Mamba, filters of four taps, e the inputs of the map.
struct ConvolvedStep {
  const bf16 *xz, *conv, *weight, *bias;
};

/// Mamba-2's gated norm of u; the convolution's state (3, channels) moves on too.
struct GatedStep {
  const bf16 *u, *zxbcdt;
  bf16 *y, *conv;
  const float* w;
  float eps;
  int norm_first, channels, input;  // input: of a row of zxbcdt
};

/// Mamba's time step, state and output (kernels/mamba_step.h), and the convolution's state.
struct ScanStep {
  bf16 *y, *conv;
  float* h;
  const bf16 *xz, *dbc, *conv_weight, *conv_bias, *dt_proj;
  const float *dt_bias, *A_log, *D;
  int e, n, r;
};

/// Mamba-2's state and u (kernels/mamba2_step.h).
struct StateStep {
  bf16* u;
  float* h;
  const bf16 *conv, *zxbcdt, *conv_weight, *conv_bias;
  const float *dt_bias, *A_log, *D;
  float low, high;
  int heads, p, n, groups, channels, input, D_columns;
};

/// kernels/attention_append.h
struct AttentionStep {
  bf16 *o, *k_cache, *v_cache;
  const bf16* qkv;
  const int32_t* position;
  const float *cos, *sin, *alibi;
  int64_t qkv_row;
  int capacity, hq, hkv, d, half, interleaved, lanes;
  float scale;
};

/// y = epilogue(input(x) w^T + bias), w (n, k).
struct LinearStep {
  const bf16 *x, *w, *bias;
  bf16* y;
  int64_t x_row, y_row;  // elements between rows
  int n, k;
  Epilogue epilogue;
  StepInput input;
};

struct alignas(16) StepOp {
  StepKind kind;
  int rows;
  LinearStep linear;
  union {
    NormStep norm;
    ConvolvedStep convolved;
    GatedStep gated;
    ScanStep scan;
    StateStep state;
    AttentionStep attention;
  };
};

struct StepProgram {
  unsigned long long* counter;  // of arrivals; a multiple of the blocks between launches
  int count;
  StepOp ops[kMaxStepOps];
};

int step_blocks(Device device);  // of a launch: one a multiprocessor
void run_steps(const StepProgram& program, Device device);

}  // namespace krait::kernels::cuda
