#include "kernels/ssd_outputs.h"

#include "core/memory_probe.h"
#include "kernels/gpu_memory.h"
#include "kernels/reduce.h"

namespace krait::kernels {

namespace {

void check_input(const SsdInput& in) {
  const Tensor& x = in.x;
  KRAIT_CHECK(x.ndim() == 4 && x.size(2) > 0 && x.size(3) > 0, "ssd: x is {}, expected (b, l, heads, p)", x.shape());
  KRAIT_CHECK(in.chunk >= 1, "ssd: the chunk length is {}, expected at least 1", in.chunk);
  const Shape per_head = x.shape().drop_last();
  const DType sums = accum_dtype(x.dtype());
  const auto check_small = [&](const char* name, const Tensor& t, const Shape& shape) {
    KRAIT_CHECK(t.shape() == shape && t.dtype() == sums && t.device() == x.device(),
                "ssd: {} is {}, expected {} {} to match x {}", name, describe(t), name_of(sums).data(), shape,
                describe(x));
  };
  check_small("a", in.a, per_head);
  if (in.dt.defined()) check_small("dt", in.dt, per_head);
  KRAIT_CHECK(in.B.ndim() == 4 && in.B.size(0) == x.size(0) && in.B.size(1) == x.size(1) && in.B.size(2) > 0 &&
                  in.B.size(3) > 0 && x.size(2) % in.B.size(2) == 0,
              "ssd: B is {}, expected ({}, {}, groups, n) with groups that divide the {} heads", in.B.shape(),
              x.size(0), x.size(1), x.size(2));
  KRAIT_CHECK(in.C.shape() == in.B.shape(), "ssd: C is {}, B is {}; expected the same shape", in.C.shape(),
              in.B.shape());
  check_same("ssd", x, in.B, in.C);
  if (in.D.defined())
    KRAIT_CHECK((in.D.shape() == Shape{x.size(2)} || in.D.shape() == Shape{x.size(2), x.size(3)}) &&
                    in.D.device() == x.device(),
                "ssd: D is {}, expected ({}) or ({}, {})", describe(in.D), x.size(2), x.size(2), x.size(3));
  if (in.initial_state.defined())
    check_small("the initial state", in.initial_state, {x.size(0), x.size(2), x.size(3), in.B.size(3)});
  if (in.segments.defined())
    KRAIT_CHECK(in.segments.shape() == Shape({x.size(0), x.size(1)}) && in.segments.dtype() == DType::i32 &&
                    in.segments.device() == x.device(),
                "ssd: segments are {}, expected int32 ({}, {})", describe(in.segments), x.size(0), x.size(1));
}

Tensor rows_ready(const Tensor& t) { return t.stride(-1) == 1 || t.size(-1) == 1 ? t : t.contiguous(); }

Tensor d_matrix(const Tensor& D, int64_t p, DType sums) {
  if (!D.defined()) return {};
  const Tensor full = D.ndim() == 1 ? D.unsqueeze(1).expand({D.size(0), p}) : D;
  return full.to(sums).contiguous();
}

// As the backends want it.
SsdInput prepared(const SsdInput& in) {
  SsdInput r = in;
  r.x = rows_ready(in.x);
  r.B = rows_ready(in.B);
  r.C = rows_ready(in.C);
  r.a = in.a.contiguous();
  if (in.dt.defined()) r.dt = in.dt.contiguous();
  r.D = d_matrix(in.D, in.x.size(3), accum_dtype(in.x.dtype()));
  if (in.initial_state.defined()) r.initial_state = in.initial_state.contiguous();
  if (in.segments.defined()) r.segments = in.segments.contiguous();
  r.chunk = std::min(in.chunk, std::max<int64_t>(1, in.x.size(1)));
  return r;
}

Shape state_shape(const SsdInput& in) { return {in.x.size(0), in.x.size(2), in.x.size(3), in.B.size(3)}; }

}  // namespace

SsdOut ssd_forward(const SsdInput& in) {
  check_input(in);
  const DType sums = accum_dtype(in.x.dtype());
  SsdOut out{empty(in.x.shape(), in.x.dtype(), in.x.device()), empty(state_shape(in), sums, in.x.device())};
  if (in.x.numel() == 0) {
    if (in.initial_state.defined())
      copy_(out.final_state, in.initial_state);
    else
      zero_(out.final_state);
    return out;
  }
  const SsdInput ready = prepared(in);
  const KernelMemory memory(gpu_memory_of_ssd_forward(ready).workspace);
  KRAIT_DISPATCH(in.x.device(), ssd_forward(out.y, out.final_state, ready));
  return out;
}

Tensor ssd_outputs(const SsdInput& in) {
  if (!in.x.device().is_cpu() || in.x.numel() == 0) return ssd_forward(in).y;
  check_input(in);
  Tensor y = empty(in.x.shape(), in.x.dtype(), in.x.device()), none;
  KRAIT_DISPATCH(in.x.device(), ssd_forward(y, none, prepared(in)));
  return y;
}

void ssd_backward_into(SsdGrad& grad, const Tensor& dy, const Tensor& dfinal, const SsdInput& in) {
  check_input(in);
  check_same("ssd", in.x, dy, grad.dx, grad.dB, grad.dC);
  KRAIT_CHECK(dy.shape() == in.x.shape() && grad.dx.shape() == in.x.shape() && grad.dB.shape() == in.B.shape() &&
                  grad.dC.shape() == in.B.shape(),
              "ssd: gradients are dy {}, dx {}, dB {}, dC {} for x {} and B {}", dy.shape(), grad.dx.shape(),
              grad.dB.shape(), grad.dC.shape(), in.x.shape(), in.B.shape());
  KRAIT_ASSERT(grad.dx.stride(-1) == 1 || grad.dx.size(-1) == 1, "ssd: rows of dx are not contiguous");
  const Device device = in.x.device();
  const DType sums = accum_dtype(in.x.dtype());
  grad.da = empty(in.a.shape(), sums, device);
  if (in.dt.defined()) grad.ddt = empty(in.dt.shape(), sums, device);
  if (in.initial_state.defined()) grad.dinitial_state = empty(state_shape(in), sums, device);
  if (in.D.defined()) grad.dD = empty({in.x.size(2), in.x.size(3)}, sums, device);
  if (in.x.numel() == 0) {
    if (grad.dD.defined()) zero_(grad.dD);
    if (grad.dinitial_state.defined()) {
      if (dfinal.defined())
        copy_(grad.dinitial_state, dfinal);
      else
        zero_(grad.dinitial_state);
    }
  } else {
    const SsdInput ready = prepared(in);
    const KernelMemory memory(gpu_memory_of_ssd_backward(ready).workspace);
    KRAIT_DISPATCH(device, ssd_backward(grad, rows_ready(dy), dfinal.defined() ? dfinal.contiguous() : Tensor(), ready));
  }
  if (!in.D.defined()) return;
  if (in.D.ndim() == 1) grad.dD = sum(grad.dD, {1});
  grad.dD = grad.dD.to(in.D.dtype());
}

SsdGrad ssd_backward(const Tensor& dy, const Tensor& dfinal, const SsdInput& in) {
  SsdGrad grad;
  grad.dx = empty(in.x.shape(), in.x.dtype(), in.x.device());
  grad.dB = empty(in.B.shape(), in.B.dtype(), in.B.device());
  grad.dC = empty(in.C.shape(), in.C.dtype(), in.C.device());
  ssd_backward_into(grad, dy, dfinal, in);
  return grad;
}

SsdSummary ssd_summary(const SsdInput& in) {
  check_input(in);
  SsdSummary out{sum(in.a, {1}), empty(state_shape(in), accum_dtype(in.x.dtype()), in.x.device())};
  if (in.x.numel() == 0) {
    if (in.initial_state.defined())
      copy_(out.state, in.initial_state);
    else
      zero_(out.state);
    return out;
  }
  const SsdInput ready = prepared(in);
  const KernelMemory memory(gpu_memory_of_ssd_states(ready).workspace);
  KRAIT_DISPATCH(in.x.device(), ssd_final_state(out.state, ready));
  return out;
}

Tensor ssd_initial_gradient(const Tensor& dy, const SsdInput& in) {
  check_input(in);
  check_same("ssd", in.x, dy);
  KRAIT_CHECK(dy.shape() == in.x.shape(), "ssd: dy is {} for x {}", dy.shape(), in.x.shape());
  Tensor gradient = empty(state_shape(in), accum_dtype(in.x.dtype()), in.x.device());
  if (in.x.numel() == 0) {
    zero_(gradient);
    return gradient;
  }
  const SsdInput ready = prepared(in);
  const KernelMemory memory(gpu_memory_of_ssd_states(ready).workspace);
  KRAIT_DISPATCH(in.x.device(), ssd_initial_gradient(gradient, rows_ready(dy), ready));
  return gradient;
}

Tensor ssd_step(Tensor& state, const Tensor& x, const Tensor& dt, const Tensor& a, const Tensor& B, const Tensor& C,
                const Tensor& D) {
  KRAIT_CHECK(x.ndim() == 3 && B.ndim() == 3 && C.shape() == B.shape() && B.size(0) == x.size(0) && B.size(1) > 0 &&
                  x.size(1) % B.size(1) == 0,
              "ssd_step: x is {}, B {}, C {}; expected (b, heads, p), (b, g, n), (b, g, n)", x.shape(), B.shape(),
              C.shape());
  check_same("ssd_step", x, B, C);
  const DType sums = accum_dtype(x.dtype());
  const Shape per_head = x.shape().drop_last();
  KRAIT_CHECK(state.shape() == per_head.append(x.size(2)).append(B.size(2)) && state.dtype() == sums &&
                  state.is_contiguous() && state.device() == x.device(),
              "ssd_step: the state is {}, expected contiguous {} ({}, {}, {}, {})", describe(state), name_of(sums).data(),
              x.size(0), x.size(1), x.size(2), B.size(2));
  KRAIT_CHECK(a.shape() == per_head && a.dtype() == sums && (!dt.defined() || (dt.shape() == per_head && dt.dtype() == sums)),
              "ssd_step: a is {}, expected {} {}", describe(a), name_of(sums).data(), per_head);
  Tensor y = empty(x.shape(), x.dtype(), x.device());
  if (x.numel() == 0) return y;
  KRAIT_DISPATCH(x.device(),
                 ssd_step(y, state, x.contiguous(), dt.defined() ? dt.contiguous() : Tensor(), a.contiguous(),
                          B.contiguous(), C.contiguous(), d_matrix(D, x.size(2), sums)));
  return y;
}

std::string ssd_kernel_name(DType dtype, Device device) {
  if (device.is_cpu()) return "chunked scan, own products";
  return dtype == DType::bf16 ? "chunked scan, tensor cores" : "chunked scan, plain cores";
}

}  // namespace krait::kernels
