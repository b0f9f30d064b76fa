#pragma once
#include "kernels/ssd.h"

namespace krait {
namespace kernels {

/// y of ssd_forward (kernels/ssd.h) where nobody asks for the final state: the CPU does not compute it. Its backend takes an
/// undefined final_state; that of CUDA writes one on its way.
Tensor ssd_outputs(const SsdInput& in);

}  // namespace kernels
}  // namespace krait
