#pragma once
#include "kernels/attention.h"

namespace krait::kernels::cuda {

// Krait's own kernels: each serves every option, but see attention_backward_wgmma and attention_forward_decode.

/// CUDA cores, any dtype and head size.
void attention_forward_simt(Tensor& o, Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                            const AttentionOptions& options);
void attention_backward_simt(Tensor& dq, Tensor& dk, Tensor& dv, const Tensor& do_, const Tensor& q, const Tensor& k,
                             const Tensor& v, const Tensor& lse, const Tensor& delta, const AttentionOptions& options);

/// Tensor cores: bf16, d of 32, 64, 96 or 128, rows aligned to 16 bytes.
bool attention_mma_serves(const Tensor& t);
void attention_forward_mma(Tensor& o, Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                           const AttentionOptions& options);
void attention_backward_mma(Tensor& dq, Tensor& dk, Tensor& dv, const Tensor& do_, const Tensor& q, const Tensor& k,
                            const Tensor& v, const Tensor& lse, const Tensor& delta, const AttentionOptions& options);

/// Backward on Hopper (compiled for sm_90a), the fastest where it serves: bf16, d of 64 or 128, rows aligned to 16 bytes, lq and
/// lk above 1, full attention or causal with lq == lk and no offset; nothing else. Workspace: 8 bytes a row of q. False
/// when a gradient is not aligned: another kernel must serve.
bool attention_backward_wgmma_serves(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options);
bool attention_backward_wgmma(Tensor& dq, Tensor& dk, Tensor& dv, const Tensor& do_, const Tensor& q, const Tensor& k,
                              const Tensor& v, const Tensor& o, const Tensor& lse, const AttentionOptions& options);
/// What it calls, of the tensors it serves, for long heads of 128: one kernel, whose sums of dq are a workspace of 4 bytes
/// a value of q, at most options.vendor_bytes at a time (sequences are worked off in parts; one must fit).
bool attention_backward_wgmma_joint_serves(const Tensor& q, const Tensor& k, const AttentionOptions& options);
void attention_backward_wgmma_joint(const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& do_, const Tensor& q,
                                    const Tensor& k, const Tensor& v, const Tensor& o, const Tensor& lse,
                                    const AttentionOptions& options);

/// Few queries against many keys: keys are split over blocks and the parts combined. For generation: no dropout.
void attention_forward_decode(Tensor& o, Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                              const AttentionOptions& options);

// The vendor's kernels (cuDNN); in a build without cuDNN they never serve.

/// Whether cuDNN computes exactly this: bf16, d a multiple of 8 up to 128, rows aligned to 16 bytes, lq and lk above 1,
/// full attention or causal with lq == lk and no offset; no window, documents, ALiBi, cache lengths or
/// dropout.
/// Forward: compute capability 8.0. Backward, where only a deterministic plan will do: Hopper, and a workspace for dP
/// (cuDNN keeps that matrix to make dq without atomics) within options.vendor_bytes for a key head and its query heads.
/// As many heads as fit are worked off at a time.
bool attention_cudnn_supported(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options);
bool attention_cudnn_backward_supported(const Tensor& q, const Tensor& k, const Tensor& v,
                                        const AttentionOptions& options);
/// False when no plan could be built (said once on stderr): the own kernel must serve.
bool attention_forward_cudnn(Tensor& o, Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                             const AttentionOptions& options);
bool attention_backward_cudnn(Tensor& dq, Tensor& dk, Tensor& dv, const Tensor& do_, const Tensor& q, const Tensor& k,
                              const Tensor& v, const Tensor& o, const Tensor& lse, const AttentionOptions& options);
/// "cuDNN 9.19.0"
std::string attention_cudnn_version();

}  // namespace krait::kernels::cuda
