#include "kernels/reduce.h"

#include <cmath>
#include <limits>

#include "core/parallel.h"
#include "tests/testing/tensors.h"

using namespace krait;

TEST_CASE("sums do not depend on the number of threads") {
  const std::vector<std::pair<Shape, kernels::Dims>> cases = {
      {{200003}, {}}, {{3, 40001}, {1}}, {{5000, 37}, {0}}, {{3, 900, 600}, {1}}, {{16, 8, 301}, {0, 2}}};
  for (const auto& [shape, dims] : cases) {
    const Tensor x = random_tensor(shape, Normal{}, 3, DType::f32);
    set_num_threads(1);
    const auto one = kernels::sum(x, dims).to_vector<float>();
    for (const int threads : {2, 3, 7}) {
      set_num_threads(threads);
      CHECK(kernels::sum(x, dims).to_vector<float>() == one);
    }
    set_num_threads(0);
    CHECK(relative_error(kernels::sum(x, dims), kernels::sum(x.to(DType::f64), dims)) < 3e-6);
  }
}

TEST_CASE("bf16 is summed in fp32") {
  const Tensor x = ones({4096}, DType::bf16, kCpu);
  CHECK(kernels::sum(x).item() == 4096);
  CHECK(kernels::mean(x).item() == 1);
}

TEST_CASE("amax and amin pass NaN on and keep infinities") {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> v(200, 1.0f);
  v[130] = nan;
  CHECK(std::isnan(kernels::amax(from_vector(v)).item()));
  CHECK(std::isnan(kernels::amin(from_vector(v)).item()));
  CHECK(kernels::argmax(from_vector(v), 0).item() == 130);
  CHECK(kernels::amax(from_vector<float>({-inf, -inf})).item() == -inf);
  CHECK(kernels::amin(from_vector<float>({-inf, 3})).item() == -inf);
}

TEST_CASE("logsumexp does not overflow and knows its limits") {
  const float inf = std::numeric_limits<float>::infinity();
  CHECK(kernels::logsumexp(from_vector<float>({1000, 1000})).item() == Approx(1000 + std::log(2.0)));
  CHECK(kernels::logsumexp(from_vector<float>({-1000, -1000})).item() == Approx(-1000 + std::log(2.0)));
  CHECK(kernels::logsumexp(from_vector<float>({-inf, -inf})).item() == -inf);
  CHECK(kernels::logsumexp(from_vector<float>({-inf, 0})).item() == 0);
  CHECK(kernels::logsumexp(from_vector<float>({inf, 0})).item() == inf);
  CHECK(kernels::logsumexp(zeros({3, 0}, DType::f32, kCpu), {1}).to_vector<float>() == std::vector<float>(3, -inf));
}

TEST_CASE("argmax is the first maximum along any dimension") {
  const Tensor x = from_vector<float>({1, 7, 7, 0, 9, 2, 9, 9, 2, 3, 3, 4}, {2, 2, 3});
  CHECK(kernels::argmax(x, -1).to_vector<int64_t>() == std::vector<int64_t>{1, 1, 0, 2});
  CHECK(kernels::argmax(x, 0).to_vector<int64_t>() == std::vector<int64_t>{1, 1, 0, 1, 0, 1});
  CHECK(kernels::argmax(x, 1).shape() == Shape{2, 3});
  CHECK(kernels::argmax(x, 1, true).shape() == Shape{2, 1, 3});
  CHECK(kernels::argmax(x, 1).to_vector<int64_t>() == std::vector<int64_t>{0, 1, 0, 0, 0, 1});
  CHECK(kernels::argmax(x.transpose(0, 2), 0).to_vector<int64_t>() == std::vector<int64_t>{1, 0, 1, 2});
}

TEST_CASE("sum_to undoes broadcasting") {
  const Tensor x = random_tensor({4, 3, 5}, Normal{}, 1);
  CHECK(kernels::sum_to(x, {4, 3, 5}).storage() == x.storage());
  CHECK(relative_error(kernels::sum_to(x, {3, 1}), kernels::sum(x, {0, 2}).view({3, 1})) < 1e-14);
  CHECK(relative_error(kernels::sum_to(x, {}), kernels::sum(x)) < 1e-14);
  CHECK(kernels::sum_to(x.slice(0, 0, 1), {3, 5}).shape() == Shape{3, 5});
  CHECK(contains(error_of([&] { kernels::sum_to(x, {2, 5}); }), "sum_to: (4, 3, 5) is no broadcast of (2, 5)"));
}

TEST_CASE("reductions of nothing, and refusals") {
  const Tensor none = zeros({0, 3}, DType::f32, kCpu);
  CHECK(kernels::sum(none, {0}).to_vector<float>() == std::vector<float>(3, 0.0f));
  CHECK(std::isnan(kernels::mean(none).item()));
  CHECK(contains(error_of([&] { kernels::amax(none, {0}); }), "amax: (0, 3) has no values"));
  CHECK(contains(error_of([&] { kernels::sum(none, {0, -2}); }), "names dimension -2 twice"));
  CHECK(contains(error_of([&] { kernels::sum(none, {2}); }), "dimension 2 is out of range for shape (0, 3)"));
  CHECK(contains(error_of([&] { kernels::sum(zeros({2}, DType::i64, kCpu)); }), "sum: expected float32"));
}
