// Operations of two and three inputs; those of one are in elementwise_unary.cu, so that both compile at once.
#include "kernels/cuda/elementwise.cuh"

namespace krait::kernels::cuda {

#define X2(name, expression) KRAIT_DEFINE(name, 2, Kind::value, expression)
#define X3(name, expression) KRAIT_DEFINE(name, 3, Kind::value, expression)
KRAIT_BINARY(X2)
KRAIT_BINARY_SCALAR(X2)
KRAIT_BINARY_SCALAR2(X2)
KRAIT_TERNARY(X3)
#define X4(name, expression) KRAIT_DEFINE(name, 2, Kind::comparison, expression)
KRAIT_COMPARISON(X4)
KRAIT_DEFINE(where, 3, Kind::where, a != A(0) ? b : c)

}  // namespace krait::kernels::cuda
