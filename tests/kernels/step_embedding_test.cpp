#include "kernels/step_embedding.h"

#include <cmath>

#include "kernels/elementwise.h"
#include "kernels/embedding.h"
#include "tests/testing/tensors.h"

using namespace krait;

namespace {

struct Sizes { int64_t n, v, p, d; };
constexpr Sizes kSizes[] = {{1, 7, 5, 8}, {3, 50, 20, 33}, {8, 300, 64, 768}, {2, 11, 3, 2056}};

struct Case {
  Case(const Sizes& s, DType t)
      : table(random_tensor({s.v, s.d}, Normal{}, 1, t).to(t)), places(random_tensor({s.p, s.d}, Normal{}, 2, t).to(t)) {
    std::vector<int64_t> token;
    std::vector<int32_t> place;
    for (int64_t i = 0; i < s.n; ++i) token.push_back((5 * i + 3) % s.v), place.push_back(static_cast<int32_t>((7 * i + 1) % s.p));
    tokens = from_vector(token, {s.n, 1});
    positions = from_vector(place, {s.n, 1});
  }
  Tensor table, places, tokens, positions;
};

}  // namespace

TEST_CASE("step_embedding is the sum of two embeddings, to the bit") {
  for (const Sizes& s : kSizes)
    for (const DType t : {DType::f32, DType::bf16, DType::f64}) {
      const Case c(s, t);
      const Tensor own = kernels::embedding_forward(c.table, c.tokens), place = kernels::embedding_forward(c.places, c.positions);
      const Tensor y = kernels::step_embedding(c.table, c.tokens, c.places, c.positions);
      CHECK(y.shape() == Shape{s.n, 1, s.d});
      CHECK(y.to(f64).to_vector<double>() == kernels::add(own, place).to(f64).to_vector<double>());
      CHECK(kernels::step_embedding(c.table, c.tokens, {}, {}).to(f64).to_vector<double>() == own.to(f64).to_vector<double>());
    }
}

TEST_CASE("step_embedding: cuda equals cpu, and NaN stands for what is outside", "[cuda]") {
  const Device gpu = cuda_device();
  for (const Sizes& s : kSizes)
    for (const DType t : {DType::f32, DType::bf16, DType::f64}) {
      const Case c(s, t);
      const auto both = [&](const Tensor& places, const Tensor& positions) {
        const Tensor there = kernels::step_embedding(c.table.to(gpu), c.tokens.to(gpu), places.defined() ? places.to(gpu) : places,
                                                     positions.defined() ? positions.to(gpu) : positions);
        CHECK(there.cpu().to(f64).to_vector<double>() == kernels::step_embedding(c.table, c.tokens, places, positions).to(f64).to_vector<double>());
      };
      both(c.places, c.positions);
      both({}, {});
      const Tensor wrong = from_vector<int64_t>({s.v}, {1, 1}).to(gpu), first = from_vector<int32_t>({0}, {1, 1}).to(gpu);
      for (const double v : kernels::step_embedding(c.table.to(gpu), wrong, c.places.to(gpu), first).cpu().to(f64).to_vector<double>()) CHECK(std::isnan(v));
    }
}

TEST_CASE("step_embedding refuses what does not fit") {
  const Case c(kSizes[0], DType::f32);
  CHECK(contains(error_of([&] { kernels::step_embedding(c.table, c.tokens, c.places, {}); }), "come together"));
  CHECK(contains(error_of([&] { kernels::step_embedding(c.table, c.tokens, c.places, c.tokens); }), "step_embedding: places"));
  CHECK(contains(error_of([&] { kernels::step_embedding(c.table, from_vector<int64_t>({7}), {}, {}); }), "outside [0, 7)"));
}
