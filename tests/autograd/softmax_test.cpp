#include "autograd/softmax.h"

#include <cmath>
#include <limits>

#include "autograd/elementwise.h"
#include "autograd/reduce.h"
#include "tests/testing/op_case.h"

using namespace krait;

namespace {

const std::vector<std::vector<Shape>> kShapes = {{{1}}, {{1, 1}}, {{3, 5, 33}}, {{2, 4099}}, {{40, 7}}, {{0, 8}}};

OpCase softmax_case() {
  OpCase c;
  c.name = "softmax";
  c.run = [](const Vars& in) { return softmax(in[0]); };
  c.reference = [](const Vars& in) {
    const Variable e = exp(in[0] - amax(Variable(in[0].data()), -1, keepdim));
    return e / sum(e, -1, keepdim);
  };
  c.shapes = kShapes;
  c.inputs = {Normal{}, Normal{.mean = 100, .std = 8}, Constant{-3}};
  c.tolerance = {{DType::f32, 1e-5}, {DType::bf16, 2e-2}};
  return c;
}

OpCase log_softmax_case() {
  OpCase c = softmax_case();
  c.name = "log_softmax";
  c.run = [](const Vars& in) { return log_softmax(in[0]); };
  c.reference = [](const Vars& in) { return in[0] - logsumexp(in[0], -1, keepdim); };
  // bf16: exp of a log-probability near -30 that was rounded to 8 bits
  c.tolerance = {{DType::f32, 1e-5}, {DType::bf16, 5e-2}};
  return c;
}

}  // namespace

TEST_CASE("softmax matches its definition") { check_reference(softmax_case()); }
TEST_CASE("softmax passes gradcheck") { check_grad(softmax_case()); }
TEST_CASE("softmax: cuda equals cpu", "[cuda]") { check_twin(softmax_case()); }
TEST_CASE("log_softmax matches its definition") { check_reference(log_softmax_case()); }
TEST_CASE("log_softmax passes gradcheck") { check_grad(log_softmax_case()); }
TEST_CASE("log_softmax: cuda equals cpu", "[cuda]") { check_twin(log_softmax_case()); }

TEST_CASE("softmax gives masked values zero probability and survives large values") {
  const float inf = std::numeric_limits<float>::infinity();
  const Variable x(from_vector<float>({-inf, 0, 0, -inf}));
  CHECK(softmax(x).data().to_vector<float>() == std::vector<float>{0, 0.5f, 0.5f, 0});
  CHECK(softmax(Variable(from_vector<float>({1e30f, -1e30f}))).data().to_vector<float>() == std::vector<float>{1, 0});
  CHECK(log_softmax(x).data().to_vector<float>()[0] == -inf);
  CHECK(contains(error_of([] { softmax(Variable(zeros({}, DType::f32, kCpu))); }), "softmax: a scalar"));
}
