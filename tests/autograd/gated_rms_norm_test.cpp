#include "autograd/gated_rms_norm.h"

#include <cmath>

#include "tests/testing/golden.h"
#include "tests/testing/op_case.h"

using namespace krait;

namespace {

constexpr double kEps = 1e-3;

Tensor reference(const Tensor& x, const Tensor& z, const Tensor& w, int64_t groups, bool norm_first) {
  const int64_t e = x.size(-1), c = e / groups, r = x.numel() / e;
  Tensor y = empty_like(x);
  for (int64_t i = 0; i < r * groups; ++i) {
    const auto value = [&](int64_t j) {
      const double zj = z.data<double>()[i * c + j], xj = x.data<double>()[i * c + j];
      return std::pair(xj, zj / (1 + std::exp(-zj)));
    };
    double squares = 0;
    for (int64_t j = 0; j < c; ++j) {
      const auto [v, s] = value(j);
      squares += norm_first ? v * v : v * s * v * s;
    }
    const double rstd = 1 / std::sqrt(squares / static_cast<double>(c) + kEps);
    for (int64_t j = 0; j < c; ++j) {
      const auto [v, s] = value(j);
      y.data<double>()[i * c + j] = v * s * rstd * w.data<double>()[i % groups * c + j];
    }
  }
  return y;
}

OpCase case_of(int64_t groups, bool norm_first) {
  return {.name = "gated_rms_norm",
          .run = [=](const Vars& in) { return gated_rms_norm(in[0], in[1], in[2], kEps, groups, norm_first); },
          .reference = [=](const Vars& in) {
            return Variable(reference(in[0].data(), in[1].data(), in[2].data(), groups, norm_first));
          },
          .shapes = {{{3, 5, 36}, {3, 5, 36}, {36}}, {{1, 8}, {1, 8}, {8}}, {{150, 768}, {150, 768}, {768}},
                     {{0, 8}, {0, 8}, {8}}, {{700, 12}, {700, 12}, {12}}, {{2, 2052}, {2, 2052}, {2052}}},
          .inputs = {Normal{}, Normal{.mean = 10}, Constant{3}},
          .tolerance = {{f32, 2e-5}, {bf16_type, 2e-2}},
          .fills = {{1, Normal{}}, {2, Normal{1, 0.2}}}};
}

void check_golden(const GoldenCase& c, Device device) {
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
    const auto leaf = [&](const std::string& path, DType d) { return Variable(c.tensor(path).to(d).to(device), true); };
    const Variable x = leaf("in/x", dtype), z = leaf("in/z", dtype), w = leaf("param/weight", accum_dtype(dtype));
    const Variable y = gated_rms_norm(x, z, w, c.number("eps"), static_cast<int64_t>(c.number("groups")),
                                      c.number("norm_before_gate") != 0);
    backward(y, c.tensor("upstream/y").to(dtype).to(device));
    c.check("out/y", y.data());
    c.check("grad/in/x", x.grad());
    c.check("grad/in/z", z.grad());
    c.check_within("grad/param/weight", w.grad(), c.tolerance("grad/param/weight", dtype));
  }
}

template <class F>
void each_case(F f) {
  for (const int64_t groups : {1, 2, 4})
    for (const bool norm_first : {false, true}) f(case_of(groups, norm_first));
}

}  // namespace

TEST_CASE("gated_rms_norm matches plain loops") { each_case(check_reference); }
TEST_CASE("gated_rms_norm passes gradcheck") { each_case(check_grad); }
TEST_CASE("gated_rms_norm: cuda equals cpu", "[cuda]") { each_case(check_twin); }
TEST_CASE("gated_rms_norm meets its goldens") {
  for_each_golden("mamba2.h5", "gated_rmsnorm_", [](const GoldenCase& c) { check_golden(c, kCpu); });
}
TEST_CASE("gated_rms_norm meets its goldens on cuda", "[cuda]") {
  for_each_golden("mamba2.h5", "gated_rmsnorm_", [](const GoldenCase& c) { check_golden(c, cuda_device()); });
}

TEST_CASE("gated_rms_norm reads a gate inside a wider projection, and adds dw to a buffer") {
  const Tensor wide = random_tensor({2, 3, 40}, Normal{}, 1);
  const Tensor z = wide.slice(2, 5, 21);
  const Variable x(random_tensor({2, 3, 16}, Normal{}, 2), true), w(random_tensor({16}, Normal{1, 0.2}, 3), true);
  const Variable y = gated_rms_norm(x, Variable(z), w, kEps, 2);
  CHECK(relative_error(y.data(), reference(x.data(), z.clone(), w.data(), 2, false)) < 1e-14);
  backward(y, ones(y.shape(), DType::f64, kCpu));
  const Tensor first = w.grad().clone();
  Variable again(w.data(), true);
  again.set_grad(ones({16}, DType::f64, kCpu));
  backward(gated_rms_norm(x, Variable(z), again, kEps, 2), ones(y.shape(), DType::f64, kCpu));
  for (int64_t j = 0; j < 16; ++j) CHECK(again.grad().data<double>()[j] == Approx(1 + first.data<double>()[j]).epsilon(1e-14));
}

TEST_CASE("gated_rms_norm says what does not fit") {
  const auto t = [](const Shape& s) { return Variable(zeros(s, DType::f32, kCpu)); };
  CHECK(contains(error_of([&] { gated_rms_norm(t({2, 6}), t({2, 5}), t({6}), kEps); }), "z is (2, 5), x is (2, 6)"));
  CHECK(contains(error_of([&] { gated_rms_norm(t({2, 6}), t({2, 6}), t({6}), kEps, 4); }), "4 groups do not divide 6"));
}
