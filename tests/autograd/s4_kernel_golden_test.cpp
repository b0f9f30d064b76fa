#include "autograd/s4_kernel.h"

#include <cmath>

#include "autograd/elementwise.h"
#include "autograd/linear.h"
#include "autograd/reduce.h"
#include "autograd/shape.h"
#include "kernels/s4_kernel.h"
#include "tests/testing/golden.h"
#include "tests/testing/op_case.h"

using namespace krait;

namespace {

constexpr DType kDTypes[] = {DType::f64, DType::f32};

Variable leaf(const GoldenCase& c, const std::string& name, DType dtype, Device device) {
  return Variable(c.tensor("param/" + name).to(dtype).to(device), true);
}

void check_gradients(const GoldenCase& c, const std::vector<std::pair<std::string, Variable>>& parameters) {
  for (const auto& [name, v] : parameters) {
    const std::string path = "grad/param/" + name;
    // A gradient that is zero mathematically has a large tol_f32; in fp64 its rounding counts in the same measure.
    const double exact = std::max(1e-10, 1e-9 * c.tolerance(path, f32));
    c.check_within(path, v.grad().cpu(), v.dtype() == f64 ? exact : c.tolerance(path, v.dtype()));
  }
}

void check_s4d(const GoldenCase& c, Device device) {
  const auto method = c.text("method") == "zoh" ? Discretization::zoh : Discretization::bilinear;
  for (const DType dtype : kDTypes) {
    const Variable log_dt = leaf(c, "log_dt", dtype, device), re = leaf(c, "log_A_re", dtype, device);
    const Variable im = leaf(c, "A_im", dtype, device), B = leaf(c, "B", dtype, device), C = leaf(c, "C", dtype, device);
    const Variable K = s4d_kernel(log_dt, re, im, B, C, c.tensor("out/K").size(1), method);
    backward(K, c.tensor("upstream/K").to(dtype).to(device));
    c.check("out/K", K.data().cpu());
    check_gradients(c, {{"log_dt", log_dt}, {"log_A_re", re}, {"A_im", im}, {"B", B}, {"C", C}});
  }
}

void check_s4(const GoldenCase& c, Device device) {
  for (const DType dtype : kDTypes) {
    const Variable log_dt = leaf(c, "log_dt", dtype, device), re = leaf(c, "log_A_re", dtype, device);
    const Variable im = leaf(c, "A_im", dtype, device), P = leaf(c, "P", dtype, device);
    const Variable B = leaf(c, "B", dtype, device), C = leaf(c, "C_tilde", dtype, device);
    const Variable K = s4_kernel(log_dt, re, im, P, B, C, c.tensor("out/K").size(1));
    backward(K, c.tensor("upstream/K").to(dtype).to(device));
    c.check("out/K", K.data().cpu());
    check_gradients(c, {{"log_dt", log_dt}, {"log_A_re", re}, {"A_im", im}, {"P", P}, {"B", B}, {"C_tilde", C}});
  }
}

// The parameter C: C_tilde comes from it and gives back both C and the kernel.
void check_true_c(const GoldenCase& c, Device device) {
  for (const DType dtype : kDTypes) {
    const auto get = [&](const char* name) { return c.tensor(std::string("param/") + name).to(dtype).to(device); };
    const int64_t length = c.tensor("out/K").size(1);
    kernels::S4Parameters p{get("log_dt"), get("log_A_re"), get("A_im"), get("P"), get("B"), get("C")};
    p.C_tilde = kernels::s4_c_to_tilde(p, length);
    c.check("out/C_tilde", p.C_tilde.cpu());
    c.check("out/K", kernels::s4_kernel_forward(p, length).cpu());
    c.check_within("param/C", kernels::s4_tilde_to_c(p, length).cpu(), dtype == f64 ? 1e-9 : 1e-3);
  }
}

// The gradients for the parameter C, through the dense real form of the same system: an independent route.
void check_true_c_gradients(const GoldenCase& c, Device device) {
  const auto get = [&](const char* name) { return c.tensor(std::string("param/") + name); };
  const Tensor re = get("log_A_re"), im = get("A_im"), P = get("P"), B = get("B"), C = get("C");
  const int64_t h = re.size(0), n = re.size(1), N = 2 * n;
  Tensor A = zeros({h, N, N}, f64, kCpu), b = zeros({h, N}, f64, kCpu), row = zeros({h, N}, f64, kCpu);
  const auto part = [&](const Tensor& t, int64_t i, int64_t k) { return t.data<double>()[(i * n + k % n) * 2 + k / n]; };
  for (int64_t i = 0; i < h; ++i)
    for (int64_t k = 0; k < N; ++k) {
      const double lambda_re = -std::exp(re.data<double>()[i * n + k % n]), lambda_im = im.data<double>()[i * n + k % n];
      double* a = A.data<double>() + (i * N + k) * N;
      a[k] = lambda_re;
      a[(k + n) % N] = k < n ? -lambda_im : lambda_im;
      for (int64_t m = 0; m < N; ++m) a[m] -= 2.0 * part(P, i, k) * part(P, i, m);
      b.data<double>()[i * N + k] = part(B, i, k);
      row.data<double>()[i * N + k] = (k < n ? 2.0 : -2.0) * part(C, i, k);
    }
  const Variable log_dt(get("log_dt").to(device), true), vA(A.to(device), true), vB(b.to(device), true), vC(row.to(device), true);
  const Variable K = dense_ssm_kernel(log_dt, vA, vB, vC, c.tensor("out/K").size(1), Discretization::bilinear);
  backward(K, c.tensor("upstream/K").to(device));
  c.check("out/K", K.data().cpu());
  c.check("grad/param/log_dt", log_dt.grad().cpu());
  const Tensor dA = vA.grad().cpu(), db = vB.grad().cpu(), drow = vC.grad().cpu();
  Tensor dre = zeros_like(re), dim = zeros_like(im), dP = zeros_like(P), dB = zeros_like(B), dC = zeros_like(C);
  for (int64_t i = 0; i < h; ++i)
    for (int64_t k = 0; k < N; ++k) {
      const double* a = dA.data<double>() + i * N * N;
      const int64_t at = i * n + k % n, at2 = 2 * at + k / n;
      dre.data<double>()[at] -= std::exp(re.data<double>()[at]) * a[k * N + k];
      dim.data<double>()[at] += (k < n ? -1.0 : 1.0) * a[k * N + (k + n) % N];
      for (int64_t m = 0; m < N; ++m) dP.data<double>()[at2] -= 2.0 * part(P, i, m) * (a[k * N + m] + a[m * N + k]);
      dB.data<double>()[at2] = db.data<double>()[i * N + k];
      dC.data<double>()[at2] = (k < n ? 2.0 : -2.0) * drow.data<double>()[i * N + k];
    }
  c.check("grad/param/log_A_re", dre);
  c.check("grad/param/A_im", dim);
  c.check("grad/param/P", dP);
  c.check("grad/param/B", dB);
  c.check("grad/param/C", dC);
}

// The recurrence, literally, over the discretised system.
void check_dense(const GoldenCase& c, Device device) {
  const auto method = c.text("method") == "zoh"        ? Discretization::zoh
                      : c.text("method") == "bilinear" ? Discretization::bilinear
                                                       : Discretization::euler;
  for (const DType dtype : kDTypes) {
    const auto get = [&](const std::string& path) { return Variable(c.tensor(path).to(dtype).to(device), true); };
    const Variable u = get("in/u"), x0 = get("in/x0"), A = get("param/A"), B = get("param/B"), C = get("param/C");
    const Variable D = get("param/D"), log_dt = get("param/log_dt");
    const auto [A_bar, B_bar] = dense_ssm_discretize(reshape(log_dt, {1}), unsqueeze(A, 0), unsqueeze(B, 0), method);
    Variable x = cast(x0, f64);
    Vars ys;
    for (int64_t t = 0; t < u.size(1); ++t) {
      const Variable now = cast(slice(u, 1, t, t + 1), f64);  // (b, 1)
      x = matmul(x, select(A_bar, 0, 0), false, true) + now * B_bar;
      ys.push_back(sum(x * cast(C, f64), -1, keepdim) + cast(D, f64) * now);
    }
    const Variable y = cast(concat(ys, 1), dtype), last = cast(x, dtype);
    backward(Vars{y, last}, {c.tensor("upstream/y").to(dtype).to(device), c.tensor("upstream/x_last").to(dtype).to(device)});
    c.check("out/y", y.data().cpu());
    c.check("state/x_last", last.data().cpu());
    c.check_within("out/A_bar", A_bar.data().cpu().select(0, 0), c.tolerance("out/A_bar", dtype));
    c.check_within("out/B_bar", B_bar.data().cpu().select(0, 0), c.tolerance("out/B_bar", dtype));
    c.check("grad/in/u", u.grad().cpu());
    c.check("grad/in/x0", x0.grad().cpu());
    check_gradients(c, {{"A", A}, {"B", B}, {"C", C}, {"D", D}, {"log_dt", log_dt}});
    // the kernel answers an impulse
    const Variable K = dense_ssm_kernel(reshape(log_dt, {1}), unsqueeze(A, 0), unsqueeze(B, 0), unsqueeze(C, 0), 9, method);
    Variable state = B_bar;
    for (int64_t t = 0; t < 9; ++t) {
      CHECK(std::abs(K.data().cpu().slice(1, t, t + 1).item() - sum(state * cast(C, f64)).data().cpu().item()) < (dtype == f64 ? 1e-12 : 1e-5));
      state = matmul(state, select(A_bar, 0, 0), false, true);
    }
  }
}

}  // namespace

TEST_CASE("the S4D kernel meets the goldens") {
  for_each_golden("s4.h5", "s4d_kernel_", [](const GoldenCase& c) { check_s4d(c, kCpu); });
}
TEST_CASE("the S4 kernel meets the goldens") {
  for_each_golden("s4.h5", "s4_kernel_tildeC_", [](const GoldenCase& c) { check_s4(c, kCpu); });
}
TEST_CASE("C and C_tilde meet the goldens, and the dense form of S4 their gradients") {
  for_each_golden("s4.h5", "s4_kernel_trueC_", [](const GoldenCase& c) {
    check_true_c(c, kCpu);
    check_true_c_gradients(c, kCpu);
  });
}
TEST_CASE("the dense kernel meets the goldens") {
  for_each_golden("s4.h5", "ssm_dense_", [](const GoldenCase& c) { check_dense(c, kCpu); });
}
TEST_CASE("the S4 family's kernels meet the goldens on cuda", "[cuda]") {
  const Device gpu = cuda_device();
  for_each_golden("s4.h5", "s4d_kernel_", [&](const GoldenCase& c) { check_s4d(c, gpu); });
  for_each_golden("s4.h5", "s4_kernel_tildeC_", [&](const GoldenCase& c) { check_s4(c, gpu); });
  for_each_golden("s4.h5", "s4_kernel_trueC_", [&](const GoldenCase& c) {
    check_true_c(c, gpu);
    check_true_c_gradients(c, gpu);
  });
  for_each_golden("s4.h5", "ssm_dense_", [&](const GoldenCase& c) { check_dense(c, gpu); });
}
