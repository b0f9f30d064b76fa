#include "autograd/selective_scan.h"

#include "kernels/selective_scan.h"

namespace krait::autograd {

ScanOut selective_scan(const SelectiveScanArguments& in) {
  kernels::SelectiveScanInputs values;
  values.x = in.x.data();
  values.dt = in.dt.data();
  values.A = in.A.data();
  values.B = in.B.data();
  values.C = in.C.data();
  values.D = in.D.data();
  values.z = in.z.data();
  values.dt_bias = in.dt_bias.data();
  values.h0 = in.h0.data();
  values.segments = in.segments;
  values.softplus = in.softplus;
  const Vars inputs{in.x, in.dt, in.A, in.B, in.C, in.D, in.z, in.dt_bias, in.h0};
  const bool differentiable = wants_grad(inputs);
  auto [y, final_state, states] = kernels::selective_scan_forward(values, differentiable);
  const Vars out = record("selective_scan", inputs, {y, final_state},
                          [values, states = states](const std::vector<Tensor>& d) -> Grads {
                            auto g = kernels::selective_scan_backward(d[0], d[1], values, states);
                            return {g.dx, g.ddt, g.dA, g.dB, g.dC, g.dD, g.dz, g.ddt_bias, g.dh0};
                          });
  return {out[0], out[1]};
}

}  // namespace krait::autograd
