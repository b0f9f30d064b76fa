#pragma once
#include <string>

#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

/// Structured state-space duality (Dao & Gu 2024, section 6): a linear recurrence with one decay per head and a
/// matrix state, computed in chunks by matrix products. Head h reads the B and C of group h g / heads.
///   h_t = e^{a_t} h_{t-1} + dt_t x_t (x) B_t   (p, n)            y_t = h_t C_t + D x_t
/// With s_i = a_1 + ... + a_i inside a chunk and M_ij = e^{s_i - s_j} for i >= j, 0 above:
///   y_i = sum_j (C_i . B_j) M_ij dt_j x_j + e^{s_i} h_in C_i + D x_i
///   h_out = e^{s_q} h_in + sum_j e^{s_q - s_j} dt_j x_j (x) B_j
/// Where the segment changes, h_{t-1} counts as zero. Any chunk length gives the same result up to
/// rounding; cost per position grows with the chunk, states in memory (heads p n each) shrink with it. It is the GPU's
/// chunk: the CPU takes 32 positions at a time, fewer where `chunk` is less or decays are fast (cpu/ssd_chunk.h).
struct SsdInput {
  Tensor x;              // (b, l, heads, p) fp32, bf16 or fp64; slices of a wider tensor are read in place
  Tensor dt;             // (b, l, heads) or undefined: 1. Like a in fp32 (fp64 with fp64 x)
  Tensor a;              // (b, l, heads), log decay, <= 0
  Tensor B, C;           // (b, l, g, n) like x; g divides heads
  Tensor D;              // (heads), (heads, p) or undefined: 0
  Tensor initial_state;  // (b, heads, p, n) fp32 (fp64) or undefined: 0. Belongs to the row's first segment
  Tensor segments;       // (b, l) int32 or undefined: one document per row
  int64_t chunk = 256;
};
/// y like x, contiguous; final_state (b, heads, p, n) and all sums in fp32 (fp64).
struct SsdOut { Tensor y, final_state; };
SsdOut ssd_forward(const SsdInput& in);

/// Gradients of in's tensors, undefined where those are. Nothing but the input is needed: chunk states are made again.
///   Gamma_ij = (dy_i . x_j) dt_j M_ij      W_ij = Gamma_ij (C_i . B_j)
///   da_r = sum_{i >= r > j} W_ij + sum_{i >= r} e^{s_i} dy_i . h_in C_i + sum_{j < r} e^{s_q - s_j} dt_j x_j . dh_out B_j
///          + e^{s_q} <dh_out, h_in>
/// The decay's gradient is summed as written, without differences of sums, so that it keeps its digits in fp32.
/// dB and dC are summed over the heads of a group in order: equal inputs give equal bits.
struct SsdGrad { Tensor dx, ddt, da, dB, dC, dD, dinitial_state; };
/// dfinal (gradient of the final state) may be undefined.
SsdGrad ssd_backward(const Tensor& dy, const Tensor& dfinal, const SsdInput& in);
/// The same with dx, dB and dC of `grad` given: tensors with any strides whose last is 1.
void ssd_backward_into(SsdGrad& grad, const Tensor& dy, const Tensor& dfinal, const SsdInput& in);

/// One piece of a sequence as seen from outside: h_out = e^{log_decay} h_in + state, where no document begins inside
/// it; state (b, heads, p, n) is its final state from the initial one (undefined: 0), log_decay (b, heads) = sum_t a_t.
/// Costs the states of the forward pass alone; reads neither C nor D.
struct SsdSummary { Tensor log_decay, state; };
SsdSummary ssd_summary(const SsdInput& in);
/// Gradient of the initial state from the outputs alone, sum_t e^{a_1 + .. + a_t} dy_t (x) C_t over the first document.
/// Reads neither x nor B nor D nor the initial state.
Tensor ssd_initial_gradient(const Tensor& dy, const SsdInput& in);

/// One position: x (b, heads, p), dt and a (b, heads), B and C (b, g, n); updates the state (b, heads, p, n) in place
/// and returns y (b, heads, p). dt and D may be undefined.
Tensor ssd_step(Tensor& state, const Tensor& x, const Tensor& dt, const Tensor& a, const Tensor& B, const Tensor& C,
                const Tensor& D);

/// What serves a call, for the line printed at the start of a run.
std::string ssd_kernel_name(DType dtype, Device device);

// Backends: the last stride of x, B, C, dy, dx, dB, dC is 1; all else is contiguous. D and dD are (heads, p) or
// undefined; ddt is undefined with dt. Nothing is empty.
KRAIT_BACKENDS(
    void ssd_forward(Tensor& y, Tensor& final_state, const SsdInput& in);
    void ssd_backward(SsdGrad& grad, const Tensor& dy, const Tensor& dfinal, const SsdInput& in);
    void ssd_final_state(Tensor& state, const SsdInput& in);
    void ssd_initial_gradient(Tensor& gradient, const Tensor& dy, const SsdInput& in);
    void ssd_step(Tensor& y, Tensor& state, const Tensor& x, const Tensor& dt, const Tensor& a, const Tensor& B,
                  const Tensor& C, const Tensor& D))

}  // namespace kernels
}  // namespace krait
