#include "kernels/selective_scan.h"

#include "core/memory_probe.h"
#include "kernels/gpu_memory.h"

namespace krait::kernels {

namespace {

// Rows may be apart; the values of a row may not.
Tensor with_rows(const Tensor& t) {
  return !t.defined() || t.size(-1) <= 1 || t.stride(-1) == 1 ? t : t.contiguous();
}

SelectiveScanInputs check_inputs(const SelectiveScanInputs& in) {
  const Tensor& x = in.x;
  KRAIT_CHECK(x.ndim() == 3, "selective_scan: x is {}, expected (batch, length, channels)", x.shape());
  KRAIT_CHECK(x.dtype() == DType::f32 || x.dtype() == DType::f64 || x.dtype() == DType::bf16,
              "selective_scan: x is {}, expected float32, float64 or bfloat16", x.dtype());
  const int64_t b = x.size(0), l = x.size(1), e = x.size(2);
  KRAIT_CHECK(in.A.ndim() == 2 && in.A.size(0) == e && in.A.size(1) >= 1,
              "selective_scan: A is {}, expected ({}, states) to match x {}", in.A.shape(), e, x.shape());
  const int64_t n = in.A.size(1);
  KRAIT_CHECK(x.device().is_cpu() || n <= 256, "selective_scan: {} states, but the CUDA kernels take up to 256", n);
  const auto check = [&](const char* name, const Tensor& t, const Shape& shape, DType dtype) {
    if (!t.defined()) return;
    KRAIT_CHECK(t.shape() == shape, "selective_scan: {} is {}, expected {} to match x {} and A {}", name, t.shape(),
                shape, x.shape(), in.A.shape());
    KRAIT_CHECK(t.dtype() == dtype && t.device() == x.device(), "selective_scan: {} is {}, expected {} on {}", name,
                describe(t), dtype, x.device());
  };
  const DType a = accum_dtype(x.dtype());
  check("dt", in.dt, {b, l, e}, x.dtype());
  check("B", in.B, {b, l, n}, x.dtype());
  check("C", in.C, {b, l, n}, x.dtype());
  check("z", in.z, {b, l, e}, x.dtype());
  check("A", in.A, {e, n}, a);
  check("D", in.D, {e}, a);
  check("dt_bias", in.dt_bias, {e}, a);
  check("h0", in.h0, {b, e, n}, a);
  if (in.segments.defined())
    KRAIT_CHECK((in.segments.shape() == Shape{b, l}), "selective_scan: segments are {}, expected ({}, {})",
                in.segments.shape(), b, l);
  const auto whole = [](const Tensor& t) { return t.defined() ? t.contiguous() : t; };
  SelectiveScanInputs out;
  out.x = with_rows(x);
  out.dt = with_rows(in.dt);
  out.B = with_rows(in.B);
  out.C = with_rows(in.C);
  out.z = with_rows(in.z);
  out.A = whole(in.A);
  out.D = whole(in.D);
  out.dt_bias = whole(in.dt_bias);
  out.h0 = whole(in.h0);
  if (in.segments.defined()) out.segments = in.segments.to(x.device()).to(DType::i32).contiguous();
  out.softplus = in.softplus;
  return out;
}

}  // namespace

SelectiveScanOut selective_scan_forward(const SelectiveScanInputs& inputs, bool save_states) {
  const SelectiveScanInputs in = check_inputs(inputs);
  const int64_t b = in.x.size(0), l = in.x.size(1), e = in.x.size(2), n = in.A.size(1);
  const DType a = accum_dtype(in.x.dtype());
  SelectiveScanOut out{empty({b, l, e}, in.x.dtype(), in.x.device()), empty({b, e, n}, a, in.x.device()), {}};
  if (out.y.numel() == 0) {
    if (in.h0.defined())
      copy_(out.final_state, in.h0);
    else
      zero_(out.final_state);
    return out;
  }
  const GpuMemory on_gpu = gpu_memory_of_scan_forward(in);
  if (save_states) {
    KRAIT_DISPATCH(in.x.device(), make_scan_states(out.states, in));
    out.states = as_kept(out.states, on_gpu.kept);
  }
  const KernelMemory memory(on_gpu.workspace);
  KRAIT_DISPATCH(in.x.device(), selective_scan_forward(out.y, out.final_state, out.states, in));
  return out;
}

SelectiveScanGrad selective_scan_backward(const Tensor& dy, const Tensor& dfinal, const SelectiveScanInputs& inputs,
                                          const Tensor& states, const SelectiveScanWants& wants) {
  const SelectiveScanInputs in = check_inputs(inputs);
  SelectiveScanGrad grad;
  const auto like = [](const Tensor& t) { return t.defined() ? empty_like(t) : Tensor(); };
  grad = {like(in.x), like(in.dt), like(in.A), like(in.B), like(in.C),
          like(in.D), like(in.z),  like(in.dt_bias), like(in.h0)};
  if (wants.dz.defined() && in.z.defined()) grad.dz = wants.dz;
  if (wants.y) grad.y = empty(in.x.shape(), in.x.dtype(), in.x.device());
  if (in.x.numel() == 0) {
    for (Tensor* t : {&grad.dA, &grad.dB, &grad.dC, &grad.dD, &grad.ddt_bias, &grad.dh0})
      if (t->defined()) zero_(*t);
    if (in.h0.defined() && dfinal.defined()) copy_(grad.dh0, dfinal);
    return grad;
  }
  const Tensor upstream = dy.defined() ? with_rows(dy) : zeros(in.x.shape(), in.x.dtype(), in.x.device());
  const Tensor of_state = dfinal.defined() ? dfinal.contiguous() : dfinal;
  const KernelMemory memory(gpu_memory_of_scan_backward(in).workspace);
  KRAIT_DISPATCH(in.x.device(), selective_scan_backward(grad, upstream, of_state, in, states));
  return grad;
}

SelectiveScanSummary selective_scan_summary(const SelectiveScanInputs& inputs) {
  const SelectiveScanInputs in = check_inputs(inputs);
  const int64_t b = in.x.size(0), e = in.x.size(2), n = in.A.size(1);
  const DType a = accum_dtype(in.x.dtype());
  SelectiveScanSummary out{empty({b, e, n}, a, in.x.device()), empty({b, e}, a, in.x.device())};
  if (in.x.numel() == 0) {
    zero_(out.deltas);
    if (in.h0.defined())
      copy_(out.state, in.h0);
    else
      zero_(out.state);
    return out;
  }
  KRAIT_DISPATCH(in.x.device(), selective_scan_summary(out.state, out.deltas, in));
  return out;
}

Tensor selective_scan_initial_gradient(const Tensor& dy, const SelectiveScanInputs& inputs) {
  const SelectiveScanInputs in = check_inputs(inputs);
  check_same("selective_scan", in.x, dy);
  KRAIT_CHECK(dy.shape() == in.x.shape(), "selective_scan: dy is {} for x {}", dy.shape(), in.x.shape());
  Tensor gradient = empty({in.x.size(0), in.x.size(2), in.A.size(1)}, accum_dtype(in.x.dtype()), in.x.device());
  if (in.x.numel() == 0)
    zero_(gradient);
  else
    KRAIT_DISPATCH(in.x.device(), selective_scan_initial_gradient(gradient, with_rows(dy), in));
  return gradient;
}

Tensor selective_scan_step(Tensor& h, const SelectiveScanInputs& in) {
  KRAIT_CHECK(in.x.ndim() == 2, "selective_scan_step: x is {}, expected (batch, channels)", in.x.shape());
  SelectiveScanInputs one = in;
  for (Tensor* t : {&one.x, &one.dt, &one.B, &one.C, &one.z})
    if (t->defined()) *t = t->unsqueeze(1);
  one.h0 = h;
  const SelectiveScanOut out = selective_scan_forward(one, false);
  copy_(h, out.final_state);
  return out.y.squeeze(1);
}

}  // namespace krait::kernels
