#pragma once
#include "kernels/cuda/step_program.h"

// A program of one row for the kernel of step_solo.cu. Blocks do not meet between operations: two values and the number of
// the launch travel together in 8 bytes (a pair), and a pair is there when it bears the launch's number. A block keeps the
// channels of a mixer from the map before it to the state behind it.
namespace krait::kernels::cuda {

inline constexpr int kMaxSoloOps = 100, kMaxSoloPackages = 160;
inline constexpr int kSoloWarps = 16, kSoloThreads = 32 * kSoloWarps;
inline constexpr int kSoloWidth = 3072;      // inputs of a linear map
inline constexpr int kSoloKept = 48;         // channels of a mixer that a block has
inline constexpr int kSoloMixed = 160;       // values of d, B and C of Mamba
inline constexpr int kSoloHeadDim = 128;
inline constexpr int kSoloRing = 164 * 1024, kSoloPackage = 44 * 1024, kSoloTurns = 16;
inline constexpr int kSoloSlotPairs = 1 << 17;  // of a device

enum class SoloKind : int { linear, scan, state, attention };

/// Values of an operation before, by pairs from `slot`; or, where slot < 0, memory that the launch does not write.
struct SoloSource {
  const bf16* from;
  int slot;
};

/// Columns [base, base + total) of a map, `each` a block; reversed: the last blocks have the first.
struct SoloSegment {
  int base, total, each, reversed;
};

struct SoloNorm {
  const bf16* residual;  // read by all; null: none, or the row that the blocks hold
  int holds;             // the sum that the norm before has left is the residual
  int centred;
  bf16 *y, *sum;
  float *mean, *rstd;
  const float *w, *b;
  float eps;
};

/// u and z of a channel travel as a pair.
struct SoloGate {
  bf16* y;
  const float* w;
  float eps;
  int norm_first;
};

struct SoloLinear {
  SoloSource x;
  const bf16 *w, *bias;
  bf16* y;
  int k, columns;                    // columns: the most a block has
  int split, groups;                 // warps that share the inputs of a pair of columns; pairs at a time
  int share, inverse;                // inputs of a warp; 256 / groups, rounded up
  int package, packages, per;        // the first, how many, columns of each
  SoloSegment segment[3];            // the first `kept` of them stay in the block, too
  int kept;
  int slot, published, published_end;  // columns that others read
  Epilogue epilogue;
  StepInput input;
  bf16* conv;                        // the convolution's state (3, channels) or null, and its columns
  const bf16 *conv_weight, *conv_bias;
  int conv_first, channels;
  union {
    SoloNorm norm;
    SoloGate gate;
  };
};

struct SoloScan {
  SoloSource dbc;
  int slot, e, each, n, r;
  bf16* y;
  float* h;
  const bf16* dt_proj;
  const float *dt_bias, *A_log, *D;
};

struct SoloState {
  SoloSource mixed;  // B, C and the time steps
  int slot, e, each, n, p, D_columns;
  bf16* u;
  float* h;
  const float *dt_bias, *A_log, *D;
  float low, high;
};

struct SoloAttention {
  SoloSource qkv;
  int slot;
  AttentionStep of;
};

struct alignas(16) SoloOp {
  SoloKind kind;
  union {
    SoloLinear linear;
    SoloScan scan;
    SoloState state;
    SoloAttention attention;
  };
};

/// Weights of some columns of a map: where in the ring they lie, and the last package that has to be used up before (< 0: none).
struct SoloPackage {
  int offset, after;
};

struct SoloProgram {
  unsigned long long* counter;  // blocks that ever began; a multiple of the blocks between launches
  unsigned long long* pairs;
  int count, packages;
  SoloOp ops[kMaxSoloOps];
  SoloPackage package[kMaxSoloPackages];
};

/// False where the program is not one for this kernel. Where states and values are is told by pointers: those of tensors
/// that the program works on are different.
bool plan_solo(SoloProgram& solo, const StepProgram& program, int blocks);
void run_solo(const SoloProgram& program, Device device, int blocks);  // planned for as many

}  // namespace krait::kernels::cuda
