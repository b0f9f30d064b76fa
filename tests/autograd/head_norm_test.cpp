#include "autograd/head_norm.h"

#include <cmath>

#include "tests/testing/op_case.h"

using namespace krait;

namespace {

constexpr double kEps = 1e-3;

Tensor norm_of(const Tensor& x, const Tensor& w) {
  const int64_t p = x.size(-1), h = x.size(-2), n = x.numel() / p;
  Tensor y = empty_like(x);
  for (int64_t i = 0; i < n; ++i) {
    const double* v = x.data<double>() + i * p;
    double mean = 0, variance = 0;
    for (int64_t j = 0; j < p; ++j) mean += v[j] / static_cast<double>(p);
    for (int64_t j = 0; j < p; ++j) variance += (v[j] - mean) * (v[j] - mean) / static_cast<double>(p);
    for (int64_t j = 0; j < p; ++j)
      y.data<double>()[i * p + j] = (v[j] - mean) / std::sqrt(variance + kEps) * w.data<double>()[i % h * p + j];
  }
  return y;
}

const OpCase kCase{.name = "head_norm",
                   .run = [](const Vars& in) { return head_norm(in[0], in[1], kEps); },
                   .reference = [](const Vars& in) { return Variable(norm_of(in[0].data(), in[1].data())); },
                   .shapes = {{{1, 1, 1}, {1}}, {{3, 5, 4, 16}, {64}}, {{70, 3, 33}, {99}}, {{2, 2, 700}, {1400}},
                              {{0, 2, 8}, {16}}, {{2, 8}, {16}}, {{300, 5, 2}, {10}}},
                   .inputs = {Normal{}, Normal{.mean = 10}, Constant{0}},
                   .tolerance = {{DType::f32, 2e-5}, {DType::bf16, 2e-2}},
                   .fills = {{1, Normal{1, 0.2}}}};

}  // namespace

TEST_CASE("head_norm matches plain loops") { check_reference(kCase); }
TEST_CASE("head_norm passes gradcheck") { check_grad(kCase); }
TEST_CASE("head_norm: cuda equals cpu", "[cuda]") { check_twin(kCase); }

TEST_CASE("head_norm adds dw to a gradient buffer") {
  const Tensor x = random_tensor({40, 2, 8}, Normal{}, 1, DType::f32), dy = random_tensor({40, 2, 8}, Normal{}, 2, DType::f32);
  Variable w(ones({16}, DType::f32, kCpu), true);
  backward(head_norm(Variable(x), w, kEps), dy);
  const auto once = w.grad().to_vector<float>();
  w.set_grad(ones({16}, DType::f32, kCpu));
  backward(head_norm(Variable(x), w, kEps), dy);
  const auto added = w.grad().to_vector<float>();
  for (size_t j = 0; j < once.size(); ++j) CHECK(added[j] == 1.0F + once[j]);
}

TEST_CASE("head_norm names the shapes when refusing") {
  const auto t = [](const Shape& s) { return Variable(zeros(s, DType::f32, kCpu)); };
  CHECK(contains(error_of([&] { head_norm(t({2, 3, 4}), t({4}), kEps); }), "head_norm: weight is float32 (4,)"));
}
