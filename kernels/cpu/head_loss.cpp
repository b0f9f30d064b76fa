#include "kernels/head_loss.h"

namespace krait::kernels::cpu {

void head_loss(bool& done, Tensor&, Tensor&, Tensor&, Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
               int64_t, int64_t, double, const CrossEntropyOptions&) {
  done = false;
}

}  // namespace krait::kernels::cpu
