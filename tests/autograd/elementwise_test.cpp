#include "autograd/elementwise.h"

#include <cmath>
#include <limits>

#include "kernels/elementwise.h"
#include "tests/testing/op_case.h"

using namespace krait;

namespace {

// The same function, value by value in double.
OpFunction by_value(double (*f)(double)) {
  return [f](const Vars& in) -> Outputs {
    auto v = in[0].data().to_vector<double>();
    for (double& x : v) x = f(x);
    return Variable(from_vector(v, in[0].shape()));
  };
}

// Broadcasting by hand, from the last dimension.
OpFunction by_pair(double (*f)(double, double)) {
  return [f](const Vars& in) -> Outputs {
    const Shape shape = broadcast_shapes(in[0].shape(), in[1].shape());
    const auto a = in[0].data().to_vector<double>(), b = in[1].data().to_vector<double>();
    std::vector<double> y(static_cast<size_t>(shape.numel()));
    const auto at = [&](const Shape& s, int64_t i) {
      int64_t offset = 0, step = 1;
      for (int64_t d = 1; d <= shape.ndim(); ++d) {
        const int64_t k = i % shape[-d];
        i /= shape[-d];
        if (d > s.ndim()) continue;
        if (s[-d] != 1) offset += k * step;
        step *= s[-d];
      }
      return static_cast<size_t>(offset);
    };
    for (int64_t i = 0; i < shape.numel(); ++i)
      y[static_cast<size_t>(i)] = f(a[at(in[0].shape(), i)], b[at(in[1].shape(), i)]);
    return Variable(from_vector(y, shape));
  };
}

const std::vector<std::vector<Shape>> kOne = {{{}}, {{1}}, {{3, 5}}, {{2, 1031}}, {{0, 4}}};
const std::vector<std::vector<Shape>> kTwo = {{{3, 5}, {3, 5}},          {{4, 33}, {33}},     {{33}, {4, 33}},
                                              {{2, 3, 7}, {2, 1, 7}},    {{5, 1}, {1, 6}},    {{2, 3, 4}, {}},
                                              {{3, 1, 5, 1}, {2, 1, 4}}, {{3, 700}, {3, 700}}, {{0, 3}, {3}},
                                              {{1031}, {1}}};

OpCase unary(const char* name, Variable (*f)(const Variable&), double (*reference)(double), Fill fill = Normal{}) {
  OpCase c;
  c.name = name;
  c.run = [f](const Vars& in) { return f(in[0]); };
  c.reference = by_value(reference);
  c.shapes = kOne;
  c.inputs = {fill};
  return c;
}

OpCase binary(const char* name, OpFunction f, double (*reference)(double, double), Fill b = Normal{},
              Fill a = Normal{}) {
  OpCase c;
  c.name = name;
  c.run = std::move(f);
  c.reference = by_pair(reference);
  c.shapes = kTwo;
  c.inputs = {a};
  c.fills = {{1, b}};
  return c;
}

double sigmoid1(double x) { return 1 / (1 + std::exp(-x)); }

std::vector<OpCase> cases() {
  const Fill positive = Uniform{0.3, 3.0}, away = Uniform{0.2, 2.0};
  std::vector<OpCase> all = {
      unary("neg", neg, [](double x) { return -x; }),
      unary("exp", exp, [](double x) { return std::exp(x); }),
      unary("expm1", expm1, [](double x) { return std::expm1(x); }),
      unary("log", log, [](double x) { return std::log(x); }, positive),
      unary("log1p", log1p, [](double x) { return std::log1p(x); }, positive),
      unary("sqrt", sqrt, [](double x) { return std::sqrt(x); }, positive),
      unary("rsqrt", rsqrt, [](double x) { return 1 / std::sqrt(x); }, positive),
      unary("square", square, [](double x) { return x * x; }),
      unary("reciprocal", reciprocal, [](double x) { return 1 / x; }, positive),
      unary("abs", abs, [](double x) { return std::fabs(x); }),
      unary("sin", sin, [](double x) { return std::sin(x); }),
      unary("cos", cos, [](double x) { return std::cos(x); }),
      unary("tanh", tanh, [](double x) { return std::tanh(x); }),
      unary("sigmoid", sigmoid, sigmoid1),
      unary("erf", erf, [](double x) { return std::erf(x); }),
      unary("softplus", softplus, [](double x) { return std::log1p(std::exp(x)); }),
      unary("logsigmoid", logsigmoid, [](double x) { return -std::log1p(std::exp(-x)); }),
      unary("relu", relu, [](double x) { return std::max(x, 0.0); }),
      unary("x + 1.5", [](const Variable& x) { return 1.5 + x; }, [](double x) { return x + 1.5; }),
      unary("x - 1.5", [](const Variable& x) { return x - 1.5; }, [](double x) { return x - 1.5; }),
      unary("1.5 - x", [](const Variable& x) { return 1.5 - x; }, [](double x) { return 1.5 - x; }),
      unary("-3 x / 2", [](const Variable& x) { return -3.0 * x / 2.0; }, [](double x) { return -1.5 * x; }),
      unary("2 / x", [](const Variable& x) { return 2.0 / x; }, [](double x) { return 2 / x; }, away),
      unary("x^2.5", [](const Variable& x) { return pow(x, 2.5); }, [](double x) { return std::pow(x, 2.5); }, away),
      unary("x^3", [](const Variable& x) { return pow(x, 3.0); }, [](double x) { return x * x * x; }),
      unary("x^0", [](const Variable& x) { return pow(x, 0.0); }, [](double) { return 1.0; }, Constant{0}),
      unary("clamp", [](const Variable& x) { return clamp(x, -0.5, 0.75); },
            [](double x) { return std::min(std::max(x, -0.5), 0.75); }),
      binary("+", [](const Vars& in) { return in[0] + in[1]; }, [](double a, double b) { return a + b; }),
      binary("-", [](const Vars& in) { return in[0] - in[1]; }, [](double a, double b) { return a - b; }),
      binary("*", [](const Vars& in) { return in[0] * in[1]; }, [](double a, double b) { return a * b; }),
      binary("/", [](const Vars& in) { return in[0] / in[1]; }, [](double a, double b) { return a / b; }, away),
      binary("pow", [](const Vars& in) { return pow(in[0], in[1]); },
             [](double a, double b) { return std::pow(a, b); }, Normal{}, away),
      binary("maximum", [](const Vars& in) { return maximum(in[0], in[1]); },
             [](double a, double b) { return std::max(a, b); }),
      binary("minimum", [](const Vars& in) { return minimum(in[0], in[1]); },
             [](double a, double b) { return std::min(a, b); }),
      binary("where", [](const Vars& in) { return where(kernels::less(in[0].data(), in[1].data()), in[0], in[1]); },
             [](double a, double b) { return a < b ? a : b; })};
  for (OpCase& c : all) c.tolerance = {{DType::f32, 2e-6}, {DType::bf16, 1e-2}};
  return all;
}

}  // namespace

TEST_CASE("elementwise functions equal the standard library's, with broadcasting and any strides") {
  for (const OpCase& c : cases()) check_reference(c);
}
TEST_CASE("elementwise functions pass gradcheck") {
  for (OpCase& c : cases()) check_grad(c);
}
TEST_CASE("elementwise functions: cuda equals cpu", "[cuda]") {
  for (const OpCase& c : cases()) check_twin(c);
}

TEST_CASE("an operand used twice collects both gradients") {
  const Variable x(from_vector<double>({3.0}), true);
  backward(x * x + x);
  CHECK(x.grad().item() == 7.0);
}

TEST_CASE("gradients of ties are shared, and of bounds kept") {
  const Variable a(from_vector<double>({1.0, 2.0}), true), b(from_vector<double>({1.0, 1.0}), true);
  backward(maximum(a, b), ones({2}, DType::f64, kCpu));
  CHECK(a.grad().to_vector<double>() == std::vector<double>{0.5, 1.0});
  CHECK(b.grad().to_vector<double>() == std::vector<double>{0.5, 0.0});
  const Variable c(from_vector<double>({-1.0, 0.0, 1.0, 2.0}), true);
  backward(clamp(c, 0.0, 1.0), ones({4}, DType::f64, kCpu));
  CHECK(c.grad().to_vector<double>() == std::vector<double>{0, 1, 1, 0});
}

TEST_CASE("elementwise refusals name the operation and both tensors") {
  const Variable a(zeros({2, 3}, DType::f32, kCpu)), b(zeros({4, 3}, DType::f32, kCpu)),
      c(zeros({2, 3}, DType::f64, kCpu)), i(zeros({2, 3}, DType::i64, kCpu));
  CHECK(contains(error_of([&] { a + b; }), "shapes (2, 3) and (4, 3) do not broadcast"));
  CHECK(contains(error_of([&] { a* c; }), "mul: dtypes differ: float32 (2, 3) cpu and float64 (2, 3) cpu"));
  CHECK(contains(error_of([&] { exp(i); }), "exp: expected float32, float64 or bfloat16, found int64"));
  CHECK(contains(error_of([&] { where(a.data(), a, a); }), "where: the mask is float32 (2, 3) cpu, expected bool"));
  CHECK(contains(error_of([&] { clamp(a, 1.0, 0.0); }), "clamp: the lower bound"));
}
