#pragma once
#include "core/tensor.h"

// A decoding step is gathered (few_queue.h, rows_queue.h): a linear map waits for what follows it, and its input's memory
// must be held until then. Kernels that no queue launches tell it of their outputs.
namespace krait::kernels::cuda {

void gather_few_known(const Tensor& t);
void gather_rows_known(const Tensor& t);

/// t has been made by a kernel that is launched: a linear map of this thread's step may wait with it as its input.
inline void known_to_step(const Tensor& t) {
  gather_few_known(t);
  gather_rows_known(t);
}

}  // namespace krait::kernels::cuda
