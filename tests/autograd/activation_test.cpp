#include "autograd/activation.h"

#include <cmath>
#include <limits>

#include "tests/testing/op_case.h"

using namespace krait;

namespace {

double silu_of(double x) { return x / (1 + std::exp(-x)); }
double gelu_erf_of(double x) { return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0))); }
double gelu_tanh_of(double x) {
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
}
double relu2_of(double x) { return x > 0 ? x * x : 0; }

Variable map(const Variable& x, double (*f)(double)) {
  Tensor y = empty_like(x.data());
  for (int64_t i = 0; i < y.numel(); ++i) y.data<double>()[i] = f(x.data().data<double>()[i]);
  return Variable(y);
}

Variable gated_map(const Variable& gate, const Variable& up, double (*f)(double)) {
  const Tensor g = gate.data().contiguous(), u = up.data().contiguous();
  Tensor y = empty_like(g);
  for (int64_t i = 0; i < y.numel(); ++i) y.data<double>()[i] = f(g.data<double>()[i]) * u.data<double>()[i];
  return Variable(y);
}

Variable packed_map(const Variable& x, double (*f)(double), bool gate_last) {
  const int64_t n = x.size(-1) / 2;
  const Variable first(x.data().slice(-1, 0, n)), last(x.data().slice(-1, n, 2 * n));
  return gate_last ? gated_map(last, first, f) : gated_map(first, last, f);
}

std::vector<OpCase> plain_cases() {
  const auto make = [](std::string name, Variable (*run)(const Variable&), double (*f)(double)) {
    return OpCase{.name = std::move(name),
                  .run = [=](const Vars& in) { return run(in[0]); },
                  .reference = [=](const Vars& in) { return map(in[0], f); },
                  .shapes = {{{1}}, {{3, 33}}, {{2, 5, 768}}, {{4099}}, {{0, 4}}, {{}}},
                  .inputs = {Normal{0, 2}, Normal{.mean = 100}, Normal{.mean = -100}, Constant{0}},
                  .grad_step = 1e-6};  // relu2 has a kink in its derivative at 0
  };
  return {make("silu", silu, silu_of), make("relu2", relu2, relu2_of),
          make("gelu_tanh", [](const Variable& x) { return gelu(x, GeluForm::tanh); }, gelu_tanh_of),
          make("gelu_erf", [](const Variable& x) { return gelu(x, GeluForm::erf); }, gelu_erf_of)};
}

std::vector<OpCase> gated_cases() {
  const auto make = [](std::string name, Variable (*run)(const Variable&, const Variable&), double (*f)(double)) {
    return OpCase{.name = std::move(name),
                  .run = [=](const Vars& in) { return run(in[0], in[1]); },
                  .reference = [=](const Vars& in) { return gated_map(in[0], in[1], f); },
                  .shapes = {{{1}, {1}}, {{3, 33}, {3, 33}}, {{2, 5, 768}, {2, 5, 768}}, {{2, 4099}, {2, 4099}},
                             {{0, 4}, {0, 4}}, {{3, 0}, {3, 0}}, {{40, 1}, {40, 1}}},
                  .inputs = {Normal{0, 2}, Normal{.mean = 100}, Constant{0}}};
  };
  const auto make_packed = [](std::string name, Variable (*run)(const Variable&), double (*f)(double),
                              bool gate_last = false) {
    return OpCase{.name = std::move(name),
                  .run = [=](const Vars& in) { return run(in[0]); },
                  .reference = [=](const Vars& in) { return packed_map(in[0], f, gate_last); },
                  .shapes = {{{2}}, {{3, 66}}, {{2, 5, 768}}, {{2, 2, 8198}}, {{0, 4}}, {{3, 0}}},
                  .inputs = {Normal{0, 2}, Normal{.mean = 100}, Constant{0}}};
  };
  return {make("swiglu", swiglu, silu_of),
          make("geglu", [](const Variable& g, const Variable& u) { return geglu(g, u, GeluForm::tanh); }, gelu_tanh_of),
          make_packed("swiglu_packed", swiglu_packed, silu_of),
          make_packed("geglu_packed", [](const Variable& x) { return geglu_packed(x, GeluForm::erf); }, gelu_erf_of),
          make_packed("glu", glu, [](double x) { return 1 / (1 + std::exp(-x)); }, true)};
}

}  // namespace

TEST_CASE("activations match plain loops") {
  for (const OpCase& c : plain_cases()) check_reference(c);
}
TEST_CASE("activations pass gradcheck") {
  for (const OpCase& c : plain_cases()) check_grad(c);
}
TEST_CASE("activations: cuda equals cpu", "[cuda]") {
  for (const OpCase& c : plain_cases()) check_twin(c);
}
TEST_CASE("gated units match plain loops") {
  for (const OpCase& c : gated_cases()) check_reference(c);
}
TEST_CASE("gated units pass gradcheck") {
  for (const OpCase& c : gated_cases()) check_grad(c);
}
TEST_CASE("gated units: cuda equals cpu", "[cuda]") {
  for (const OpCase& c : gated_cases()) check_twin(c);
}

TEST_CASE("swiglu reads both halves of one projection in place") {
  const Tensor x = random_tensor({2, 3, 14}, Normal{}, 1, DType::f32);
  const Variable apart = swiglu(Variable(x.slice(-1, 0, 7)), Variable(x.slice(-1, 7, 14)));
  CHECK(apart.data().to_vector<float>() == swiglu_packed(Variable(x)).data().to_vector<float>());
}

TEST_CASE("activations stay finite at the ends of the range") {
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16}) {
    const Tensor x = from_vector<double>({-1e4, -200, -89, 89, 200, 1e4}).to(dtype);
    for (const auto& c : plain_cases()) {
      const Variable v(x, true);
      const Variable y = c.run({v}).values[0];
      backward(y, ones(y.shape(), dtype, kCpu));
      INFO(c.name);
      for (const double value : y.data().to_vector<double>()) CHECK(std::isfinite(value));
      for (const double value : v.grad().to_vector<double>()) CHECK(std::isfinite(value));
    }
  }
}

TEST_CASE("gated units name both shapes when refusing") {
  const auto t = [](const Shape& s) { return Variable(zeros(s, DType::f32, kCpu)); };
  CHECK(contains(error_of([&] { swiglu(t({2, 3}), t({2, 4})); }), "gate is (2, 3), up is (2, 4)"));
  CHECK(contains(error_of([&] { swiglu_packed(t({2, 3})); }), "expected an even last dimension"));
}
