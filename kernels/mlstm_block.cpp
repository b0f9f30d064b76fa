#include "kernels/mlstm_block.h"

#include "kernels/norm.h"
#include "kernels/rows.h"

namespace krait::kernels {

namespace {

constexpr int64_t kMaxHead = 1024;  // channels of a head that a warp of mlstm_output keeps

// Elements of a row side by side, and four of them in one load.
Tensor rows_of(const Tensor& t) {
  const Tensor r = dense_rows(t);
  const bool fours = reinterpret_cast<uintptr_t>(r.raw_data()) % static_cast<uintptr_t>(4 * size_of(r.dtype())) == 0;
  return fours && r.stride(0) % 4 == 0 ? r : r.clone();
}
Tensor dense(const Tensor& t) {
  const Tensor c = t.contiguous();
  return reinterpret_cast<uintptr_t>(c.raw_data()) % static_cast<uintptr_t>(4 * size_of(c.dtype())) == 0 ? c : c.clone();
}
// The rows of a result that may be part of a wider one.
Tensor written_rows(const char* name, const Tensor& t, const Tensor& like) {
  check_same(name, t, like);
  const Tensor rows = t.flatten_leading();
  KRAIT_CHECK(t.shape() == like.shape() && rows.storage() == t.storage() &&
                  (t.device().is_cpu() || rows_of(rows).storage() == t.storage()),
              "{}: a gradient goes to {}, expected rows of four aligned elements like {}", name, describe(t), describe(like));
  return rows;
}
MlstmMapsWeights dense(const MlstmMapsWeights& w) { return {dense(w.w_q), dense(w.w_k), dense(w.w_v), dense(w.g)}; }

void check_maps(const Tensor& x_c, const Tensor& x_m, const MlstmMapsWeights& w) {
  const int64_t e = x_c.size(-1);
  check_same("mlstm_maps", x_c, x_m);
  for (const Tensor* t : {&w.w_q, &w.w_k, &w.w_v, &w.g}) check_same("mlstm_maps", x_c, *t);
  KRAIT_CHECK(x_m.shape() == x_c.shape(), "mlstm_maps: x_c is {}, x_m {}", x_c.shape(), x_m.shape());
  for (const Tensor* t : {&w.w_q, &w.w_k, &w.w_v})
    KRAIT_CHECK(t->shape() == (Shape{e / 4, 4, 4}) && e % 4 == 0, "mlstm_maps: a map is {}, x_c {}", t->shape(), x_c.shape());
  KRAIT_CHECK(w.g.ndim() == 2 && w.g.size(1) == 3 * e, "mlstm_maps: the gates' weight is {}, x_c {}", w.g.shape(), x_c.shape());
}

}  // namespace

Tensor mlstm_join(const Tensor& a, const Tensor& b, const Tensor& z) {
  check_same("mlstm_join", a, b);
  check_same("mlstm_join", a, z);
  KRAIT_CHECK(a.ndim() >= 1 && b.shape() == a.shape() && z.shape() == a.shape(), "mlstm_join: gradients of {}, {} and {}",
              a.shape(), b.shape(), z.shape());
  Tensor out = empty(a.shape().with(-1, 2 * a.size(-1)), a.dtype(), a.device());
  if (out.numel() == 0) return out;
  Tensor rows = out.flatten_leading();
  KRAIT_DISPATCH(a.device(), mlstm_join(rows, a.contiguous(), b.contiguous(), z.contiguous()));
  return out;
}

bool mlstm_maps_serve(const Tensor& x_c, const MlstmMapsWeights& w) {
  if (w.w_q.size(1) != 4 || w.w_q.size(2) != 4) return false;
  return x_c.device().is_cpu() || w.g.size(0) == 8;
}

MlstmMaps mlstm_maps_forward(const Tensor& x_c, const Tensor& x_m, const MlstmMapsWeights& w) {
  check_maps(x_c, x_m, w);
  const auto like = [&] { return empty(x_c.shape(), x_c.dtype(), x_c.device()); };
  MlstmMaps out{like(), like(), like(), empty(x_c.shape().with(-1, w.g.size(0)), accum_dtype(x_c.dtype()), x_c.device())};
  if (x_c.numel() == 0) {
    zero_(out.gates);
    return out;
  }
  MlstmMaps rows{out.q.flatten_leading(), out.k.flatten_leading(), out.v.flatten_leading(), out.gates.flatten_leading()};
  KRAIT_DISPATCH(x_c.device(), mlstm_maps_forward(rows, dense(x_c).flatten_leading(), rows_of(x_m), dense(w)));
  return out;
}

bool mlstm_conv_maps_serve(const Tensor& x_m, const Tensor& conv_weight, const MlstmMapsWeights& w) {
  if (x_m.ndim() != 3 || x_m.numel() == 0 || !mlstm_maps_serve(x_m, w) || x_m.size(1) < conv_weight.size(1) - 1) return false;
  if (x_m.device().is_cpu()) return true;
  const Tensor rows = dense_rows(x_m);
  return x_m.dtype() == DType::bf16 && conv_weight.size(1) == 4 && x_m.size(1) >= 16 && x_m.size(2) % 32 == 0 &&
         rows.stride(0) % 8 == 0 && reinterpret_cast<uintptr_t>(rows.raw_data()) % 16 == 0;
}

MlstmConvMaps mlstm_conv_maps_forward(const Tensor& x_m, const Tensor& conv_weight, const Tensor& conv_bias,
                                      const MlstmMapsWeights& w) {
  check_maps(x_m, x_m, w);
  const int64_t e = x_m.size(-1);
  KRAIT_CHECK(conv_weight.ndim() == 2 && conv_weight.size(0) == e && (!conv_bias.defined() || conv_bias.shape() == Shape{e}) &&
                  (!conv_bias.defined() || conv_bias.dtype() == conv_weight.dtype()),
              "mlstm_conv_maps: filters {}, bias {}, x_m {}", conv_weight.shape(),
              conv_bias.defined() ? conv_bias.shape() : Shape{}, x_m.shape());
  const auto like = [&] { return empty(x_m.shape(), x_m.dtype(), x_m.device()); };
  MlstmConvMaps out{like(), {like(), like(), like(), empty(x_m.shape().with(-1, w.g.size(0)), accum_dtype(x_m.dtype()), x_m.device())}};
  MlstmMaps rows{out.maps.q.flatten_leading(), out.maps.k.flatten_leading(), out.maps.v.flatten_leading(),
                 out.maps.gates.flatten_leading()};
  Tensor x_c = out.x_c.flatten_leading();
  KRAIT_DISPATCH(x_m.device(), mlstm_conv_maps_forward(rows, x_c, rows_of(x_m), x_m.size(1), conv_weight.contiguous(),
                                                       conv_bias.defined() ? conv_bias.contiguous() : Tensor(), dense(w)));
  return out;
}

MlstmMapsGrad mlstm_maps_backward(const MlstmMapsUpstream& up, const Tensor& x_c, const Tensor& x_m,
                                  const MlstmMapsWeights& w, const MlstmMapsWeights& into, const Tensor& dx_m_into,
                                  const std::function<void(const Tensor& dx_c)>& between) {
  check_maps(x_c, x_m, w);
  KRAIT_CHECK(!between || dx_m_into.defined(), "mlstm_maps: no gradient of x_m to add to");
  const auto rows = [](const Tensor& t) { return dense(t).flatten_leading(); };
  const auto or_zero = [&](const Tensor& t) { return rows(t.defined() ? t : zeros(x_c.shape(), x_c.dtype(), x_c.device())); };
  const DType a = accum_dtype(x_c.dtype());
  MlstmMapsGrad out{empty(x_c.shape(), x_c.dtype(), x_c.device()),
                    dx_m_into.defined() ? dx_m_into : empty(x_c.shape(), x_c.dtype(), x_c.device()), {}};
  WeightGrad q(w.w_q, x_c.dtype(), into.w_q), k(w.w_k, x_c.dtype(), into.w_k), v(w.w_v, x_c.dtype(), into.w_v),
      g(w.g, x_c.dtype(), into.g);
  if (x_c.numel() > 0) {
    const Tensor dgates = up.dgates.defined() ? up.dgates.to(a) : zeros(x_c.shape().with(-1, w.g.size(0)), a, x_c.device());
    const MlstmMapsUpstream all{or_zero(up.dq), or_zero(up.dk), or_zero(up.dv), rows(dgates),
                                up.dx_more.defined() ? rows(up.dx_more) : Tensor()};
    Tensor dx_c = out.dx_c.flatten_leading(), dx_m = written_rows("mlstm_maps", out.dx_m, x_m);
    const auto then = between ? std::function<void()>([&] { between(out.dx_c); }) : nullptr;
    MlstmMapsWeights dw{q.sum(), k.sum(), v.sum(), g.sum()};
    KRAIT_DISPATCH(x_c.device(), mlstm_maps_backward(dx_c, dx_m, dw, {q.adds(), k.adds(), v.adds(), g.adds()}, all,
                                                     rows(x_c), rows_of(x_m), dense(w), then));
  } else {
    if (between) between(out.dx_c);
    for (WeightGrad* grad : {&q, &k, &v, &g})
      if (!grad->adds()) zero_(grad->sum());
  }
  out.dw = {q.finish(), k.finish(), v.finish(), g.finish()};
  return out;
}

bool mlstm_output_serves(const Tensor& h) {
  return h.device().is_cpu() || (h.size(-1) % 4 == 0 && h.size(-1) <= kMaxHead);
}

namespace {

void check_output(const Tensor& h, const Tensor& w, const Tensor& skip, const Tensor& x_c, const Tensor& z) {
  check_same("mlstm_output", x_c, z);
  check_same("mlstm_output", x_c, skip);
  const DType a = accum_dtype(x_c.dtype());
  KRAIT_CHECK(w.dtype() == a && w.device() == x_c.device(), "mlstm_output: w is {}, x_c {}", describe(w), describe(x_c));
  KRAIT_CHECK(h.ndim() >= 2 && (h.dtype() == a || h.dtype() == x_c.dtype()) && h.device() == x_c.device(),
              "mlstm_output: h is {}, x_c {}", describe(h), describe(x_c));
  const Shape c{h.size(-2) * h.size(-1)};
  KRAIT_CHECK(x_c.shape() == h.shape().drop_last().with(-1, c[0]) && z.shape() == x_c.shape() && w.shape() == c && skip.shape() == c,
              "mlstm_output: h is {}, x_c {}, z {}, w {}, skip {}", h.shape(), x_c.shape(), z.shape(), w.shape(), skip.shape());
}

Tensor of_backend(const Tensor& h) { return dense(h.device().is_cpu() ? h.to(accum_dtype(h.dtype())) : h); }

}  // namespace

MlstmOutput mlstm_output_forward(const Tensor& h, const Tensor& w, const Tensor& skip, const Tensor& x_c,
                                 const Tensor& z, double eps) {
  check_output(h, w, skip, x_c, z);
  const Shape heads = h.shape().drop_last();
  MlstmOutput out{empty(x_c.shape(), x_c.dtype(), x_c.device()), empty(heads, w.dtype(), h.device()),
                  empty(heads, w.dtype(), h.device())};
  if (h.numel() > 0)
    KRAIT_DISPATCH(h.device(), mlstm_output_forward(out, of_backend(h), dense(w), dense(skip), dense(x_c).flatten_leading(),
                                                    rows_of(z), eps));
  return out;
}

MlstmOutputGrad mlstm_output_backward(const Tensor& dy, const Tensor& h, const Tensor& w, const Tensor& skip,
                                      const Tensor& x_c, const Tensor& z, const Tensor& mean, const Tensor& rstd,
                                      double eps, const Tensor& dw_into, const Tensor& dskip_into, const Tensor& dz_into) {
  check_output(h, w, skip, x_c, z);
  KRAIT_CHECK(dy.shape() == x_c.shape(), "mlstm_output: dy is {}, x_c {}", dy.shape(), x_c.shape());
  const auto like = [](const Tensor& t) { return empty(t.shape(), t.dtype(), t.device()); };
  const bool cuda = h.device().is_cuda();
  MlstmOutputGrad out{empty(h.shape(), cuda ? x_c.dtype() : w.dtype(), h.device()), cuda ? like(mean) : Tensor(), {}, {},
                      like(x_c), dz_into.defined() ? dz_into : like(z)};
  WeightGrad dw(w, x_c.dtype(), dw_into), dskip(skip, x_c.dtype(), dskip_into);
  if (h.numel() > 0) {
    MlstmOutputGrad rows{out.dh, out.dots, dw.sum(), dskip.sum(), out.dx_c.flatten_leading(), written_rows("mlstm_output", out.dz, z)};
    KRAIT_DISPATCH(h.device(), mlstm_output_backward(rows, dw.adds(), dskip.adds(), dense(dy).flatten_leading(),
                                                     of_backend(h), dense(w), dense(skip), dense(x_c).flatten_leading(),
                                                     rows_of(z), mean, rstd, eps));
  } else {
    for (WeightGrad* grad : {&dw, &dskip})
      if (!grad->adds()) zero_(grad->sum());
  }
  out.dw = dw.finish();
  out.dskip = dskip.finish();
  return out;
}

}  // namespace krait::kernels
