#include "layers/hippo.h"

#include <cmath>
#include <complex>

#include "autograd/s4_kernel.h"
#include "kernels/s4_kernel.h"
#include "tests/testing/tensors.h"

using namespace krait;
using namespace krait::layers;

namespace {

using Cd = std::complex<double>;

Cd value(const Tensor& t, int64_t i) { return {t.data<double>()[2 * i], t.data<double>()[2 * i + 1]}; }

// 2 Re(V diag(Lambda) V^H) - sum_r p_r p_r^T
Tensor rebuilt_A(const Dplr& d, const Tensor& P) {
  const int64_t N = d.V.size(0), n = N / 2;
  Tensor A = zeros({N, N}, DType::f64, kCpu);
  for (int64_t i = 0; i < N; ++i)
    for (int64_t k = 0; k < N; ++k) {
      double sum = 0;
      for (int64_t j = 0; j < n; ++j)
        sum += 2.0 * (value(d.V, i * n + j) * value(d.Lambda, j) * std::conj(value(d.V, k * n + j))).real();
      for (int64_t r = 0; r < P.size(0); ++r) sum -= P.data<double>()[r * N + i] * P.data<double>()[r * N + k];
      A.data<double>()[i * N + k] = sum;
    }
  return A;
}

Tensor rebuilt_B(const Dplr& d) {
  const int64_t N = d.V.size(0), n = N / 2;
  Tensor B = zeros({N}, DType::f64, kCpu);
  for (int64_t i = 0; i < N; ++i)
    for (int64_t j = 0; j < n; ++j) B.data<double>()[i] += 2.0 * (value(d.V, i * n + j) * value(d.B, j)).real();
  return B;
}

}  // namespace

TEST_CASE("the DPLR form of every HiPPO kind rebuilds its matrices, at any even size") {
  for (const char* kind : {"legs", "legt", "lagt", "lagt1", "fout", "foud"})
    for (const int64_t N : {2, 4, 6, 10, 32, 64, 128, 256}) {
      INFO(kind << " " << N);
      const StateSpace s = hippo(kind, N);
      const Dplr d = hippo_dplr(kind, N);
      CHECK(relative_error(rebuilt_A(d, hippo_low_rank(kind, N)), s.A) < 1e-12);
      CHECK(relative_error(rebuilt_B(d), s.B) < 1e-12);
      for (int64_t j = 0; j < N / 2; ++j) CHECK(value(d.Lambda, j).imag() > -1e-9);
    }
}

TEST_CASE("HiPPO matrices exist for odd sizes; a DPLR form wants an even one") {
  for (const char* kind : {"legs", "legt", "lagt", "fout", "foud"}) {
    CHECK(hippo(kind, 1).A.numel() == 1);
    // the leading block does not depend on the size
    CHECK(relative_error(hippo(kind, 7).A.slice(0, 0, 5).slice(1, 0, 5), hippo(kind, 5).A) == 0.0);
  }
  CHECK(contains(error_of([] { hippo_dplr("legs", 7); }), "must be even, found 7"));
  CHECK(contains(error_of([] { hippo("leg", 8); }), "'leg' is unknown; expected one of legs, legt"));
  CHECK(contains(error_of([] { s4_init("hippo", 8, 1); }), "random_diagonal"));
  const StateSpace s{random_tensor({4, 4}, Normal{}, 1), random_tensor({4}, Normal{}, 2)};
  CHECK(contains(error_of([&] { dplr(s, zeros({1, 4}, DType::f64, kCpu)); }), "skew"));
}

TEST_CASE("initial values: the decay is at least 1e-4, shapes follow the rank, b_clip keeps the phase of B") {
  for (const std::string& init : s4_init_names()) {
    INFO(init);
    const S4Init p = s4_init(init, 16, 7);
    CHECK(p.log_A_re.shape() == Shape{8});
    CHECK(p.A_im.shape() == Shape{8});
    CHECK(p.B.shape() == (Shape{8, 2}));
    CHECK(p.P.shape() == (init == "legt" ? Shape{2, 8, 2} : Shape{8, 2}));
    for (const double a : p.log_A_re.to_vector<double>()) CHECK(a >= std::log(1e-4) - 1e-12);
    CHECK(!s4d_init(init, 16, 7).P.defined());
  }
  const Tensor B = s4_init("legs", 64, 0).B, clipped = s4_init("legs", 64, 0, 2.0).B;
  int64_t changed = 0;
  for (int64_t j = 0; j < 32; ++j) {
    CHECK(std::abs(value(clipped, j)) <= 2.0 + 1e-12);
    changed += std::abs(value(clipped, j)) < std::abs(value(B, j));
    CHECK(std::abs(value(clipped, j) * std::conj(value(B, j)) - std::abs(value(clipped, j)) * std::abs(value(B, j))) < 1e-9);
  }
  CHECK(changed > 0);
}

TEST_CASE("random initial values depend on the key alone") {
  for (const char* init : {"random", "random_diagonal", "diag_gaussian"}) {
    const S4Init a = s4_init(init, 16, 5), b = s4_init(init, 16, 5), c = s4_init(init, 16, 6);
    CHECK(a.A_im.to_vector<double>() == b.A_im.to_vector<double>());
    CHECK(a.P.to_vector<double>() == b.P.to_vector<double>());
    CHECK((a.A_im.to_vector<double>() != c.A_im.to_vector<double>() ||
           a.log_A_re.to_vector<double>() != c.log_A_re.to_vector<double>()));
  }
  const StateSpace g = dense_init("gaussian", 200, 3), h = dense_init("gaussian", 200, 3), half = dense_init("gaussian", 200, 3, 0.5);
  CHECK(g.A.to_vector<double>() == h.A.to_vector<double>());
  double square = 0;
  for (const double a : g.A.to_vector<double>()) square += a * a;
  CHECK(std::abs(square - 1.0) < 0.05);  // N^2 entries of variance 1/N^2
  CHECK(half.A.data<double>()[5] == 0.5 * g.A.data<double>()[5]);
  const StateSpace d = dense_init("diag_gaussian", 8, 3);
  for (int64_t i = 0; i < 64; ++i) CHECK((i % 9 == 0 ? d.A.data<double>()[i] < 0 : d.A.data<double>()[i] == 0));
  CHECK(relative_error(dense_init("legs", 8, 0).A, hippo("legs", 8).A) == 0.0);
}

TEST_CASE("S4's kernel from the DPLR form equals the dense kernel of the HiPPO matrices") {
  constexpr int64_t N = 16, length = 75;
  for (const char* kind : {"legs", "legt", "lagt", "lagt1", "fout", "foud"}) {
    INFO(kind);
    const Dplr d = hippo_dplr(kind, N);
    const S4Init init = s4_init(kind, N, 0);
    const Tensor row = random_tensor({1, N}, Normal{}, 11), log_dt = full({1}, std::log(0.01), f64, kCpu);
    Tensor C = zeros({1, N / 2, 2}, f64, kCpu);  // y = c 2 Re(V x) = 2 Re((c V) x)
    for (int64_t i = 0; i < N; ++i)
      for (int64_t j = 0; j < N / 2; ++j) {
        const Cd v = value(d.V, i * (N / 2) + j) * row.data<double>()[i];
        C.data<double>()[2 * j] += v.real();
        C.data<double>()[2 * j + 1] += v.imag();
      }
    kernels::S4Parameters p{log_dt, init.log_A_re.unsqueeze(0), init.A_im.unsqueeze(0), init.P.unsqueeze(0),
                            init.B.unsqueeze(0), C};
    p.C_tilde = kernels::s4_c_to_tilde(p, length);
    const StateSpace s = hippo(kind, N);
    const Tensor K = dense_ssm_kernel(Variable(log_dt), Variable(s.A.unsqueeze(0)), Variable(s.B.unsqueeze(0)),
                                      Variable(row), length, Discretization::bilinear).data();
    // the eigenvalues on the imaginary axis are moved left by 1e-4
    const bool moved = value(d.Lambda, 0).real() > -1e-4;
    CHECK(relative_error(kernels::s4_kernel_forward(p, length), K) < (moved ? 1e-3 : 1e-10));
  }
}

TEST_CASE("kernels of 16384 positions are finite in fp32 from every init") {
  constexpr int64_t N = 64, h = 3, length = 16384;
  const Tensor log_dt = from_vector(std::vector<double>{std::log(1e-4), std::log(1e-2), std::log(0.1)}).to(f32);
  const auto finite = [](const Tensor& t) {
    for (const double v : t.to_vector<double>())
      if (!std::isfinite(v)) return false;
    return true;
  };
  for (const std::string& name : s4_init_names()) {
    INFO(name);
    const S4Init init = s4_init(name, N, 3);
    const auto leaf = [](const Tensor& t) { return Variable(t.unsqueeze(0).to(f32), true); };
    const Variable dt(log_dt, true), re = leaf(init.log_A_re), im = leaf(init.A_im), P = leaf(init.P), B = leaf(init.B);
    const Variable C(random_tensor({h, N / 2, 2}, Normal{.std = std::sqrt(0.5)}, 4, f32), true);
    const Tensor tilde = kernels::s4_c_to_tilde({log_dt, re.data(), im.data(), P.data(), B.data(), C.data()}, length);
    const Variable C_tilde(tilde, true), diagonal = s4d_kernel(dt, re, im, B, C, length, Discretization::zoh);
    const Variable low_rank = s4_kernel(dt, re, im, P, B, C_tilde, length);
    backward(Vars{diagonal, low_rank}, {ones(diagonal.shape(), f32, kCpu), ones(diagonal.shape(), f32, kCpu)});
    for (const Variable& v : {diagonal, low_rank}) CHECK(finite(v.data()));
    for (const Variable& v : {dt, re, im, P, B, C, C_tilde}) CHECK(finite(v.grad()));
  }
}
