#include "autograd/activation.h"

#include "kernels/activation.h"

namespace krait::autograd {

namespace {

using kernels::Activation;

Activation gelu_of(GeluForm form) { return form == GeluForm::tanh ? Activation::gelu_tanh : Activation::gelu_erf; }

Variable elementwise(std::string_view name, const Variable& x, Activation f) {
  return record(name, {x}, kernels::activation_forward(x.data(), f), [x = x.data(), f](const Tensor& dy) -> Grads {
    return {kernels::activation_backward(dy, x, f)};
  });
}

Variable gated(std::string_view name, const Variable& gate, const Variable& up, Activation f) {
  return record(name, {gate, up}, kernels::glu_forward(gate.data(), up.data(), f),
                [gate = gate.data(), up = up.data(), f](const Tensor& dy) -> Grads {
                  auto [dgate, dup] = kernels::glu_backward(dy, gate, up, f);
                  return {dgate, dup};
                });
}

Variable gated_packed(std::string_view name, const Variable& x, Activation f, bool gate_last = false) {
  return record(name, {x}, kernels::glu_packed_forward(x.data(), f, gate_last),
                [x = x.data(), f, gate_last](const Tensor& dy) -> Grads {
                  return {kernels::glu_packed_backward(dy, x, f, gate_last)};
                });
}

}  // namespace

Variable silu(const Variable& x) { return elementwise("silu", x, Activation::silu); }
Variable gelu(const Variable& x, GeluForm form) { return elementwise("gelu", x, gelu_of(form)); }
Variable relu2(const Variable& x) { return elementwise("relu2", x, Activation::relu2); }

Variable swiglu(const Variable& gate, const Variable& up) { return gated("swiglu", gate, up, Activation::silu); }
Variable geglu(const Variable& gate, const Variable& up, GeluForm form) {
  return gated("geglu", gate, up, gelu_of(form));
}
Variable swiglu_packed(const Variable& x) { return gated_packed("swiglu_packed", x, Activation::silu); }
Variable geglu_packed(const Variable& x, GeluForm form) { return gated_packed("geglu_packed", x, gelu_of(form)); }
Variable glu(const Variable& x) { return gated_packed("glu", x, Activation::sigmoid, true); }

}  // namespace krait::autograd
