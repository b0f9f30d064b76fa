#pragma once
#include "core/device.h"
#include "core/dtype.h"
#include "kernels/linear.h"

// What the persistent decoding kernel is told to do: a list of operations, one behind the other, on few rows. All
// activations and matrices are bf16, everything else fp32; convolutions have four taps. Pointers are to contiguous tensors.
//
// Blocks do not meet between operations: what one gives and another needs goes through a slot of the launch, in which a
// value that is not there yet reads as kStepAbsent. Tensors get the results too, for those who come after the launch.
namespace krait::kernels::cuda::flow {

inline constexpr int kMaxStepOps = 128, kMaxStepRows = 8;
inline constexpr int kStepWarps = 8;               // that compute
inline constexpr int kStepStageBytes = 27392;      // of the ring that weights come through
inline constexpr int kStepRowBytes = 48 * 1024;    // input rows of a linear map, or what a mixer shares
inline constexpr int kScanLanes = 16, kScanRanks = 8;  // lanes of a channel; values of d that a lane reads ahead
inline constexpr int kStateLanes = 16, kStateQuads = 4;  // lanes of a channel; of 4 states each that a lane holds
inline constexpr int kStepChunk = 32;                  // inputs of a linear map that a warp multiplies at a time

inline constexpr uint16_t kStepAbsent = 0xffff;  // a NaN that no rounding makes
inline constexpr int64_t kStepSlotBytes = 4 << 20;  // of a launch; there are two sets of slots, used in turn

/// Bytes between the columns of a stage: neighbouring ones half a line of banks apart.
KRAIT_HOST_DEVICE constexpr int step_pitch(int k) { return 2 * k + static_cast<int>((64u - 2u * static_cast<unsigned>(k)) % 128u); }

/// Chunks of k inputs that a warp has (the last warps fewer).
KRAIT_HOST_DEVICE constexpr int chunks_of_warp(int k) { return ((k + kStepChunk - 1) / kStepChunk + kStepWarps - 1) / kStepWarps; }

/// Parts of 256 values that a warp's share of a row has, at most.
inline constexpr int kStepParts = 4;
/// Rows of a norm; those of a gated one lie in shared memory twice. One row is held in one pass of a warp.
constexpr bool norm_fits(int64_t rows, int64_t k, int copies = 1) {
  if (rows < 1 || rows > kMaxStepRows || k < 8 || k % 8 != 0 || rows * k * 2 * copies > kStepRowBytes) return false;
  return chunks_of_warp(static_cast<int>(k)) * kStepChunk <= 256 * (rows == 1 ? 1 : kStepParts);
}

/// Values that an operation needs: those of a slot (in elements from the start; they are waited for), or with slot < 0 of
/// a tensor from before the launch.
struct StepValues {
  const bf16* from;
  int slot, row;  // row: elements between rows
};

/// Where an operation's values go, both if there are both.
struct StepResult {
  bf16* to;
  int slot, row;
};

/// `input`: what a linear map does to its input, alone. `convolve`: what may follow a linear map, alone.
enum class StepKind : int { linear, input, convolve, mamba_scan, mamba2_state, attention };

/// What a linear map does to its input rows first; every block does it for itself.
enum class StepInput : int { plain, norm, gated };

/// y = norm(x + residual), kernels/norm.h. w and b are fp32; mean only when centred. The first block writes the outputs.
struct NormStep {
  StepValues x, residual;
  StepResult y, sum;
  float *mean, *rstd;
  const float *w, *b;
  float eps;
  int centred;
};

/// Mamba-2's gated norm of u.
struct GatedStep {
  StepValues u, z;
  StepResult y;
  const float* w;
  float eps;
  int norm_first;
};

/// silu(convolution) of the columns [first, first + channels) of a linear map: goes to the slot in place of the columns.
/// conv (rows, 3, channels) moves on by one position. Null: none.
struct MixedStep {
  bf16* conv;
  const bf16 *weight, *bias;
  int first, channels;
};

/// Mamba's time step, state and output (kernels/mamba_step.h), x already mixed.
struct ScanStep {
  StepResult y;
  StepValues xz, dbc;
  float* h;
  const bf16* dt_proj;
  const float *dt_bias, *A_log, *D;
  int e, n, r;
};

/// Mamba-2's state and u (kernels/mamba2_step.h), x, B and C already mixed.
struct StateStep {
  StepResult u;
  StepValues zxbcdt;
  float* h;
  const float *dt_bias, *A_log, *D;
  float low, high;
  int heads, p, n, groups, D_columns;
};

/// kernels/attention_append.h
struct AttentionStep {
  StepResult o;
  StepValues qkv;
  bf16 *k_cache, *v_cache;
  const int32_t* position;
  const float *cos, *sin, *alibi;
  int capacity, hq, hkv, d, half, interleaved, lanes;
  float scale;
};

/// y = epilogue(input(x) w^T + bias), w (n, k).
struct LinearStep {
  StepValues x;
  StepResult y;
  const bf16 *w, *bias;
  MixedStep mixed;
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
    GatedStep gated;
    ScanStep scan;
    StateStep state;
    AttentionStep attention;
  };
};

/// What launches leave to each other on a device: zeros before the first.
struct StepHistory {
  unsigned long long arrivals;  // of blocks
  int used[2];                  // bytes of each set of slots
};

struct StepProgram {
  StepHistory* history;
  bf16* slots;  // two sets, all absent before the first launch
  int used;     // bytes of a set
  int count;
  StepOp ops[kMaxStepOps];
};

void run_steps(const StepProgram& program, Device device);

}  // namespace krait::kernels::cuda::flow
