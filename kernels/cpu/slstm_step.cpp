#include "kernels/slstm_step.h"

namespace krait::kernels::cpu {

void slstm_step(bool& done, Tensor&, Tensor&, Tensor&, const Tensor&, const SlstmStepWeights&) { done = false; }

}  // namespace krait::kernels::cpu
