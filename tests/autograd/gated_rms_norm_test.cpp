#include "autograd/gated_rms_norm.h"

#include <cmath>

#include "kernels/elementwise.h"
#include "kernels/gated_rms_norm_split.h"
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

// What a member of several computes, with itself as the only member.
Variable split_norm(const Variable& x, const Variable& z, const Variable& w, bool norm_first) {
  const Tensor squares = kernels::gated_rms_norm_squares(x.data(), z.data(), 1, norm_first);
  const double width = static_cast<double>(x.size(-1));
  const Tensor rstd = kernels::rsqrt(kernels::add_scalar(kernels::mul_scalar(squares, 1 / width), kEps));
  return record("split_norm", {x, z, w}, kernels::gated_rms_norm_apply(x.data(), z.data(), w.data(), rstd),
                [=, x = x.data(), z = z.data(), w = w.data()](const Tensor& dy) -> Grads {
                  const Tensor dots = kernels::gated_rms_norm_dots(dy, x, z, w, rstd);
                  auto grad = kernels::gated_rms_norm_backward_split(dy, x, z, w, rstd, kernels::mul_scalar(dots, 1 / width),
                                                                     norm_first);
                  return {grad.dx, grad.dz, grad.dw};
                });
}

OpCase split_case(bool norm_first) {
  OpCase c = case_of(1, norm_first);
  c.name = "gated_rms_norm in parts";
  c.run = [=](const Vars& in) { return split_norm(in[0], in[1], in[2], norm_first); };
  c.shapes.push_back({{9, 8200}, {9, 8200}, {8200}});
  return c;
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
TEST_CASE("gated_rms_norm: cuda equals cpu", "[cuda]") {
  each_case(check_twin);
  for (const bool norm_first : {false, true}) check_twin(split_case(norm_first));
}
TEST_CASE("gated_rms_norm in parts, as several processes compute it, matches plain loops and passes gradcheck") {
  for (const bool norm_first : {false, true}) {
    check_reference(split_case(norm_first));
    check_grad(split_case(norm_first));
  }
}
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
