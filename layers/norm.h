#pragma once
#include <string>

#include "autograd/collective.h"
#include "autograd/layer_norm.h"
#include "autograd/rms_norm.h"
#include "layers/module.h"

namespace krait::layers {

struct NormConfig {
  std::string type = "rms";  // rms (Zhang & Sennrich 2019) | layer (Ba et al. 2016) | layer_1p: layer without bias,
                             // its weight stored as w and applied as 1 + w (xLSTM)
  double eps = 1e-5;
};

/// Normalisation over the last dimension; the weights stay fp32 in every precision and are not decayed.
class Norm final : public Module {
 public:
  /// `shared`: members that use the same weights, each for heads of its own.
  Norm(int64_t d_model, const NormConfig& config, comm::GroupPtr shared = comm::single_group("tensor"));
  Variable forward(const Variable& x) const;
  /// residual + x, and its norm, in one pass.
  AddNorm forward_add(const Variable& x, const Variable& residual) const;

 private:
  Variable weight() const;
  Variable bias() const { return bias_.defined() ? copy_to_group(bias_, shared_) : Variable(); }
  NormConfig config_;
  comm::GroupPtr shared_;
  Parameter weight_, bias_;
};

}  // namespace krait::layers
