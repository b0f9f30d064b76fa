#include "kernels/causal_conv1d.h"

#include "kernels/norm.h"

namespace krait::kernels {

namespace {

// Rows may be apart; the values of a row may not.
Tensor with_rows(const Tensor& t) { return t.size(-1) <= 1 || t.stride(-1) == 1 ? t : t.contiguous(); }

CausalConv1dInputs check_inputs(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& initial,
                                bool silu, const Tensor& segments) {
  KRAIT_CHECK(x.ndim() == 3, "causal_conv1d: x is {}, expected (batch, length, channels)", x.shape());
  KRAIT_CHECK(x.dtype() == DType::f32 || x.dtype() == DType::f64 || x.dtype() == DType::bf16,
              "causal_conv1d: x is {}, expected float32, float64 or bfloat16", x.dtype());
  const int64_t b = x.size(0), l = x.size(1), c = x.size(2);
  const DType a = accum_dtype(x.dtype());
  KRAIT_CHECK(weight.ndim() == 2 && weight.size(0) == c && weight.size(1) >= 1,
              "causal_conv1d: weight is {}, expected ({}, width) to match x {}", weight.shape(), c, x.shape());
  const auto check_parameter = [&](const char* name, const Tensor& t) {
    KRAIT_CHECK(t.device() == x.device() && (t.dtype() == x.dtype() || t.dtype() == a),
                "causal_conv1d: {} is {}, x is {}; expected the same device and dtype, or {}", name, describe(t),
                describe(x), a);
  };
  check_parameter("weight", weight);
  CausalConv1dInputs in;
  in.x = with_rows(x);
  in.weight = weight.to(a).contiguous();
  in.silu = silu;
  if (bias.defined()) {
    KRAIT_CHECK(bias.shape() == Shape{c}, "causal_conv1d: bias is {}, expected ({}) to match x {}", bias.shape(), c,
                x.shape());
    check_parameter("bias", bias);
    in.bias = bias.to(a).contiguous();
  }
  if (initial.defined()) {
    check_same("causal_conv1d", x, initial);
    const Shape expected{b, weight.size(1) - 1, c};
    KRAIT_CHECK(initial.shape() == expected, "causal_conv1d: the initial state is {}, expected {}", initial.shape(),
                expected);
    in.initial = initial.contiguous();
  }
  if (segments.defined()) {
    KRAIT_CHECK((segments.shape() == Shape{b, l}), "causal_conv1d: segments are {}, expected ({}, {})",
                segments.shape(), b, l);
    in.segments = segments.to(x.device()).to(DType::i32).contiguous();
  }
  return in;
}

}  // namespace

CausalConv1dOut causal_conv1d_forward(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& initial,
                                      bool silu, const Tensor& segments) {
  const CausalConv1dInputs in = check_inputs(x, weight, bias, initial, silu, segments);
  CausalConv1dOut out{empty_like(x), empty({x.size(0), weight.size(1) - 1, x.size(2)}, x.dtype(), x.device())};
  if (out.y.numel() == 0) {
    if (initial.defined())
      copy_(out.final_state, initial);
    else
      zero_(out.final_state);
    return out;
  }
  KRAIT_DISPATCH(x.device(), causal_conv1d_forward(out.y, out.final_state, in));
  return out;
}

CausalConv1dGrad causal_conv1d_backward(const Tensor& dy, const Tensor& dfinal, const Tensor& x, const Tensor& weight,
                                        const Tensor& bias, const Tensor& initial, bool silu, const Tensor& segments,
                                        const Tensor& dweight_into, const Tensor& dbias_into, const Tensor& dx_into) {
  const CausalConv1dInputs in = check_inputs(x, weight, bias, initial, silu, segments);
  CausalConv1dGrad out;
  out.dx = dx_into.defined() ? dx_into : empty(x.shape(), x.dtype(), x.device());
  KRAIT_CHECK(out.dx.shape() == x.shape() && out.dx.dtype() == x.dtype() && (out.dx.stride(2) == 1 || out.dx.size(2) == 1),
              "causal_conv1d: dx is {}, expected rows like those of x {}", describe(out.dx), describe(x));
  if (initial.defined()) out.dinitial = empty_like(initial);
  WeightGrad dweight(weight, x.dtype(), dweight_into), dbias(bias, x.dtype(), dbias_into);
  if (out.dx.numel() == 0) {
    if (initial.defined() && dfinal.defined())
      copy_(out.dinitial, dfinal);
    else if (initial.defined())
      zero_(out.dinitial);
    if (!dweight.adds()) zero_(dweight.sum());
    if (bias.defined() && !dbias.adds()) zero_(dbias.sum());
  } else {
    const Tensor upstream = dy.defined() ? with_rows(dy) : zeros(x.shape(), x.dtype(), x.device());
    KRAIT_DISPATCH(x.device(), causal_conv1d_backward(out.dx, out.dinitial, dweight.sum(), dweight.adds(), dbias.sum(),
                                                      dbias.adds(), upstream,
                                                      dfinal.defined() ? dfinal.contiguous() : Tensor(), in));
  }
  out.dweight = dweight.finish();
  out.dbias = dbias.finish();
  return out;
}

Tensor causal_conv1d_step(Tensor& state, const Tensor& x, const Tensor& weight, const Tensor& bias, bool silu) {
  KRAIT_CHECK(x.ndim() == 2, "causal_conv1d_step: x is {}, expected (batch, channels)", x.shape());
  const CausalConv1dOut out = causal_conv1d_forward(x.unsqueeze(1), weight, bias, state, silu);
  copy_(state, out.final_state);
  return out.y.squeeze(1);
}

}  // namespace krait::kernels
