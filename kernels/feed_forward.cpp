#include "kernels/feed_forward.h"

#include "core/memory_probe.h"
#include "kernels/activation.h"

namespace krait::kernels {

namespace {

// dy (..., out) and w (out, f) with pre (..., width).
void check_gradient(const Tensor& dy, const Tensor& w, const Tensor& pre, int64_t width) {
  check_same("feed_forward backward", dy, w, pre);
  KRAIT_CHECK(w.ndim() == 2 && dy.shape() == pre.shape().with(-1, w.size(0)) && pre.size(-1) == width,
              "feed_forward backward: dy is {}, the weight {}, the units' input {}", dy.shape(), w.shape(), pre.shape());
}

// The gradient of what w (out, f) mapped: dy (r, out) w.
Tensor mapped_back(const Tensor& dy, const Tensor& w) {
  Tensor dh = empty({dy.size(0), w.size(1)}, dy.dtype(), dy.device());
  KRAIT_DISPATCH(dy.device(), gemm(gemm_of(dh, dy, w, false, false)));
  return dh;
}

}  // namespace

GatedUnits gated_units_forward(const Tensor& x, const Tensor& w, const Tensor& bias) {
  check_same("gated units", x, w);
  KRAIT_CHECK(w.ndim() == 2 && w.size(0) % 2 == 0 && x.ndim() >= 1 && x.size(-1) == w.size(1) && w.size(1) > 0,
              "gated units: x is {}, weight is {}, expected (2 f, in)", x.shape(), w.shape());
  if (bias.defined()) {
    check_same("gated units", x, bias);
    KRAIT_CHECK(bias.shape() == Shape{w.size(0)}, "gated units: bias is {}, expected {} to match weight {}",
                bias.shape(), Shape{w.size(0)}, w.shape());
  }
  const Shape rows = x.shape().drop_last();
  GatedUnits out{empty(rows.append(w.size(0) / 2), x.dtype(), x.device()),
                 empty(rows.append(w.size(0)), x.dtype(), x.device())};
  if (out.h.numel() == 0) return out;
  const Tensor flat = blas_ready(x.flatten_leading()), weight = blas_ready(w);
  Tensor h = out.h.flatten_leading(), pre = out.pre.flatten_leading();
  const Gemm product = gemm_of(pre, flat, weight, false, true);
  const KernelMemory memory(0);  // on a GPU the product's epilogue does it all, here and below
  bool done = false;
  if (!bias.defined()) KRAIT_DISPATCH_GPU(x.device(), gated_units_forward(done, h, pre, product));
  if (done) return out;
  Tensor none;
  KRAIT_DISPATCH(x.device(), linear_forward(pre, none, product, bias.defined() ? bias.contiguous() : bias, Epilogue::none));
  const int64_t f = h.size(1);
  KRAIT_DISPATCH(x.device(), glu_forward(h, pre.slice(1, 0, f), pre.slice(1, f, 2 * f), Activation::silu));
  return out;
}

UnitsGrad units_backward(const Tensor& dy, const Tensor& w, const Tensor& pre_in, Epilogue epilogue, bool want_db,
                         const Tensor& db_sum) {
  check_gradient(dy, w, pre_in, w.size(-1));
  UnitsGrad out{empty_like(pre_in), {}};
  if (want_db) out.db = db_sum.defined() ? db_sum : empty({w.size(1)}, w.dtype(), w.device());
  KRAIT_CHECK(!want_db || (out.db.shape() == Shape{w.size(1)} && out.db.is_contiguous()),
              "feed_forward backward: the bias gradient buffer is {}", describe(out.db));
  if (dy.numel() == 0 || pre_in.numel() == 0) {
    if (want_db && !db_sum.defined()) zero_(out.db);
    return out;
  }
  Tensor dpre = out.dpre.flatten_leading();
  const Tensor up = dy.contiguous().flatten_leading(), weight = blas_ready(w), pre = pre_in.contiguous().flatten_leading();
  const KernelMemory memory(0);
  bool done = false;
  KRAIT_DISPATCH_GPU(dy.device(), units_backward(done, dpre, out.db, db_sum.defined(), up, weight, pre, epilogue));
  if (!done)
    KRAIT_DISPATCH(dy.device(), linear_gradient(dpre, out.db, mapped_back(up, weight), pre, epilogue, db_sum.defined()));
  return out;
}

Tensor gated_units_backward(const Tensor& dy, const Tensor& w, const Tensor& pre_in) {
  check_gradient(dy, w, pre_in, 2 * w.size(-1));
  const Tensor out = empty_like(pre_in);
  if (dy.numel() == 0 || pre_in.numel() == 0) return out;
  Tensor dpre = out.flatten_leading();
  const Tensor up = dy.contiguous().flatten_leading(), weight = blas_ready(w), pre = pre_in.contiguous().flatten_leading();
  const KernelMemory memory(0);
  bool done = false;
  KRAIT_DISPATCH_GPU(dy.device(), gated_units_backward(done, dpre, up, weight, pre));
  if (done) return out;
  const int64_t f = w.size(1);
  Tensor dgate = dpre.slice(1, 0, f), dup = dpre.slice(1, f, 2 * f);
  KRAIT_DISPATCH(dy.device(), glu_backward(dgate, dup, mapped_back(up, weight), pre.slice(1, 0, f), pre.slice(1, f, 2 * f),
                                           Activation::silu));
  return out;
}

}  // namespace krait::kernels
