#include "kernels/mamba_step.h"

#include "kernels/causal_conv1d.h"
#include "kernels/elementwise.h"
#include "kernels/linear.h"
#include "kernels/selective_scan.h"

namespace krait::kernels::cpu {

void mamba_step(Tensor& y, Tensor& conv, Tensor& h, const Tensor& xz, const MambaStepWeights& w) {
  const int64_t e = w.A_log.size(0), n = w.A_log.size(1), r = w.dt_proj.size(1);
  const auto product = [](const Tensor& x, const Tensor& weight) {
    return kernels::linear_forward(x, weight, {}, Epilogue::none, false).y;
  };
  SelectiveScanInputs in;
  in.x = causal_conv1d_step(conv, xz.slice(1, 0, e), w.conv_weight, w.conv_bias, true);
  const Tensor dbc = product(in.x, w.x_proj);
  in.dt = product(dbc.slice(1, 0, r), w.dt_proj);
  in.A = kernels::neg(kernels::exp(w.A_log));
  in.B = dbc.slice(1, r, r + n);
  in.C = dbc.slice(1, r + n, r + 2 * n);
  in.D = w.D;
  in.z = xz.slice(1, e, 2 * e);
  in.dt_bias = w.dt_bias;
  copy_(y, selective_scan_step(h, in));
}

}  // namespace krait::kernels::cpu
