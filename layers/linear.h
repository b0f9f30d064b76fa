#pragma once
#include "autograd/collective.h"
#include "autograd/elementwise.h"
#include "autograd/feed_forward.h"
#include "autograd/linear.h"
#include "layers/tensor_split.h"

namespace krait::layers {

/// x W^T + b where each member has a part of the inputs and of W's columns: the products are summed, b is added once.
inline Variable linear_sum(const Variable& x, const Variable& w, const Variable& bias, const comm::GroupPtr& group) {
  if (group->size() == 1) return linear(x, w, bias);
  const Variable y = reduce_from_group(linear(x, w), group);
  return bias.defined() ? y + bias : y;
}

/// How the weight (out, in) of a linear layer is cut over a tensor group (Shoeybi et al. 2019). shard.dim 0: each member
/// makes its part of the outputs from the whole x, whose gradient is summed over the members. shard.dim 1: each member
/// has its part of the inputs, and y is summed. Without ranges: whole on every member.
struct LinearSplit {
  comm::GroupPtr group = comm::single_group("tensor");
  Shard shard = {};
};

/// y = x W^T + b, W (out, in). x (..., in) to (..., out).
class Linear final : public Module {
 public:
  Linear(int64_t in, int64_t out, bool bias, double init_std, const LinearSplit& split = {})
      : group_(split.group), sums_(split.shard.dim == 1 && split.group->size() > 1),
        weight_(parameter("weight", {out, in}, normal(init_std), {}, split.shard)) {
    if (bias)
      bias_ = parameter("bias", {out}, constant(0.0), {.decay = false}, split.shard.dim == 1 ? Shard{} : split.shard);
    if (split.shard.ranges.empty()) group_ = comm::single_group("tensor");
  }
  Variable forward(const Variable& x, Epilogue epilogue = Epilogue::none) const {
    const Variable bias = bias_.defined() ? bias_.variable() : Variable();
    if (!sums_) return linear(copy_to_group(x, group_), weight_, bias, epilogue);
    KRAIT_ASSERT(epilogue == Epilogue::none, "a sum over processes has no epilogue");
    return linear_sum(x, weight_, bias, group_);
  }

  /// forward() of what f(weight, bias) makes of weight and bias: y where they are this layer's only part in it.
  template <class F>
  Variable finish(F f) const {
    const Variable bias = bias_.defined() ? bias_.variable() : Variable();
    if (!sums_) return f(weight_.variable(), bias);
    const Variable y = reduce_from_group(f(weight_.variable(), Variable()), group_);
    return bias.defined() ? y + bias : y;
  }
  /// after.forward(epilogue(forward(x))), as one function.
  Variable forward_through(const Variable& x, Epilogue epilogue, const Linear& after) const {
    KRAIT_ASSERT(!sums_, "a sum over processes has no epilogue");
    return after.finish([&](const Variable& w, const Variable& b) {
      return feed_forward(copy_to_group(x, group_), weight_, bias_.defined() ? bias_.variable() : Variable(), w, b, epilogue);
    });
  }

  /// What it computes in.
  DType dtype() const { return weight_.variable().dtype(); }

 private:
  comm::GroupPtr group_;
  bool sums_;
  Parameter weight_, bias_;
};

}  // namespace krait::layers
