#pragma once
#include "autograd/linear.h"
#include "layers/module.h"

namespace krait::layers {

/// y = x W^T + b, W (out, in). x (..., in) to (..., out).
class Linear final : public Module {
 public:
  Linear(int64_t in, int64_t out, bool bias, double init_std)
      : weight_(parameter("weight", {out, in}, normal(init_std))) {
    if (bias) bias_ = parameter("bias", {out}, constant(0.0), {.decay = false});
  }
  Variable forward(const Variable& x, Epilogue epilogue = Epilogue::none) const {
    return linear(x, weight_, bias_.defined() ? bias_.variable() : Variable(), epilogue);
  }

  /// What it computes in.
  DType dtype() const { return weight_.variable().dtype(); }

 private:
  Parameter weight_, bias_;
};

}  // namespace krait::layers
