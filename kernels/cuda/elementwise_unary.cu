#include "kernels/cuda/elementwise.cuh"

namespace krait::kernels::cuda {

#define X1(name, expression) KRAIT_DEFINE(name, 1, Kind::value, expression)
KRAIT_UNARY(X1)
KRAIT_SCALAR(X1)
KRAIT_SCALAR2(X1)

}  // namespace krait::kernels::cuda
