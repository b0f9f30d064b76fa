#pragma once
#include <optional>
#include <string>
#include <vector>

#include "core/dispatch.h"
#include "core/tensor.h"
#include "kernels/dropout.h"

namespace krait {
namespace kernels {

/// Softmax attention, blockwise with an online softmax (Milakov & Gimelshein 2018; Dao et al. 2022): no (lq, lk)
/// matrix is ever stored. Query head h reads key head floor(h hkv / hq). Query i has position p = q_offset + i,
/// key j has position j:
///   S[i,j] = scale q_i . k_j - slope_h |p - j|           over the keys that i may see, else -infinity
///   lse[i] = log sum_j exp S[i,j]      P = exp(S - lse)      o_i = sum_j P[i,j] v_j
/// A query that sees no key has o = 0 and lse = -infinity.
/// Backward, with D_i = do_i . o_i and P recomputed from lse:
///   dv = P^T do     dS = P (do v^T - D)     dq = scale dS k     dk = scale dS^T q
/// where dk and dv are summed over the query heads of a key head. No atomics: results repeat bit for bit.
/// With dropout (Srivastava et al. 2014), m = 0 with probability p, else 1 / (1 - p), for each (b, h, i, j):
///   o_i = sum_j m P[i,j] v_j      dv = (m P)^T do      dS = P (m (do v^T) - D)      lse and D as before
/// m is never stored. It is word e % 4 of Philox call e / 4 (see RandomSource) with
///   e = (((batch_offset + b) hq + h) lq + i) round_up(lk, 4) + j
/// so that a call serves four neighbouring keys for any lk. CPU and CUDA draw the same mask.

/// That a call is the part of a larger attention whose heads, queries and keys are spread over ranks or calls: dropout
/// numbers its elements as there, h + head of `heads` and so on. 0 of them: all are here.
struct AttentionPart {
  int64_t head = 0, heads = 0;
  int64_t query = 0, queries = 0;
  int64_t key = 0, keys = 0;  // key: a multiple of 4 where there is dropout
};
struct AttentionOptions {
  double scale = 0;             // 0: d^(-1/2)
  bool causal = true;           // keys j <= p
  int64_t window = 0;           // causal only: keys p - window < j <= p, so `window` keys with the own one; 0: all
  Tensor alibi_slopes;          // (hq) fp32; like the segments, copied at every call unless on the device of q
  Tensor q_segments;            // (b, lq) int32 document ids: only keys of the same id are seen
  Tensor k_segments;            // (b, lk) int32; undefined with lq == lk: the same as q_segments
  std::optional<int64_t> q_offset;  // default lk - lq, or k_length - lq where k_length is given
  Tensor k_length;              // int32 or int64 on the device, one value or (b): keys from there on are unseen
  DropoutMask dropout;  // of P; its offset counts sequences here (batch_offset above). p = 0: none
  AttentionPart part;
  bool vendor_library = true;   // false: Krait's own kernel even where cuDNN applies (comparisons, tests)
  bool hopper_kernel = true;    // false: not the backward made for Hopper even where it applies (the same)
  int64_t vendor_bytes = int64_t{2} << 30;  // most workspace of its calls at a time; what wants more is cut into several
};

struct AttentionOut  { Tensor o, lse; };
struct AttentionGrad { Tensor dq, dk, dv; };

/// q (b, lq, hq, d), k and v (b, lk, hkv, d): one of fp32, bf16, fp64; hq a multiple of hkv; 1 <= d <= 256.
/// Any strides, without a copy when the last dimension is contiguous (slices of one fused projection).
/// o (b, lq, hq, d) contiguous, like q. lse (b, hq, lq) fp32 (fp64 for fp64), as are all sums.
AttentionOut  attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options = {});
AttentionGrad attention_backward(const Tensor& do_, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o,
                                 const Tensor& lse, const AttentionOptions& options = {});
/// The same into given tensors of any strides with a contiguous last dimension (slices of one fused gradient).
void attention_backward_into(Tensor& dq, Tensor& dk, Tensor& dv, const Tensor& do_, const Tensor& q, const Tensor& k,
                             const Tensor& v, const Tensor& o, const Tensor& lse, const AttentionOptions& options = {});

/// One generation step: q (b, 1, hq, d) against caches (b, lmax, hkv, d) of which the first k_length positions
/// are valid, the newest among them. The length stays on the device, so that a captured step serves every position.
/// For a ring buffer of `window` slots give causal = false and k_length = min(position + 1, window).
Tensor attention_step(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& k_length,
                      const AttentionOptions& options = {});

/// Which kernel serves these tensors, for the lines printed at the start of a run.
std::string attention_kernel_name(const Tensor& q, const Tensor& k, const Tensor& v,
                                  const AttentionOptions& options = {});

/// Press et al. 2022: 2^(-8 (h+1) / n) for a power of two n; otherwise the slopes of the largest power of two
/// m below n, then every second one of those of 2m. (n) fp32, CPU.
Tensor alibi_slopes(int64_t n_heads);

// Options reach the backends complete: scale set, segments both or none (contiguous), k_length int64 (b) or undefined,
// q_offset set unless k_length decides. Last dimensions are contiguous.
KRAIT_BACKENDS(
    void attention_forward(Tensor& o, Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
                           const AttentionOptions& options);
    void attention_backward(Tensor& dq, Tensor& dk, Tensor& dv, const Tensor& do_, const Tensor& q, const Tensor& k,
                            const Tensor& v, const Tensor& o, const Tensor& lse, const AttentionOptions& options);
    void attention_kernel_name(std::string& name, const Tensor& q, const Tensor& k, const Tensor& v,
                               const AttentionOptions& options))

}  // namespace kernels
}  // namespace krait
