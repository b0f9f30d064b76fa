#include "kernels/mlstm_step.h"

namespace krait::kernels::cpu {

void mlstm_step_maps(bool& done, MlstmStepMaps&, Tensor&, const Tensor&, const MlstmStepMapsWeights&) { done = false; }

void mlstm_step_output(bool& done, Tensor&, MlstmState&, const MlstmStepMaps&, const Tensor&, const MlstmStepOutputWeights&) {
  done = false;
}

}  // namespace krait::kernels::cpu
