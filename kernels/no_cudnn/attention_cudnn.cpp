// A build without cuDNN: Krait's own kernels serve everything.
#include "kernels/cuda/attention_own.h"

namespace krait::kernels::cuda {

bool attention_cudnn_supported(const Tensor&, const Tensor&, const Tensor&, const AttentionOptions&) { return false; }
bool attention_cudnn_backward_supported(const Tensor&, const Tensor&, const Tensor&, const AttentionOptions&) {
  return false;
}
bool attention_forward_cudnn(Tensor&, Tensor&, const Tensor&, const Tensor&, const Tensor&, const AttentionOptions&) {
  return false;
}
bool attention_backward_cudnn(Tensor&, Tensor&, Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                              const Tensor&, const Tensor&, const AttentionOptions&) {
  return false;
}
std::string attention_cudnn_version() { return "no cuDNN"; }

}  // namespace krait::kernels::cuda
