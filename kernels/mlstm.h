#pragma once
#include <string>

#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

/// The matrix memory of xLSTM (Beck et al. 2024, eqs. 19-27), in its chunkwise form. Per batch entry and head, with
/// qs = q dq^(-1/2) and lf = log sigmoid(f):
///   m_t = max(lf_t + m_{t-1}, i_t)
///   C_t = e^(lf_t + m_{t-1} - m_t) C_{t-1} + e^(i_t - m_t) k_t v_t^T        n_t the same with k_t alone
///   r_t = n_t . qs_t         h_t = C_t^T qs_t / (max(|r_t|, e^(-max(m_t, -80))) + eps)
/// The zero state is C = n = m = 0. At the first position of a document the state before it is the zero state.
/// Inside a chunk, with b the running sum of lf since its start (or the document's) and c_j = i_j - b_j:
///   u_t = max(m, max_{j<=t} c_j)      m_t = b_t + u_t
///   sum over the chunk: weights e^(c_j - u_t) of k_j v_j^T, and e^(m - u_t) of the state before the chunk.
/// h does not depend on any m, so m carries no gradient. Backward, with d_t = dh_t / den_t and
/// dr_t = -(dh_t . h_t) / den_t sign(r_t) where |r_t| >= e^(-m_t), else 0:
///   W_tj = e^(c_j - u_t) qs_t . k_j      dS_tj = e^(c_j - u_t) (d_t . v_j + dr_t)
///   dqs = dS k, dk = dS^T qs, dv = W^T d, and the same through the states between chunks
///   di_j = k_j . dk_j      dlf_t = <dC, C> + <dn, n> at the chunk's end + sum_{s>=t} (qs_s . dqs_s - k_s . dk_s)
/// and df = dlf sigmoid(-f), 0 where the state before t is the zero state.
struct MlstmOptions {
  double eps = 1e-6;
  bool denominator_gradient = true;  // false: dr = 0, what public kernels do; meant for a norm of h behind it
  int64_t chunk = 64;                // positions of a chunk on the CPU; CUDA has its own
  bool round_h = false;              // h in the dtype of q for heads of multiples of 192; a norm that divides by it follows
  bool keep_states = false;          // of the forward, for the backward (CUDA): else they are made again there
};

/// c (b, heads, dq, dv), n (b, heads, dq), m (b, heads), fp32 (fp64 for fp64). Undefined: the zero state.
struct MlstmState { Tensor c, n, m; };

/// q, k (b, l, heads, dq), v (b, l, heads, dv): fp32, bf16 or fp64, any strides. i, f (b, l, heads) are
/// pre-activations, fp32 (fp64 for fp64). segments (b, l) int32 or undefined: the document of each position; the
/// initial state belongs to the row's first.
struct MlstmInputs {
  Tensor q, k, v, i, f;
  MlstmState initial;
  Tensor segments;
};

/// h (b, l, heads, dv) and its gradient are fp32 (fp64 for fp64) unless round_h: the norm behind the cell leaves dh . h = 0, and at a
/// document's first positions the gradients of q, k and i are what remains of that cancellation. Also the state
/// after the last position; m and r of every position (b, heads, l), for the backward. The states between chunks,
/// dq dv l / chunk values, and the coefficients of values in h, chunk l, are kept where asked for (by a backend that can).
struct MlstmOut {
  Tensor h;
  MlstmState last;
  Tensor m, r;
  Tensor states, n_states, coefficients;
};
MlstmOut mlstm_forward(const MlstmInputs& in, const MlstmOptions& options = {});

/// dh, dc_last and dn_last may be undefined (zero). dc0 and dn0 are undefined without an initial state. With `dots`,
/// dh . h (b, l, heads) before any rounding, dh may be in the dtype of q.
struct MlstmGrad { Tensor dq, dk, dv, di, df, dc0, dn0; };
struct MlstmUpstream { Tensor dh, dc_last, dn_last, dots = {}; };
MlstmGrad mlstm_backward(const MlstmUpstream& upstream, const MlstmInputs& in, const MlstmOut& out,
                         const MlstmOptions& options = {});

/// One piece of a sequence as seen from outside, from the empty state C = n = 0, m = -infinity (in.initial is not read):
/// where no document begins inside it, the state (C, n, m) before it becomes behind it
///   m' = max(log_decay + m, m_own)      C' = e^(log_decay + m - m') C + e^(m_own - m') C_own      n' the same
/// and `own` otherwise. log_decay (b, heads) = sum_t lf_t. Costs the states of the forward pass alone; reads no q.
struct MlstmSummary { MlstmState own; Tensor log_decay; };
MlstmSummary mlstm_summary(const MlstmInputs& in, const MlstmOptions& options = {});
/// Gradients of the initial c and n from dh (and dots: MlstmUpstream) alone, the last state's left out; `out` is the
/// forward pass's, of which h, m and r are read.
struct MlstmInitialGradient { Tensor dc0, dn0; };
MlstmInitialGradient mlstm_initial_gradient(const Tensor& dh, const MlstmInputs& in, const MlstmOut& out,
                                            const MlstmOptions& options = {}, const Tensor& dots = {});

/// One position of the recurrent form: q, k (b, heads, dq), v (b, heads, dv), i, f (b, heads). Advances the state in
/// place (contiguous) and returns h (b, heads, dv), fp32 (fp64 for fp64).
Tensor mlstm_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& i, const Tensor& f,
                  MlstmState& state, double eps = 1e-6);

/// What serves these sizes, for the line printed at the start of a run.
std::string mlstm_kernel_name(DType dtype, Device device, int64_t dq, int64_t dv);

// Last dimensions of q, k, v are contiguous, everything else is whole. l > 0; the initial state may be undefined, or have
// an m alone.
// On CUDA h may be in the dtype of q, in the forward pass, and where `dots` are given.
KRAIT_BACKENDS(void mlstm_forward(MlstmOut& out, const MlstmInputs& in, const MlstmOptions& options);
               void mlstm_backward(MlstmGrad& grad, const MlstmUpstream& upstream, const MlstmInputs& in,
                                   const MlstmOut& out, const MlstmOptions& options);
               void mlstm_last_state(MlstmState& last, const MlstmInputs& in, const MlstmOptions& options);
               void mlstm_initial_gradient(MlstmInitialGradient& grad, const Tensor& dh, const MlstmInputs& in,
                                           const MlstmOut& out, const MlstmOptions& options, const Tensor& dots);
               void mlstm_step(Tensor& h, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& i,
                               const Tensor& f, MlstmState& state, double eps);
               void mlstm_kernel_name(std::string& name, DType dtype, int64_t dq, int64_t dv))

}  // namespace kernels
}  // namespace krait
