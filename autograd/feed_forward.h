#pragma once
#include "autograd/linear.h"

namespace krait {
inline namespace autograd {

/// The two maps of a feed-forward layer with what lies between them, as one function: what is between is applied where
/// the products leave their results (kernels/feed_forward.h).
///   pre = x w_in^T + b_in      h = epilogue(pre)      y = h w_out^T + b_out
/// x (..., d), w_in (f, d), w_out (o, f); b_in (f) and b_out (o) may be undefined.
Variable feed_forward(const Variable& x, const Variable& w_in, const Variable& b_in, const Variable& w_out,
                      const Variable& b_out, Epilogue epilogue);
/// Gated (Shazeer 2020): w_in (2f, d), pre = [gate; up], h = silu(gate) up.
Variable swiglu_feed_forward(const Variable& x, const Variable& w_in, const Variable& b_in, const Variable& w_out,
                             const Variable& b_out);

}  // namespace autograd
}  // namespace krait
