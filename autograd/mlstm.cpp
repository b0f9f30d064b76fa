#include "autograd/mlstm.h"

namespace krait::autograd {

MlstmResult mlstm(const Variable& q, const Variable& k, const Variable& v, const Variable& i, const Variable& f,
                  const MlstmMemory& initial, const Tensor& segments, const MlstmOptions& options) {
  const kernels::MlstmInputs in{q.data(), k.data(), v.data(), i.data(), f.data(),
                                {initial.c.data(), initial.n.data(), initial.m}, segments};
  const kernels::MlstmOut out = kernels::mlstm_forward(in, options);
  const Vars y = record("mlstm", {q, k, v, i, f, initial.c, initial.n}, {out.h, out.last.c, out.last.n},
                        [in, out, options](const std::vector<Tensor>& d) -> Grads {
                          auto grad = kernels::mlstm_backward({d[0], d[1], d[2]}, in, out, options);
                          return {grad.dq, grad.dk, grad.dv, grad.di, grad.df, grad.dc0, grad.dn0};
                        });
  return {y[0], {y[1], y[2], out.last.m}};
}

}  // namespace krait::autograd
