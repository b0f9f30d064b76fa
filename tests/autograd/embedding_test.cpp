#include "autograd/embedding.h"

#include <cmath>

#include "tests/testing/op_case.h"

using namespace krait;

namespace {

OpCase embedding_case(DType index, int64_t v, std::vector<std::vector<Shape>> shapes) {
  return {.name = fmt::format("embedding of {} tokens below {}", index, v),
          .run = [=](const Vars& in) { return embedding(in[0], in[1].data().to(index)); },
          .reference =
              [](const Vars& in) {
                const int64_t d = in[0].size(1), n = in[1].data().numel();
                Tensor y = empty(in[1].shape().append(d), DType::f64, kCpu);
                for (int64_t i = 0; i < n; ++i)
                  for (int64_t j = 0; j < d; ++j)
                    y.data<double>()[i * d + j] =
                        in[0].data().data<double>()[in[1].data().data<int64_t>()[i] * d + j];
                return Variable(y);
              },
          .shapes = std::move(shapes),
          .inputs = {Normal{}, Normal{.mean = 100}, Constant{0}},
          .integers = {{1, {0, v}}}};
}

std::vector<OpCase> cases() {
  return {embedding_case(DType::i64, 11, {{{11, 1}, {1}}, {{11, 33}, {3, 5}}, {{11, 8}, {0}}, {{11, 0}, {4}}}),
          // Runs longer than a chunk of the sorted positions, and many runs within one.
          embedding_case(DType::i32, 3, {{{3, 40}, {700}}}), embedding_case(DType::i64, 1, {{{1, 24}, {129}}}),
          embedding_case(DType::i32, 5000, {{{5000, 48}, {13, 41}}})};
}

Tensor repeated_tokens(int64_t n, int64_t v) {
  Tensor t = random_integers({n}, {0, v}, 9);
  for (int64_t i = 0; i < n; i += 2) t.data<int64_t>()[i] = 5;  // one long run among short ones
  return t;
}

// fp32 buffer under a bf16 table, twice, against fp64 sums in order.
void check_buffer_and_bits(Device device) {
  const int64_t n = 3001, v = 300;
  for (const int64_t d : {33, 64}) {
    const Tensor tokens = repeated_tokens(n, v), dy = random_tensor({n, d}, Normal{}, 2, DType::bf16);
    std::vector<double> expected(static_cast<size_t>(v * d), 0.5);
    const auto g = dy.to_vector<double>();
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < d; ++j)
        expected[static_cast<size_t>(tokens.data<int64_t>()[i] * d + j)] += g[static_cast<size_t>(i * d + j)];
    std::vector<float> first;
    for (int trial = 0; trial < 2; ++trial) {
      Variable table(random_tensor({v, d}, Normal{}, 1, DType::bf16).to(device), true);
      table.set_grad(full({v, d}, 0.5, DType::f32, device));
      backward(embedding(table, tokens.to(device)), dy.to(device));
      CHECK(relative_error(table.grad(), from_vector(expected, {v, d})) < 1e-5);
      if (trial == 0)
        first = table.grad().to_vector<float>();
      else
        CHECK(table.grad().to_vector<float>() == first);
    }
  }
}

}  // namespace

TEST_CASE("embedding matches plain loops") {
  for (const OpCase& c : cases()) check_reference(c);
}
TEST_CASE("embedding passes gradcheck") {
  for (const OpCase& c : cases()) check_grad(c);
}
TEST_CASE("embedding: cuda equals cpu", "[cuda]") {
  for (const OpCase& c : cases()) check_twin(c);
}
TEST_CASE("embedding adds to a gradient buffer and repeats bit for bit") { check_buffer_and_bits(kCpu); }
TEST_CASE("embedding adds to a gradient buffer and repeats bit for bit, on cuda", "[cuda]") {
  check_buffer_and_bits(cuda_device());
}

TEST_CASE("embedding names the token outside its table") {
  const Variable table(zeros({4, 2}, DType::f32, kCpu));
  CHECK(contains(error_of([&] { embedding(table, from_vector<int64_t>({0, 3, 4})); }),
                 "embedding: token 4 at position 2 is outside [0, 4)"));
  CHECK(contains(error_of([&] { embedding(table, from_vector<int32_t>({-1})); }), "token -1 at position 0"));
  CHECK(contains(error_of([&] { embedding(table, from_vector<float>({0})); }), "tokens are float32"));
}

TEST_CASE("embedding on cuda answers a token outside its table with NaN and drops its gradient", "[cuda]") {
  Variable table(ones({4, 8}, DType::f32, cuda_device()), true);
  const Variable y = embedding(table, from_vector<int64_t>({1, 4, -1, 1}).to(cuda_device()));
  backward(y, ones(y.shape(), DType::f32, cuda_device()));
  const auto values = y.data().to_vector<float>(), grad = table.grad().to_vector<float>();
  for (size_t i = 0; i < values.size(); ++i) CHECK(std::isnan(values[i]) == (i / 8 == 1 || i / 8 == 2));
  for (size_t i = 0; i < grad.size(); ++i) CHECK(grad[i] == (i / 8 == 1 ? 2.0F : 0.0F));
}
