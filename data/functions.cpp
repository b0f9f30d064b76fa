#include "data/functions.h"

#include <cmath>
#include <numbers>

#include "core/config_node.h"
#include "core/error.h"

namespace krait::data {
namespace {

using std::numbers::pi;
using V = const double*;
double sq(double x) { return x * x; }
double sin_square(double x) { return sq(std::sin(0.5 * pi * x)); }

// The unit square around zero, and n variables of one range.
std::vector<double> n_of(size_t n, double value) { return std::vector<double>(n, value); }

// Spherical harmonics: the real part at polar angle v[0] and azimuth v[1].
template <unsigned l, unsigned m>
double harmonic(V v) {
  return std::sph_legendre(l, m, v[0]) * std::cos(m * v[1]);
}

std::vector<FunctionSpec> make_functions() {
  const auto box = [](size_t n, double low, double high) { return std::pair(n_of(n, low), n_of(n, high)); };
  std::vector<FunctionSpec> list;
  const auto add = [&](const char* name, const char* formula, std::pair<std::vector<double>, std::vector<double>> range,
                       double (*f)(V)) { list.push_back({name, formula, range.first, range.second, f}); };

  // Known compositions.
  add("bessel", "J0(20 x)", box(1, -1, 1), [](V v) { return std::cyl_bessel_j(0.0, std::abs(20 * v[0])); });
  add("exp_sin", "exp(sin(pi x) + y^2)", box(2, -1, 1), [](V v) { return std::exp(std::sin(pi * v[0]) + sq(v[1])); });
  add("product", "x y", box(2, -1, 1), [](V v) { return v[0] * v[1]; });
  add("four_sines", "exp((sin(pi (x1^2 + x2^2)) + sin(pi (x3^2 + x4^2))) / 2)", box(4, -1, 1), [](V v) {
    return std::exp(0.5 * (std::sin(pi * (sq(v[0]) + sq(v[1]))) + std::sin(pi * (sq(v[2]) + sq(v[3])))));
  });
  add("hundred_sines", "exp(mean_i sin(pi x_i / 2)^2), 100 inputs", box(100, -1, 1), [](V v) {
    double sum = 0;
    for (int i = 0; i < 100; ++i) sum += sin_square(v[i]);
    return std::exp(sum / 100);
  });

  // Special functions of two variables.
  add("bessel_j", "J_nu(x), nu in [0, 5], x in [0.1, 10]", {{0, 0.1}, {5, 10}}, [](V v) { return std::cyl_bessel_j(v[0], v[1]); });
  add("bessel_y", "Y_nu(x), nu in [0, 2], x in [1, 10]", {{0, 1}, {2, 10}}, [](V v) { return std::cyl_neumann(v[0], v[1]); });
  add("bessel_k", "K_nu(x), nu in [0, 2], x in [0.5, 5]", {{0, 0.5}, {2, 5}}, [](V v) { return std::cyl_bessel_k(v[0], v[1]); });
  add("bessel_i", "I_nu(x), nu in [0, 5], x in [0, 5]", {{0, 0}, {5, 5}}, [](V v) { return std::cyl_bessel_i(v[0], v[1]); });
  add("elliptic_f", "F(phi | m), phi in [0, pi/2], m in [0, 0.9]", {{0, 0}, {pi / 2, 0.9}},
      [](V v) { return std::ellint_1(std::sqrt(v[1]), v[0]); });
  add("elliptic_e", "E(phi | m), phi in [0, pi/2], m in [0, 1]", {{0, 0}, {pi / 2, 1}},
      [](V v) { return std::ellint_2(std::sqrt(std::min(v[1], 1.0)), v[0]); });
  add("harmonic_1_0", "Re Y_1^0(theta, phi)", {{0, 0}, {pi, 2 * pi}}, harmonic<1, 0>);
  add("harmonic_1_1", "Re Y_1^1(theta, phi)", {{0, 0}, {pi, 2 * pi}}, harmonic<1, 1>);
  add("harmonic_2_0", "Re Y_2^0(theta, phi)", {{0, 0}, {pi, 2 * pi}}, harmonic<2, 0>);
  add("harmonic_2_1", "Re Y_2^1(theta, phi)", {{0, 0}, {pi, 2 * pi}}, harmonic<2, 1>);
  add("harmonic_2_2", "Re Y_2^2(theta, phi)", {{0, 0}, {pi, 2 * pi}}, harmonic<2, 2>);

  // Feynman equations (Udrescu & Tegmark 2020), over ranges where they are smooth.
  add("feynman_i_6_20", "exp(-t^2 / (2 s^2)) / sqrt(2 pi s^2), t in [-3, 3], s in [1, 3]", {{-3, 1}, {3, 3}},
      [](V v) { return std::exp(-sq(v[0]) / (2 * sq(v[1]))) / std::sqrt(2 * pi * sq(v[1])); });
  add("feynman_i_8_4", "sqrt((x2 - x1)^2 + (y2 - y1)^2)", {{1, 1, 3, 3}, {2, 2, 5, 5}},
      [](V v) { return std::hypot(v[2] - v[0], v[3] - v[1]); });
  add("feynman_i_9_18", "G m1 m2 / ((x2 - x1)^2 + (y2 - y1)^2 + (z2 - z1)^2)", {{1, 1, 1, 1, 1, 1, 3, 3, 3}, {2, 2, 2, 2, 2, 2, 4, 4, 4}},
      [](V v) { return v[0] * v[1] * v[2] / (sq(v[6] - v[3]) + sq(v[7] - v[4]) + sq(v[8] - v[5])); });
  add("feynman_i_10_7", "m0 / sqrt(1 - v^2 / c^2)", {{1, 1, 3}, {5, 2, 10}},
      [](V v) { return v[0] / std::sqrt(1 - sq(v[1] / v[2])); });
  add("feynman_i_12_11", "q (E + B v sin(theta))", box(5, 1, 5),
      [](V v) { return v[0] * (v[1] + v[2] * v[3] * std::sin(v[4])); });
  add("feynman_i_13_12", "G m1 m2 (1 / r2 - 1 / r1)", box(5, 1, 5),
      [](V v) { return v[0] * v[1] * v[2] * (1 / v[4] - 1 / v[3]); });
  add("feynman_i_16_6", "(u + v) / (1 + u v / c^2)", box(3, 1, 5),
      [](V v) { return (v[0] + v[1]) / (1 + v[0] * v[1] / sq(v[2])); });
  add("feynman_i_26_2", "arcsin(n sin(theta)), n in [0, 0.99]", {{0, 0}, {0.99, 1.5}},
      [](V v) { return std::asin(v[0] * std::sin(v[1])); });
  add("feynman_i_29_16", "sqrt(x1^2 + x2^2 - 2 x1 x2 cos(t1 - t2))", box(4, 1, 5),
      [](V v) { return std::sqrt(sq(v[0]) + sq(v[1]) - 2 * v[0] * v[1] * std::cos(v[2] - v[3])); });
  add("feynman_i_50_26", "x1 (cos(w t) + a cos(w t)^2)", box(4, 1, 3), [](V v) {
    const double c = std::cos(v[1] * v[2]);
    return v[0] * (c + v[3] * sq(c));
  });
  return list;
}

}  // namespace

double FunctionSpec::operator()(const double* x) const {
  std::vector<double> v(low.size());
  for (size_t i = 0; i < v.size(); ++i) v[i] = low[i] + 0.5 * (x[i] + 1) * (high[i] - low[i]);
  return f(v.data());
}

const std::vector<FunctionSpec>& functions() {
  static const std::vector<FunctionSpec> list = make_functions();
  return list;
}

const FunctionSpec& find_function(const std::string& name) {
  std::vector<std::string> names;
  for (const FunctionSpec& spec : functions()) {
    if (spec.name == name) return spec;
    names.push_back(spec.name);
  }
  const std::string near = nearest_name(name, names);
  throw_error(fmt::format("function '{}' is unknown{}", name, near.empty() ? "" : "; did you mean " + near + "?"));
}

}  // namespace krait::data
