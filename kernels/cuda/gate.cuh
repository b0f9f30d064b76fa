#pragma once

namespace krait::kernels::cuda {

template <class A>
struct Gate {
  A s, slope;  // silu(z) and its derivative
  __device__ explicit Gate(A z) {
    const A c = z < A(-80) ? A(-80) : z, sigmoid = A(1) / (A(1) + exp(-c));
    s = c * sigmoid;
    slope = sigmoid * (A(1) + c * (A(1) - sigmoid));
  }
};

}  // namespace krait::kernels::cuda
