#include "kernels/mlstm.h"

namespace krait::kernels::cuda {

namespace {
[[noreturn]] void missing() { throw_error("mlstm has no CUDA kernels in this build; set runtime.device: cpu"); }
}  // namespace

void mlstm_forward(MlstmOut&, const MlstmInputs&, const MlstmOptions&) { missing(); }
void mlstm_backward(MlstmGrad&, const MlstmUpstream&, const MlstmInputs&, const MlstmOut&, const MlstmOptions&) {
  missing();
}
void mlstm_step(Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, MlstmState&, double) {
  missing();
}
void mlstm_kernel_name(std::string&, DType, int64_t, int64_t) { missing(); }

}  // namespace krait::kernels::cuda
