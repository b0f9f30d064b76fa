#include "autograd/s4_kernel.h"

#include <cmath>
#include <complex>

#include "core/parallel.h"
#include "kernels/s4_kernel.h"
#include "tests/testing/op_case.h"

using namespace krait;

namespace {

using Cd = std::complex<double>;

double real(const Variable& v, int64_t i) { return v.data().to(f64).contiguous().data<double>()[i]; }
Cd value(const Variable& v, int64_t i) { return {real(v, 2 * i), real(v, 2 * i + 1)}; }

// K_l = 2 Re sum C B_bar A_bar^l with std::pow, channel by channel.
Outputs s4d_reference(const Vars& in, int64_t length, bool zoh) {
  const int64_t h = in[0].size(0), s = in[1].size(0), n = in[1].size(1);
  Tensor K = zeros({h, length}, f64, kCpu);
  for (int64_t c = 0; c < h; ++c)
    for (int64_t j = 0; j < n; ++j) {
      const int64_t i = c / (h / s) * n + j;
      const double dt = std::exp(real(in[0], c));
      const Cd A(-std::exp(real(in[1], i)), real(in[2], i)), a = dt * A;
      const Cd A_bar = zoh ? std::exp(a) : (1.0 + a / 2.0) / (1.0 - a / 2.0);
      const Cd B_bar = value(in[3], i) * (zoh ? (std::exp(a) - 1.0) / A : dt / (1.0 - a / 2.0));
      for (int64_t l = 0; l < length; ++l)
        K.data<double>()[c * length + l] += 2.0 * (value(in[4], c * n + j) * B_bar * std::pow(A_bar, l)).real();
    }
  return Variable(K);
}

OpCase s4d_case(int64_t length, Discretization d, std::vector<std::vector<Shape>> shapes) {
  return {.name = "s4d_kernel",
          .run = [=](const Vars& in) { return s4d_kernel(in[0], in[1], in[2], in[3], in[4], length, d); },
          .reference = [=](const Vars& in) { return s4d_reference(in, length, d == Discretization::zoh); },
          .shapes = std::move(shapes),
          .tolerance = {{f32, 3e-5}},
          .fills = {{0, Normal{.mean = -2, .std = 0.3}}, {1, Normal{.mean = -0.7, .std = 0.3}}, {2, Normal{.std = 5}}}};
}

std::vector<Shape> s4d_shapes(int64_t h, int64_t s, int64_t n) { return {{h}, {s, n}, {s, n}, {s, n, 2}, {h, n, 2}}; }

const auto kZoh = Discretization::zoh, kBilinear = Discretization::bilinear;

std::vector<OpCase> s4d_cases() {
  std::vector<OpCase> cases;
  for (const Discretization d : {kZoh, kBilinear}) {
    cases.push_back(s4d_case(1, d, {s4d_shapes(1, 1, 1), s4d_shapes(4, 2, 3)}));
    cases.push_back(s4d_case(37, d, {s4d_shapes(3, 3, 5), s4d_shapes(4, 1, 2), s4d_shapes(2, 1, 35)}));
    cases.push_back(s4d_case(517, d, {s4d_shapes(2, 2, 33)}));
  }
  return cases;
}

// The row vector C = (C_tilde, conj C_tilde) (I - A_bar^L)^-1 against powers of the real form of the system.
Outputs s4_reference(const Vars& in, int64_t length) {
  kernels::S4Parameters p{in[0].data(), in[1].data(), in[2].data(), in[3].data(), in[4].data(), in[5].data()};
  const auto [A_bar, B_bar] = kernels::s4_real_system(p);
  const Variable C(kernels::s4_tilde_to_c(p, length));
  const int64_t h = A_bar.size(0), N = A_bar.size(1), n = N / 2;
  Tensor K = zeros({h, length}, f64, kCpu);
  for (int64_t c = 0; c < h; ++c) {
    std::vector<double> x(B_bar.data<double>() + c * N, B_bar.data<double>() + (c + 1) * N), y(x.size());
    for (int64_t l = 0; l < length; ++l) {
      double sum = 0;
      for (int64_t j = 0; j < n; ++j)
        sum += 2.0 * (value(C, c * n + j) * Cd(x[static_cast<size_t>(j)], x[static_cast<size_t>(n + j)])).real();
      K.data<double>()[c * length + l] = sum;
      for (int64_t i = 0; i < N; ++i) {
        y[static_cast<size_t>(i)] = 0;
        for (int64_t k = 0; k < N; ++k)
          y[static_cast<size_t>(i)] += A_bar.data<double>()[(c * N + i) * N + k] * x[static_cast<size_t>(k)];
      }
      x.swap(y);
    }
  }
  return Variable(K);
}

OpCase s4_case(int64_t length, std::vector<std::vector<Shape>> shapes) {
  return {.name = "s4_kernel",
          .run = [=](const Vars& in) { return s4_kernel(in[0], in[1], in[2], in[3], in[4], in[5], length); },
          .reference = [=](const Vars& in) { return s4_reference(in, length); },
          .shapes = std::move(shapes),
          .tolerance = {{f32, 3e-5}},
          .fills = {{0, Normal{.mean = -2, .std = 0.3}}, {1, Normal{.mean = -0.7, .std = 0.3}}, {2, Normal{.std = 5}}},
          .grad_tolerance = 1e-5};
}

std::vector<Shape> s4_shapes(int64_t h, int64_t s, int64_t n, int64_t rank = 0) {
  return {{h}, {s, n}, {s, n}, rank ? Shape{s, rank, n, 2} : Shape{s, n, 2}, {s, n, 2}, {h, n, 2}};
}

std::vector<OpCase> s4_cases() {
  return {s4_case(1, {s4_shapes(1, 1, 1), s4_shapes(2, 1, 3, 2)}),
          s4_case(2, {s4_shapes(2, 2, 3)}),
          s4_case(31, {s4_shapes(4, 2, 3), s4_shapes(2, 1, 4, 1), s4_shapes(2, 1, 4, 2)}),
          s4_case(64, {s4_shapes(2, 1, 5), s4_shapes(3, 3, 2, 2)}),
          s4_case(600, {s4_shapes(1, 1, 33), s4_shapes(2, 1, 3, 2)})};
}

Outputs dense_reference(const Vars& in, int64_t length, Discretization d) {
  const auto [A_bar, B_bar] = dense_ssm_discretize(in[0], in[1], in[2], d);
  const int64_t h = A_bar.size(0), n = A_bar.size(1);
  Tensor K = zeros({h, length}, f64, kCpu);
  const Tensor A = A_bar.data().contiguous(), B = B_bar.data().contiguous();
  for (int64_t c = 0; c < h; ++c) {
    std::vector<double> x(B.data<double>() + c * n, B.data<double>() + (c + 1) * n), y(x.size());
    for (int64_t l = 0; l < length; ++l) {
      for (int64_t i = 0; i < n; ++i) {
        K.data<double>()[c * length + l] += real(in[3], c * n + i) * x[static_cast<size_t>(i)];
        y[static_cast<size_t>(i)] = 0;
        for (int64_t k = 0; k < n; ++k)
          y[static_cast<size_t>(i)] += A.data<double>()[(c * n + i) * n + k] * x[static_cast<size_t>(k)];
      }
      x.swap(y);
    }
  }
  return Variable(K);
}

OpCase dense_case(int64_t length, Discretization d, std::vector<std::vector<Shape>> shapes) {
  return {.name = "dense_ssm_kernel",
          .run = [=](const Vars& in) { return dense_ssm_kernel(in[0], in[1], in[2], in[3], length, d); },
          .reference = [=](const Vars& in) { return dense_reference(in, length, d); },
          .shapes = std::move(shapes),
          .tolerance = {{f32, 2e-5}},
          .fills = {{0, Normal{.mean = -3, .std = 0.3}}}};
}

std::vector<OpCase> dense_cases() {
  std::vector<OpCase> cases;
  for (const Discretization d : {kZoh, kBilinear, Discretization::euler}) {
    if (d != Discretization::euler)  // where A has no part in one position
      cases.push_back(dense_case(1, d, {{{1}, {1, 1, 1}, {1, 1}, {1, 1}}}));
    cases.push_back(dense_case(2, d, {{{2}, {1, 3, 3}, {1, 3}, {2, 3}}}));
    cases.push_back(dense_case(37, d, {{{4}, {2, 5, 5}, {2, 5}, {4, 5}}, {{2}, {2, 4, 4}, {2, 4}, {2, 4}}}));
  }
  return cases;
}

bool finite(const Tensor& t) {
  for (const double v : t.to_vector<double>())
    if (!std::isfinite(v)) return false;
  return true;
}

// LegS-like parameters of h channels with time steps from 1e-4 to 1e-1.
Vars long_parameters(int64_t h, int64_t n, DType dtype, Device device) {
  Tensor log_dt = empty({h}, f64, kCpu), re = full({1, n}, std::log(0.5), f64, kCpu), im = empty({1, n}, f64, kCpu);
  Tensor B = zeros({1, n, 2}, f64, kCpu);
  for (int64_t i = 0; i < h; ++i)
    log_dt.data<double>()[i] = std::log(1e-4) + std::log(1e3) * static_cast<double>(i) / static_cast<double>(h - 1);
  for (int64_t j = 0; j < n; ++j) {
    const double x = static_cast<double>(j);
    im.data<double>()[j] = 1.0 + 3.0 * x + 0.8 * x * x;
    B.data<double>()[2 * j] = std::sqrt(x + 1.0);
  }
  Vars all;
  for (const Tensor& t : {log_dt, re, im, B, B, random_tensor({h, n, 2}, Normal{.std = 0.7}, 3)})
    all.emplace_back(t.to(dtype).to(device), true);
  return all;
}

}  // namespace

TEST_CASE("the S4D kernel matches the defining sum") {
  for (const OpCase& c : s4d_cases()) check_reference(c);
}
TEST_CASE("the S4D kernel passes gradcheck") {
  for (const OpCase& c : s4d_cases()) check_grad(c);
}
TEST_CASE("the S4D kernel: cuda equals cpu", "[cuda]") {
  for (const OpCase& c : s4d_cases()) check_twin(c);
  check_twin(s4d_case(1500, kZoh, {s4d_shapes(70, 2, 33)}));  // several pieces of the positions, many channels of a set
  check_twin(s4d_case(9000, kBilinear, {s4d_shapes(3, 1, 5)}));
}
TEST_CASE("the S4 kernel matches powers of its state matrix, ranks 1 and 2, any length") {
  for (const OpCase& c : s4_cases()) check_reference(c);
}
TEST_CASE("the S4 kernel passes gradcheck") {
  for (const OpCase& c : s4_cases()) check_grad(c);
}
TEST_CASE("the S4 kernel: cuda equals cpu", "[cuda]") {
  for (const OpCase& c : s4_cases()) check_twin(c);
  // Transforms of powers of two: one and two passes.
  check_twin(s4_case(1024, {s4_shapes(2, 1, 3)}));
  check_twin(s4_case(8192, {s4_shapes(3, 1, 2)}));
}
TEST_CASE("the dense kernel matches powers of its state matrix") {
  for (const OpCase& c : dense_cases()) check_reference(c);
}
TEST_CASE("the dense kernel passes gradcheck") {
  for (const OpCase& c : dense_cases()) check_grad(c);
}
TEST_CASE("the dense kernel: cuda equals cpu", "[cuda]") {
  for (const OpCase& c : dense_cases()) check_twin(c);
}

TEST_CASE("a batch of inverses times its matrices is the identity; its gradient holds") {
  const OpCase inverse{.name = "batched_inverse",
                       .run = [](const Vars& in) { return batched_inverse(in[0]); },
                       .reference = {},
                       .shapes = {{{1, 1, 1}}, {{3, 4, 4}}, {{2, 7, 7}}},
                       .grad_step = 1e-6,
                       .grad_tolerance = 1e-4};
  check_grad(inverse);
  Tensor zero_pivot = zeros({1, 2, 2}, f64, kCpu);
  zero_pivot.data<double>()[1] = zero_pivot.data<double>()[2] = 2.0;
  CHECK(batched_inverse(Variable(zero_pivot)).data().to_vector<double>() == std::vector<double>{0, 0.5, 0.5, 0});
  const Tensor a = random_tensor({3, 65, 65}, Normal{}, 5);
  const Tensor back = batched_inverse(batched_inverse(Variable(a))).data();
  CHECK(relative_error(back, a) < 1e-9);
}

TEST_CASE("a matrix inverse on cuda equals the cpu's", "[cuda]") {
  for (const int64_t n : {1, 2, 31, 64, 65, 130}) {
    const Tensor a = random_tensor({3, n, n}, Normal{}, 5);
    CHECK(relative_error(batched_inverse(Variable(a.to(cuda_device()))).data().cpu(), batched_inverse(Variable(a)).data()) < 1e-8);
  }
}

TEST_CASE("A_bar = 0 in the bilinear S4D kernel leaves one position and finite gradients") {
  // dt A = -2 exactly
  const Variable log_dt(full({1}, 0.0, f64, kCpu), true), re(full({1, 1}, std::log(2.0), f64, kCpu), true);
  const Variable im(zeros({1, 1}, f64, kCpu), true), B(ones({1, 1, 2}, f64, kCpu), true), C(ones({1, 1, 2}, f64, kCpu), true);
  const Variable K = s4d_kernel(log_dt, re, im, B, C, 100, kBilinear);
  backward(K, ones({1, 100}, f64, kCpu));
  for (const double k : K.data().slice(1, 1, 100).to_vector<double>()) CHECK(std::abs(k) < 1e-12);
  for (const Variable& v : {log_dt, re, im, B, C}) CHECK(finite(v.grad()));
}

TEST_CASE("S4D's first positions do not depend on the length; S4 of a doubled length continues the shorter kernel") {
  const Vars p = long_parameters(3, 8, f64, kCpu);
  const Tensor shorter = s4d_kernel(p[0], p[1], p[2], p[3], p[5], 100, kZoh).data();
  const Tensor longer = s4d_kernel(p[0], p[1], p[2], p[3], p[5], 777, kZoh).data();
  CHECK(relative_error(longer.slice(1, 0, 100), shorter) < 1e-13);
  kernels::S4Parameters s{p[0].data(), p[1].data(), p[2].data(), p[4].data(), p[3].data(), p[5].data()};
  s.C_tilde = kernels::s4_c_to_tilde(s, 50);
  const Tensor K50 = kernels::s4_kernel_forward(s, 50);
  s.C_tilde = kernels::s4_double_length(s, 50);
  CHECK(relative_error(kernels::s4_kernel_forward(s, 100).slice(1, 0, 50), K50) < 1e-10);
  CHECK(relative_error(kernels::s4_tilde_to_c(s, 100), p[5].data()) < 1e-9);
}

TEST_CASE("kernels of 16384 positions are finite in fp32 and close to fp64, with their gradients") {
  const auto run = [](DType dtype, bool s4) {
    const Vars p = long_parameters(4, 32, dtype, kCpu);
    const int64_t length = 16384;
    const Variable K = s4 ? s4_kernel(p[0], p[1], p[2], p[4], p[3], p[5], length)
                          : s4d_kernel(p[0], p[1], p[2], p[3], p[5], length, kZoh);
    backward(K, random_tensor(K.shape(), Normal{}, 9).to(dtype));
    std::vector<Tensor> out{K.data()};
    for (const Variable& v : p)
      if (v.grad().defined()) out.push_back(v.grad());
    return out;
  };
  for (const bool s4 : {false, true}) {
    const auto wide = run(f64, s4), single = run(f32, s4);
    REQUIRE(wide.size() == single.size());
    for (size_t i = 0; i < wide.size(); ++i) {
      INFO((s4 ? "S4 " : "S4D ") << i);
      CHECK(finite(single[i]));
      // what is left is the rounding of the parameters: phases reach thousands of radians
      CHECK(relative_error(single[i], wide[i]) < 5e-3);
    }
  }
}

TEST_CASE("kernels do not depend on the number of threads") {
  const Vars p = long_parameters(5, 8, f32, kCpu);
  const auto both = [&] {
    auto a = s4d_kernel(p[0], p[1], p[2], p[3], p[5], 300, kZoh).data().to_vector<float>();
    const auto b = s4_kernel(p[0], p[1], p[2], p[4], p[3], p[5], 300).data().to_vector<float>();
    a.insert(a.end(), b.begin(), b.end());
    return a;
  };
  set_num_threads(1);
  const auto one = both();
  set_num_threads(2);
  const auto two = both();
  set_num_threads(0);
  CHECK(one == two);
}

TEST_CASE("kernels without positions or channels are empty, and wrong shapes are named") {
  const Vars p = long_parameters(2, 4, f32, kCpu);
  CHECK(s4d_kernel(p[0], p[1], p[2], p[3], p[5], 0, kZoh).shape() == Shape{2, 0});
  const Variable none = s4_kernel(p[0], p[1], p[2], p[4], p[3], p[5], 0);
  backward(none, zeros({2, 0}, f32, kCpu));
  CHECK(p[5].grad().to_vector<float>() == std::vector<float>(16, 0.0f));
  CHECK(contains(error_of([&] { s4d_kernel(p[0], p[1], p[2], p[3], p[3], 8, kZoh); }), "expected (1, 4), (1, 4, 2), (2, 4, 2)"));
  CHECK(contains(error_of([&] { s4_kernel(p[0], p[1], p[2], p[1], p[3], p[5], 8); }), "P is (1, 4)"));
  CHECK(contains(error_of([&] { s4d_kernel(p[0], p[1], p[2], p[3], p[5], 8, Discretization::euler); }), "use zoh or bilinear"));
}
