#include "autograd/causal_conv1d.h"

#include "kernels/causal_conv1d.h"

namespace krait::autograd {

ConvOut causal_conv1d(const Variable& x, const Variable& weight, const Variable& bias, const Variable& initial_state,
                      bool silu, const Tensor& segments) {
  auto [y, final_state] = kernels::causal_conv1d_forward(x.data(), weight.data(), bias.data(), initial_state.data(),
                                                         silu, segments);
  const Vars out =
      record("causal_conv1d", {x, weight, bias, initial_state}, {y, final_state},
             [x = x.data(), weight, bias, initial = initial_state.data(), silu,
              segments](const std::vector<Tensor>& d) -> Grads {
               auto grad = kernels::causal_conv1d_backward(d[0], d[1], x, weight.data(), bias.data(), initial, silu,
                                                           segments, weight.grad_in_place(), bias.grad_in_place());
               return {grad.dx, grad.dweight, grad.dbias, grad.dinitial};
             });
  return {out[0], out[1]};
}

}  // namespace krait::autograd
