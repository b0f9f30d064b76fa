#pragma once
#include "kernels/mlstm.h"

namespace krait::kernels::cuda {

/// mlstm_step in one kernel; false, with nothing queued, where it does not serve.
bool mlstm_step_cluster(Tensor& h, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& i, const Tensor& f,
                        MlstmState& state, double eps);

}  // namespace krait::kernels::cuda
