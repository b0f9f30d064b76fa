#include "kernels/ssd_time_step.h"

#include "kernels/rows.h"

namespace krait::kernels {

namespace {

void check(const Tensor& dt, const Tensor& bias, const Tensor& A_log) {
  KRAIT_CHECK(dt.ndim() >= 1 && dt.size(-1) > 0, "ssd_time_step: dt is {}, expected (..., heads)", dt.shape());
  for (const Tensor& t : {bias, A_log})
    KRAIT_CHECK(t.shape() == Shape{dt.size(-1)} && t.device() == dt.device(),
                "ssd_time_step: dt_bias and A_log are {} and {}, expected ({}) for dt {}", describe(bias),
                describe(A_log), dt.size(-1), describe(dt));
}

}  // namespace

SsdTimeStepOut ssd_time_step_forward(const Tensor& dt, const Tensor& bias, const Tensor& A_log, double low, double high) {
  check(dt, bias, A_log);
  const DType sums = accum_dtype(dt.dtype());
  SsdTimeStepOut out{empty(dt.shape(), sums, dt.device()), empty(dt.shape(), sums, dt.device())};
  if (dt.numel() == 0) return out;
  KRAIT_DISPATCH(dt.device(), ssd_time_step_forward(out.dt, out.a, dense_rows(dt), bias.to(sums).contiguous(),
                                                    A_log.to(sums).contiguous(), low, high));
  return out;
}

SsdTimeStepGrad ssd_time_step_backward(const Tensor& dstep, const Tensor& da, const Tensor& dt, const Tensor& bias,
                                       const Tensor& A_log, double low, double high, const Tensor& ddt_into) {
  check(dt, bias, A_log);
  const DType sums = accum_dtype(dt.dtype());
  SsdTimeStepGrad out{ddt_into.defined() ? ddt_into : empty(dt.shape(), dt.dtype(), dt.device()),
                      empty(bias.shape(), sums, dt.device()), empty(bias.shape(), sums, dt.device())};
  if (dt.numel() == 0) {
    zero_(out.dbias);
    zero_(out.dA_log);
    return out;
  }
  const Tensor rows = dense_rows(dt);
  KRAIT_CHECK(out.ddt.shape() == dt.shape() && out.ddt.dtype() == dt.dtype() && out.ddt.can_view(rows.shape()) &&
                  (out.ddt.stride(-1) == 1 || out.ddt.size(-1) == 1),
              "ssd_time_step: ddt is {}, expected rows like those of dt {}", describe(out.ddt), describe(dt));
  Tensor ddt = out.ddt.view(rows.shape());
  const auto whole = [](const Tensor& t) { return t.defined() ? t.contiguous() : t; };
  KRAIT_DISPATCH(dt.device(), ssd_time_step_backward(ddt, out.dbias, out.dA_log, whole(dstep), whole(da), rows,
                                                     bias.to(sums).contiguous(), A_log.to(sums).contiguous(), low, high));
  return out;
}

}  // namespace krait::kernels
