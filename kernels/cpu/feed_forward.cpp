#include "kernels/feed_forward.h"

#include "kernels/activation.h"

namespace krait::kernels::cpu {

void gated_units_forward(Tensor& h, Tensor& pre, const Gemm& product, const Tensor& bias) {
  Tensor none;
  linear_forward(pre, none, product, bias, Epilogue::none);
  const int64_t f = h.size(1);
  glu_forward(h, pre.slice(1, 0, f), pre.slice(1, f, 2 * f), Activation::silu);
}

void units_backward(Tensor& dpre, Tensor& db, bool add_db, const Tensor& dy, const Tensor& w, const Tensor& pre,
                    Epilogue epilogue) {
  Tensor dh = empty_like(pre);
  gemm(gemm_of(dh, dy, w, false, false));
  linear_gradient(dpre, db, dh, pre, epilogue, add_db);
}

void gated_units_backward(Tensor& dpre, const Tensor& dy, const Tensor& w, const Tensor& pre) {
  const int64_t f = w.size(1);
  Tensor dh = empty({dy.size(0), f}, dy.dtype(), kCpu);
  gemm(gemm_of(dh, dy, w, false, false));
  Tensor dgate = dpre.slice(1, 0, f), dup = dpre.slice(1, f, 2 * f);
  glu_backward(dgate, dup, dh, pre.slice(1, 0, f), pre.slice(1, f, 2 * f), Activation::silu);
}

}  // namespace krait::kernels::cpu
