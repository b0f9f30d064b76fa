#include "kernels/mlstm.h"

#include "core/memory_probe.h"
#include "kernels/elementwise.h"
#include "kernels/gpu_memory.h"
#include "kernels/reduce.h"
#include "kernels/rows.h"

namespace krait::kernels {

namespace {

constexpr double kEmpty = -1e30;  // m of the empty state: below any gate, and finite

void check_state(const MlstmState& s, const Shape& c, const Tensor& q) {
  if (!s.c.defined() && !s.n.defined() && !s.m.defined()) return;
  KRAIT_CHECK(s.c.defined() && s.n.defined() && s.m.defined(), "mlstm: a state has all of c, n and m, or none");
  const DType a = accum_dtype(q.dtype());
  for (const Tensor* t : {&s.c, &s.n, &s.m})
    KRAIT_CHECK(t->dtype() == a && t->device() == q.device(), "mlstm: the state is {}, expected {} on {}",
                describe(*t), name_of(a), q.device());
  KRAIT_CHECK(s.c.shape() == c && s.n.shape() == c.drop_last() && s.m.shape() == c.drop_last().drop_last(),
              "mlstm: the state is {}, {}, {}; expected c {}, n without its last dimension, m without its last two",
              s.c.shape(), s.n.shape(), s.m.shape(), c);
}

Shape state_shape(const MlstmInputs& in) { return {in.q.size(0), in.q.size(2), in.q.size(3), in.v.size(3)}; }

// Checks once, and lays everything out as the backends want it.
MlstmInputs complete(const MlstmInputs& in, const MlstmOptions& options) {
  check_same("mlstm", in.q, in.k, in.v);
  KRAIT_CHECK(in.q.ndim() == 4 && in.v.ndim() == 4 && in.q.shape() == in.k.shape() &&
                  in.q.shape().drop_last() == in.v.shape().drop_last(),
              "mlstm: q {}, k {}, v {}; expected (b, l, heads, dq) twice and (b, l, heads, dv)", in.q.shape(),
              in.k.shape(), in.v.shape());
  KRAIT_CHECK(in.q.size(3) >= 1 && in.v.size(3) >= 1, "mlstm: heads of {} and {} channels", in.q.size(3), in.v.size(3));
  const DType a = accum_dtype(in.q.dtype());
  for (const Tensor* gate : {&in.i, &in.f})
    KRAIT_CHECK(gate->shape() == in.q.shape().drop_last() && gate->dtype() == a && gate->device() == in.q.device(),
                "mlstm: a gate is {}, expected {} {} on {}", describe(*gate), name_of(a), in.q.shape().drop_last(),
                in.q.device());
  KRAIT_CHECK(options.chunk >= 1 && options.chunk <= 1024, "mlstm: chunks of {} positions, expected 1 to 1024",
              options.chunk);
  KRAIT_CHECK(options.eps >= 0, "mlstm: eps is {}, expected at least 0", options.eps);
  check_state(in.initial, state_shape(in), in.q);
  MlstmInputs whole{last_contiguous(in.q), last_contiguous(in.k), last_contiguous(in.v), in.i.contiguous(),
                    in.f.contiguous(), in.initial, in.segments};
  if (in.initial.c.defined())
    whole.initial = {in.initial.c.contiguous(), in.initial.n.contiguous(), in.initial.m.contiguous()};
  if (in.segments.defined()) {
    const Shape rows{in.q.size(0), in.q.size(1)};
    KRAIT_CHECK(in.segments.shape() == rows, "mlstm: segments are {}, expected {}", in.segments.shape(), rows);
    whole.segments = in.segments.to(in.q.device()).to(DType::i32).contiguous();
  }
  return whole;
}

MlstmOut with_wide_h(MlstmOut out) {
  out.h = out.h.to(accum_dtype(out.h.dtype()));
  return out;
}

}  // namespace

MlstmOut mlstm_forward(const MlstmInputs& in, const MlstmOptions& options) {
  const MlstmInputs whole = complete(in, options);
  const DType a = accum_dtype(in.q.dtype());
  const Device device = in.q.device();
  const Shape c = state_shape(in), rows{c[0], c[1], in.q.size(1)};
  const bool rounds = options.round_h && in.q.size(3) % 192 == 0 && in.v.size(3) % 192 == 0;
  MlstmOut out;
  out.h = empty(in.v.shape(), rounds && device.is_cuda() ? in.q.dtype() : a, device);
  out.m = empty(rows, a, device);
  out.r = empty(rows, a, device);
  if (out.h.numel() == 0) {
    out.last = in.initial.c.defined() ? in.initial
                                      : MlstmState{zeros(c, a, device), zeros(c.drop_last(), a, device),
                                                   zeros(c.drop_last().drop_last(), a, device)};
    return out;
  }
  out.last = {empty(c, a, device), empty(c.drop_last(), a, device), empty(c.drop_last().drop_last(), a, device)};
  const GpuMemory on_gpu = gpu_memory_of_mlstm_forward(whole, options);
  {
    const KernelMemory memory(on_gpu.workspace + on_gpu.kept);
    KRAIT_DISPATCH(device, mlstm_forward(out, whole, options));
  }
  if (rounds) out.h = out.h.to(in.q.dtype());
  if (options.keep_states) out.states = as_kept(out.states, on_gpu.kept);
  return out;
}

MlstmGrad mlstm_backward(const MlstmUpstream& up, const MlstmInputs& in, const MlstmOut& made,
                         const MlstmOptions& options) {
  const MlstmInputs whole = complete(in, options);
  const MlstmOut out = up.dots.defined() ? made : with_wide_h(made);
  const Shape c = state_shape(in);
  MlstmUpstream upstream = up;
  if (!up.dh.defined()) upstream.dh = zeros_like(out.h);
  if (!up.dots.defined()) check_same("mlstm_backward", upstream.dh, out.h);
  if (up.dots.defined()) {
    KRAIT_CHECK(up.dots.shape() == out.h.shape().drop_last() && up.dots.dtype() == accum_dtype(out.h.dtype()),
                "mlstm_backward: dots are {}, h is {}", describe(up.dots), describe(out.h));
    upstream.dots = up.dots.contiguous();
  }
  KRAIT_CHECK(upstream.dh.shape() == out.h.shape(), "mlstm_backward: dh is {}, expected {}", upstream.dh.shape(),
              out.h.shape());
  upstream.dh = upstream.dh.contiguous();
  if (up.dc_last.defined()) {
    KRAIT_CHECK(up.dc_last.shape() == c, "mlstm_backward: dc_last is {}, expected {}", up.dc_last.shape(), c);
    upstream.dc_last = up.dc_last.contiguous();
  }
  if (up.dn_last.defined()) {
    KRAIT_CHECK(up.dn_last.shape() == c.drop_last(), "mlstm_backward: dn_last is {}, expected {}", up.dn_last.shape(),
                c.drop_last());
    upstream.dn_last = up.dn_last.contiguous();
  }
  const auto like = [](const Tensor& t) { return empty(t.shape(), t.dtype(), t.device()); };
  MlstmGrad grad{like(in.q), like(in.k), like(in.v), like(in.i), like(in.f), {}, {}};
  if (in.initial.c.defined()) {
    grad.dc0 = like(in.initial.c);
    grad.dn0 = like(in.initial.n);
  }
  if (out.h.numel() == 0) {
    if (grad.dc0.defined()) {
      zero_(grad.dc0);
      zero_(grad.dn0);
      if (up.dc_last.defined()) copy_(grad.dc0, up.dc_last);
      if (up.dn_last.defined()) copy_(grad.dn0, up.dn_last);
    }
    return grad;
  }
  const KernelMemory memory(gpu_memory_of_mlstm_backward(whole, upstream, out.states.defined()).workspace);
  KRAIT_DISPATCH(in.q.device(), mlstm_backward(grad, upstream, whole, out, options));
  return grad;
}

MlstmSummary mlstm_summary(const MlstmInputs& in, const MlstmOptions& options) {
  MlstmInputs whole = complete({in.q, in.k, in.v, in.i, in.f, {}, in.segments}, options);
  const DType a = accum_dtype(in.q.dtype());
  const Device device = in.q.device();
  const Shape c = state_shape(in), n = c.drop_last(), m = n.drop_last();
  MlstmSummary out{{zeros(c, a, device), zeros(n, a, device), full(m, kEmpty, a, device)},
                   sum(logsigmoid(whole.f), {1})};
  if (in.v.numel() == 0) return out;
  whole.initial.m = out.own.m.clone();
  KRAIT_DISPATCH(device, mlstm_last_state(out.own, whole, options));
  return out;
}

MlstmInitialGradient mlstm_initial_gradient(const Tensor& dh, const MlstmInputs& in, const MlstmOut& made,
                                            const MlstmOptions& options, const Tensor& dots) {
  const MlstmOut out = dots.defined() ? made : with_wide_h(made);
  const MlstmInputs whole = complete(in, options);
  if (!dots.defined()) check_same("mlstm_initial_gradient", dh, out.h);
  KRAIT_CHECK(dh.shape() == out.h.shape(), "mlstm_initial_gradient: dh is {}, expected {}", dh.shape(), out.h.shape());
  const DType a = accum_dtype(in.q.dtype());
  const Shape c = state_shape(in);
  MlstmInitialGradient grad{zeros(c, a, dh.device()), zeros(c.drop_last(), a, dh.device())};
  if (dh.numel() == 0) return grad;
  KRAIT_DISPATCH(dh.device(), mlstm_initial_gradient(grad, dh.contiguous(), whole, out, options, dots));
  return grad;
}

Tensor mlstm_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& i, const Tensor& f,
                  MlstmState& state, double eps) {
  check_same("mlstm_step", q, k, v);
  KRAIT_CHECK(q.ndim() == 3 && v.ndim() == 3 && q.shape() == k.shape() && q.shape().drop_last() == v.shape().drop_last(),
              "mlstm_step: q {}, k {}, v {}; expected (b, heads, dq) twice and (b, heads, dv)", q.shape(), k.shape(),
              v.shape());
  for (const Tensor* gate : {&i, &f})
    KRAIT_CHECK(gate->shape() == q.shape().drop_last() && gate->dtype() == accum_dtype(q.dtype()),
                "mlstm_step: a gate is {}, expected {} {}", describe(*gate), name_of(accum_dtype(q.dtype())),
                q.shape().drop_last());
  KRAIT_CHECK(state.c.defined(), "mlstm_step: no state");
  check_state(state, {q.size(0), q.size(1), q.size(2), v.size(2)}, q);
  KRAIT_CHECK(state.c.is_contiguous() && state.n.is_contiguous() && state.m.is_contiguous(),
              "mlstm_step: the state is not contiguous");
  Tensor h = empty(v.shape(), accum_dtype(v.dtype()), v.device());
  if (h.numel() == 0) return h;
  KRAIT_DISPATCH(q.device(), mlstm_step(h, q.contiguous(), k.contiguous(), v.contiguous(), i.contiguous(),
                                        f.contiguous(), state, eps));
  return h;
}

std::string mlstm_kernel_name(DType dtype, Device device, int64_t dq, int64_t dv) {
  std::string name;
  KRAIT_DISPATCH(device, mlstm_kernel_name(name, dtype, dq, dv));
  return name;
}

}  // namespace krait::kernels
