#include "kernels/linear.h"

#include "core/memory_probe.h"

namespace krait::kernels {

LinearOut linear_forward(const Tensor& x, const Tensor& w, const Tensor& bias, Epilogue epilogue, bool save_pre) {
  check_same("linear", x, w);
  KRAIT_CHECK(w.ndim() == 2 && x.ndim() >= 1 && x.size(-1) == w.size(1), "linear: x is {}, weight is {} (out, in)",
              x.shape(), w.shape());
  const int64_t out = w.size(0);
  if (bias.defined()) {
    check_same("linear", x, bias);
    KRAIT_CHECK(bias.shape() == Shape{out}, "linear: bias is {}, expected {} to match weight {}", bias.shape(), Shape{out},
                w.shape());
  }
  LinearOut result{empty(x.shape().drop_last().append(out), x.dtype(), x.device()), {}};
  if (save_pre && epilogue != Epilogue::none) result.pre = empty_like(result.y);
  if (result.y.numel() == 0) return result;
  KRAIT_CHECK(w.size(1) > 0, "linear: weight {} has no inputs", w.shape());
  const Tensor rows = blas_ready(x.flatten_leading()), weight = blas_ready(w);
  Tensor y = result.y.flatten_leading(), pre = result.pre.defined() ? result.pre.flatten_leading() : Tensor{};
  const Gemm g = gemm_of(y, rows, weight, false, true);
  const KernelMemory memory(0);
  KRAIT_DISPATCH(x.device(), linear_forward(y, pre, g, bias.defined() ? bias.contiguous() : bias, epilogue));
  return result;
}

LinearGrad linear_backward(const Tensor& dy_in, const Tensor& x, const Tensor& w, const Tensor& pre, Epilogue epilogue,
                           LinearWants wants, const Tensor& dw_sum, const Tensor& db_sum) {
  check_same("linear backward", dy_in, x, w);
  const int64_t out = w.size(0);
  KRAIT_CHECK(dy_in.shape() == x.shape().drop_last().append(out), "linear backward: dy is {}, expected {}",
              dy_in.shape(), x.shape().drop_last().append(out));
  KRAIT_CHECK(epilogue == Epilogue::none || (pre.defined() && pre.shape() == dy_in.shape()),
              "linear backward: the pre-activation is {}, expected {}", describe(pre), dy_in.shape());
  LinearGrad grads;
  if (wants.db) grads.db = db_sum.defined() ? db_sum : empty({out}, w.dtype(), w.device());
  if (wants.dw) grads.dw = dw_sum.defined() ? dw_sum : empty_like(w);
  KRAIT_CHECK(!wants.db || (grads.db.shape() == Shape{out} && grads.db.is_contiguous()),
              "linear backward: the bias gradient buffer is {}", describe(grads.db));

  Tensor dy = dy_in.flatten_leading(), g = dy;
  const bool has_epilogue = epilogue != Epilogue::none;
  if (has_epilogue || wants.db) {
    dy = dy.contiguous();
    Tensor made = has_epilogue ? empty_like(dy) : Tensor{};
    if (dy.numel() > 0)
      KRAIT_DISPATCH(dy.device(), linear_gradient(made, grads.db, dy,
                                                  has_epilogue ? pre.contiguous().flatten_leading() : Tensor{},
                                                  epilogue, db_sum.defined()));
    else if (wants.db && !db_sum.defined())
      zero_(grads.db);
    g = has_epilogue ? made : dy;
  }
  if (wants.dx) grads.dx = matmul(g, w).view(x.shape());
  if (wants.dw) matmul_out(grads.dw, g, x.flatten_leading(), true, false, 1.0, dw_sum.defined() ? 1.0 : 0.0);
  return grads;
}

}  // namespace krait::kernels
