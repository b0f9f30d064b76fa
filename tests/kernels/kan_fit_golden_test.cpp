#include <cmath>

#include "kernels/kan.h"
#include "kernels/kan_fit.h"
#include "tests/testing/golden.h"
#include "tests/testing/tensors.h"

using namespace krait;

namespace {

// Curves (s, i, o) of coefficients (o, i, n).
Tensor curves(const Tensor& x, const Tensor& knots, const Tensor& c, int64_t order) {
  const Tensor basis = kernels::bspline_basis(x, knots, order);
  const int64_t s = x.size(0), inputs = x.size(1), outputs = c.size(0), n = c.size(2);
  Tensor y = zeros({s, inputs, outputs}, DType::f64, kCpu);
  for (int64_t b = 0; b < s; ++b)
    for (int64_t i = 0; i < inputs; ++i)
      for (int64_t o = 0; o < outputs; ++o)
        for (int64_t g = 0; g < n; ++g)
          y.data<double>()[(b * inputs + i) * outputs + o] +=
              basis.data<double>()[(b * inputs + i) * n + g] * c.data<double>()[(o * inputs + i) * n + g];
  return y;
}

}  // namespace

TEST_CASE("grid extension meets the goldens") {
  for_each_golden("kan.h5", "grid_extend_", [](const GoldenCase& c) {
    const auto k = static_cast<int64_t>(c.number("k")), intervals = static_cast<int64_t>(c.number("G_new"));
    const Tensor x = c.tensor("out/x"), old = c.tensor("out/grid_old");
    const Tensor knots = kernels::resized_knots(old, k, intervals);
    c.check_within("out/grid_new", knots, 1e-12);
    const Tensor refitted = kernels::refit_splines(x, c.tensor("out/coef_old"), old, knots, k);
    c.check_within("out/coef_new", refitted, 1e-4);
    c.check_within("out/curve_new", curves(x, knots, refitted, k), 1e-6);
    const Tensor fitted = kernels::fit_splines(x, c.tensor("out/curve"), knots, k);
    c.check_within("out/curve_new", curves(x, knots, fitted, k), 1e-6);
  });
}

TEST_CASE("the grid update from samples meets the goldens") {
  for_each_golden("kan.h5", "grid_update_", [](const GoldenCase& c) {
    const auto k = static_cast<int64_t>(c.number("k")), intervals = static_cast<int64_t>(c.number("G"));
    const Tensor x = c.tensor("out/x"), old = c.tensor("out/grid_old");
    const Tensor knots = kernels::knots_from_samples(x, intervals, k, c.number("grid_eps"), c.number("margin"));
    c.check_within("out/grid_new", knots, 1e-12);
    const Tensor refitted = kernels::refit_splines(x, c.tensor("out/coef_old"), old, knots, k);
    c.check_within("out/coef_new", refitted, 1e-4);
    c.check_within("out/curve_new", curves(x, knots, refitted, k), 1e-6);
  });
}

TEST_CASE("a grid that is refined by a whole factor keeps the curve, uniform or not") {
  const Tensor x = random_tensor({400, 2}, Uniform{-1, 1}, 1);
  const Tensor even = kernels::uniform_knots(2, 5, 3, -1, 1);
  const Tensor c = random_tensor({3, 2, 8}, Normal{}, 2);
  const Tensor fine = kernels::resized_knots(even, 3, 20);
  CHECK(relative_error(fine, kernels::uniform_knots(2, 20, 3, -1, 1)) < 1e-14);
  CHECK(relative_error(curves(x, fine, kernels::refit_splines(x, c, even, fine, 3), 3), curves(x, even, c, 3)) < 1e-6);
  const Tensor uneven = kernels::knots_from_samples(random_tensor({99, 2}, Normal{0, 0.4}, 3), 5, 3);
  const Tensor finer = kernels::resized_knots(uneven, 3, 10);
  CHECK(relative_error(finer.slice(1, 3, 14).slice(1, 0, 1), uneven.slice(1, 3, 4)) == 0);
  CHECK(relative_error(finer.slice(1, 13, 14), uneven.slice(1, 8, 9)) < 1e-14);
}

TEST_CASE("equal samples still give ascending knots, and a fit of fewer samples than coefficients is finite") {
  for (const int64_t s : {1, 2, 30}) {
    const Tensor x = full({s, 1}, 0.25, DType::f64, kCpu);
    const Tensor knots = kernels::knots_from_samples(x, 5, 3);
    for (int64_t j = 1; j < knots.size(1); ++j) CHECK(knots.data<double>()[j] > knots.data<double>()[j - 1]);
    const Tensor c = kernels::fit_splines(x, ones({s, 1, 1}, DType::f64, kCpu), knots, 3);
    for (const double v : c.to_vector<double>()) CHECK(std::isfinite(v));
    CHECK(relative_error(curves(x, knots, c, 3), ones({s, 1, 1}, DType::f64, kCpu)) < 1e-6);
  }
  const Tensor nan = full({3, 1}, std::nan(""), DType::f64, kCpu);
  CHECK(contains(error_of([&] { kernels::knots_from_samples(nan, 5, 3); }), "sample 0 of input 0 is nan"));
  CHECK(contains(error_of([] {
                   kernels::fit_splines(zeros({3, 2}, DType::f64, kCpu), zeros({3, 1, 1}, DType::f64, kCpu),
                                        kernels::uniform_knots(2, 3, 3, -1, 1), 3);
                 }),
                 "y is (3, 1, 1), expected (samples, inputs, outputs) to match x (3, 2)"));
}
