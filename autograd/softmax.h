#pragma once
#include "autograd/variable.h"

namespace krait {
inline namespace autograd {

/// Over the last dimension; see kernels/softmax.h.
Variable softmax(const Variable& x);
Variable log_softmax(const Variable& x);

}  // namespace autograd
}  // namespace krait
