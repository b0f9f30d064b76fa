#include "autograd/dense_ssm_kernel.h"
#include "autograd/s4_scan.h"
#include "autograd/shape.h"
#include "kernels/s4_scan.h"
#include "tests/testing/golden.h"
#include "tests/testing/op_case.h"

using namespace krait;

namespace {

Discretization method_of(const GoldenCase& c) {
  const std::string m = c.text("method");
  return m == "zoh" ? Discretization::zoh : m == "euler" ? Discretization::euler : Discretization::bilinear;
}

void check_scan(const GoldenCase& c, DType dtype, Device device) {
  INFO(c.name() << " " << name_of(dtype));
  const DType a = accum_dtype(dtype);
  const auto leaf = [&](const std::string& path, DType type) {
    return Variable(c.tensor(path).to(type).to(device), true);
  };
  const auto param = [&](const std::string& name) { return leaf("param/" + name, a); };
  const Variable u = leaf("in/u", dtype), x0 = leaf("in/x0", a);
  const Variable log_dt = param("log_dt"), log_A_re = param("log_A_re"), A_im = param("A_im"), B = param("B");
  const Variable C = param("C"), D = param("D");
  const DiscreteSystem system = s4d_discretize(log_dt, log_A_re, A_im, B, method_of(c));
  const auto [y, last] = s4_scan(u, system, C, D, x0);
  backward(Vars{y, last}, {c.tensor("upstream/y").to(dtype).to(device), c.tensor("upstream/x_last").to(a).to(device)});
  c.check("out/y", y.data());
  c.check_within("state/x_last", last.data(), c.tolerance("state/x_last", dtype));
  c.check("grad/in/u", u.grad());
  const auto check_grad_of = [&](const std::string& path, const Variable& v) {
    c.check_within(path, v.grad(), c.tolerance(path, dtype));
  };
  check_grad_of("grad/in/x0", x0);
  check_grad_of("grad/param/log_dt", log_dt);
  check_grad_of("grad/param/log_A_re", log_A_re);
  check_grad_of("grad/param/A_im", A_im);
  check_grad_of("grad/param/B", B);
  check_grad_of("grad/param/C", C);
  check_grad_of("grad/param/D", D);
}

// Dense systems: one channel; its matrices and outputs.
void check_dense(const GoldenCase& c, DType dtype, Device device) {
  INFO(c.name() << " " << name_of(dtype));
  const DType a = accum_dtype(dtype);
  const auto get = [&](const std::string& path, DType type) { return c.tensor(path).to(type).to(device); };
  const auto [A_bar, B_bar] =
      dense_ssm_discretize(Variable(get("param/log_dt", a).view({1})), Variable(get("param/A", a).unsqueeze(0)),
                           Variable(get("param/B", a).unsqueeze(0)), method_of(c));
  const kernels::S4System s{A_bar.data().to(a), B_bar.data().to(a), get("param/C", a).unsqueeze(0),
                            get("param/D", a).view({1}), {}, {}};
  const auto [y, last] =
      kernels::dense_scan_forward(get("in/u", dtype).unsqueeze(-1), s, get("in/x0", a).unsqueeze(1));
  c.check("out/y", y.squeeze(-1));
  c.check_within("state/x_last", last.squeeze(1), c.tolerance("state/x_last", dtype));
  c.check_within("out/A_bar", s.A.squeeze(0), c.tolerance("out/A_bar", dtype));
  c.check_within("out/B_bar", s.B.squeeze(0), c.tolerance("out/B_bar", dtype));
}

void check_all(Device device) {
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
    for_each_golden("s4.h5", "s4d_scan_", [&](const GoldenCase& c) { check_scan(c, dtype, device); });
    for_each_golden("s4.h5", "ssm_dense_", [&](const GoldenCase& c) { check_dense(c, dtype, device); });
  }
}

}  // namespace

TEST_CASE("recurrent S4D and dense systems meet the goldens") { check_all(kCpu); }
TEST_CASE("recurrent S4D and dense systems meet the goldens on cuda", "[cuda]") { check_all(cuda_device()); }
