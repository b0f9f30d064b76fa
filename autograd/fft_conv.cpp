#include "autograd/fft_conv.h"

#include "kernels/fft_conv.h"

namespace krait::autograd {

Variable fft_conv(const Variable& u, const Variable& K, const Variable& D, const Variable& K1,
                  const Tensor& segments) {
  const Tensor y = kernels::fft_conv_forward(u.data(), K.data(), K1.data(), D.data(), segments);
  Vars inputs{u, K};
  if (D.defined()) inputs.push_back(D);
  if (K1.defined()) inputs.push_back(K1);
  return record("fft_conv", inputs, y,
                [u = u.data(), K = K.data(), D = D.data(), K1 = K1.data(), segments](const Tensor& dy) -> Grads {
                  auto g = kernels::fft_conv_backward(dy, u, K, K1, D, segments);
                  Grads out{g.du, g.dK};
                  if (D.defined()) out.push_back(g.dD);
                  if (K1.defined()) out.push_back(g.dK1);
                  return out;
                });
}

}  // namespace krait::autograd
