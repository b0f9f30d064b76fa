#include "autograd/linear.h"

namespace krait::autograd {

namespace {

// A gradient that went straight into the leaf's buffer is reported as undefined.
Tensor unless_summed(const Tensor& gradient, const Tensor& buffer) { return buffer.defined() ? Tensor{} : gradient; }

}  // namespace

Variable linear(const Variable& x, const Variable& w, const Variable& bias, Epilogue epilogue) {
  const bool tape = wants_grad({x, w, bias});
  const auto [y, pre] = kernels::linear_forward(x.data(), w.data(), bias.data(), epilogue, tape);
  const kernels::LinearWants wants{x.requires_grad(), w.requires_grad(), bias.requires_grad()};
  return record("linear", {x, w, bias}, y,
                [x = x.data(), w, weight = w.data(), bias, pre = pre, epilogue, wants](const Tensor& dy) -> Grads {
                  const Tensor dw_sum = w.grad_in_place(), db_sum = bias.grad_in_place();
                  auto [dx, dw, db] =
                      kernels::linear_backward(dy, x, weight, pre, epilogue, wants, dw_sum, db_sum);
                  return {dx, unless_summed(dw, dw_sum), unless_summed(db, db_sum)};
                });
}

Variable matmul(const Variable& a, const Variable& b, bool trans_a, bool trans_b) {
  const Tensor c = kernels::matmul(a.data(), b.data(), trans_a, trans_b);
  return record("matmul", {a, b}, c,
                [a, b, at = a.data(), bt = b.data(), trans_a, trans_b](const Tensor& dc) -> Grads {
                  // d op(a) = dc op(b)^T and d op(b) = op(a)^T dc, transposed back; broadcast dimensions are summed.
                  const auto gradient = [](const Variable& v, const auto& product) {
                    if (!v.requires_grad()) return Tensor{};
                    const Tensor sum = v.grad_in_place();
                    Tensor g = sum.defined() ? sum : empty_like(v.data());
                    product(g, sum.defined() ? 1.0 : 0.0);
                    return unless_summed(g, sum);
                  };
                  return {gradient(a, [&](Tensor& da, double beta) {
                            if (trans_a)
                              kernels::matmul_out(da, bt, dc, trans_b, true, 1.0, beta);
                            else
                              kernels::matmul_out(da, dc, bt, false, !trans_b, 1.0, beta);
                          }),
                          gradient(b, [&](Tensor& db, double beta) {
                            if (trans_b)
                              kernels::matmul_out(db, dc, at, true, trans_a, 1.0, beta);
                            else
                              kernels::matmul_out(db, at, dc, !trans_a, false, 1.0, beta);
                          })};
                });
}

}  // namespace krait::autograd
