#include "autograd/dropout.h"

#include <cmath>

#include "autograd/elementwise.h"
#include "core/parallel.h"
#include "core/random.h"
#include "kernels/dropout.h"
#include "tests/testing/op_case.h"

using namespace krait;

namespace {

Tensor step_at(int64_t value, Device device = kCpu) { return from_vector<int64_t>({value}).view({}).to(device); }

// The source of random numbers while a test runs.
struct Source {
  explicit Source(int64_t step, int64_t batch_offset = 0) { current_random() = {7, step_at(step), batch_offset}; }
  ~Source() { current_random() = {}; }
};

const std::vector<std::vector<Shape>> kShapes = {{{1}}, {{3, 5, 7}}, {{2, 4099}}, {{0, 3}}};

// u < p, straight from the definition in core/random.h.
bool dropped(int64_t element, uint64_t key, uint64_t step, double p) {
  const Philox r = philox(key, static_cast<uint64_t>(element / 4), step);
  return uniform_from_bits(r.word[element % 4]) < static_cast<float>(p);
}

OpFunction by_definition(double p, bool add) {
  return [=](const Vars& in) -> Outputs {
    auto v = in[0].data().to_vector<double>();
    const uint64_t key = random_key(7, "d");
    for (size_t i = 0; i < v.size(); ++i) {
      v[i] = dropped(static_cast<int64_t>(i), key, 3, p) ? 0 : v[i] / (1 - p);
      if (add) v[i] += in[1].data().to_vector<double>()[i];
    }
    return Variable(from_vector(v, in[0].shape()));
  };
}

Variable on_device(const Variable& x, const std::function<Variable()>& f) {
  current_random().step = step_at(3, x.device());
  return f();
}

OpCase plain() {
  OpCase c;
  c.name = "dropout";
  c.run = [](const Vars& in) { return on_device(in[0], [&] { return dropout(in[0], 0.25, "d"); }); };
  c.reference = by_definition(0.25, false);
  c.shapes = kShapes;
  return c;
}
// gelu, then dropout.
OpCase after_gelu(GeluForm form) {
  OpCase c = plain();
  c.name = "gelu_dropout";
  c.run = [=](const Vars& in) { return on_device(in[0], [&] { return gelu_dropout(in[0], form, 0.25, "d"); }); };
  c.reference = [=](const Vars& in) { return by_definition(0.25, false)({gelu(in[0], form)}); };
  c.shapes.push_back({{3, 35, 20}});
  return c;
}
OpCase fused() {
  OpCase c = plain();
  c.name = "dropout_add";
  c.run = [](const Vars& in) { return on_device(in[0], [&] { return dropout_add(in[0], in[1], 0.25, "d"); }); };
  c.reference = by_definition(0.25, true);
  c.shapes = {{{1}, {1}}, {{3, 5, 7}, {3, 5, 7}}, {{3, 1031}, {3, 1031}}, {{0, 3}, {0, 3}}};
  return c;
}

}  // namespace

TEST_CASE("dropout keeps what the stream of random numbers says") {
  const Source source(3);
  check_reference(plain());
  check_reference(fused());
  check_reference(after_gelu(GeluForm::erf));
}
TEST_CASE("dropout passes gradcheck") {
  const Source source(3);
  check_grad(plain());
  check_grad(fused());
  check_grad(after_gelu(GeluForm::erf));
  check_grad(after_gelu(GeluForm::tanh));
}
TEST_CASE("dropout: cuda equals cpu bit for bit", "[cuda]") {
  const Source source(3);
  OpCase a = plain(), b = fused();
  for (OpCase* c : {&a, &b}) {
    c->tolerance = {{DType::f32, 0}, {DType::bf16, 0}};
    c->shapes.push_back(std::vector<Shape>(c->shapes[0].size(), Shape{3, 35, 20}));  // whole groups of four
    check_twin(*c);
  }
}

TEST_CASE("gelu_dropout: cuda equals cpu", "[cuda]") {
  const Source source(3);
  check_twin(after_gelu(GeluForm::erf));
  check_twin(after_gelu(GeluForm::tanh));
}

TEST_CASE("a sequence's mask depends on its global index, not on the rank or its place in the batch") {
  const Tensor x = ones({4, 3, 11}, DType::f32, kCpu);
  const auto run = [&](int64_t begin, int64_t end) {
    const Source source(5, begin);
    return dropout(Variable(x.slice(0, begin, end)), 0.5, "d").data().to_vector<float>();
  };
  const auto whole = run(0, 4);
  for (int64_t row = 0; row < 4; ++row) {
    const auto one = run(row, row + 1);
    CHECK(std::equal(one.begin(), one.end(), whole.begin() + row * 33));
  }
  CHECK(!std::equal(whole.begin(), whole.begin() + 33, whole.begin() + 33));
}

TEST_CASE("steps and streams give other masks; threads do not") {
  const Variable x(ones({100003}, DType::f32, kCpu));
  const auto run = [&](int64_t step, const char* stream) {
    const Source source(step);
    return dropout(x, 0.5, stream).data().to_vector<float>();
  };
  const auto a = run(1, "a");
  CHECK(a != run(2, "a"));
  CHECK(a != run(1, "b"));
  set_num_threads(1);
  CHECK(a == run(1, "a"));
  set_num_threads(0);
}

TEST_CASE("dropout keeps the mean and drops the fraction asked for") {
  const Source source(1);
  const Variable x(ones({1000000}, DType::f32, kCpu));
  for (const double p : {0.1, 0.5, 0.9}) {
    double zero = 0, total = 0;
    for (const float v : dropout(x, p, "d").data().to_vector<float>()) {
      zero += v == 0;
      total += v;
    }
    CHECK(std::abs(zero / 1e6 - p) < 4 * std::sqrt(p * (1 - p) / 1e6));
    CHECK(total / 1e6 == Approx(1).margin(4 * std::sqrt(p / (1 - p) / 1e6)));
  }
}

TEST_CASE("dropout of p = 0 is the input itself, and refusals say what is missing") {
  const Variable x(ones({3}, DType::f32, kCpu));
  CHECK(dropout(x, 0, "d").data().storage() == x.data().storage());
  current_random() = {};
  CHECK(contains(error_of([&] { dropout(x, 0.5, "d"); }), "the step is undefined"));
  const Source source(0);
  CHECK(contains(error_of([&] { dropout(x, 1.0, "d"); }), "p is 1, expected 0 <= p < 1"));
  CHECK(contains(error_of([&] { dropout_add(x, Variable(ones({4}, DType::f32, kCpu)), 0.5, "d"); }),
                 "x (3,) does not match the residual (4,)"));
}

TEST_CASE("the threshold is the exact comparison with p") {
  for (const double p : {0.1, 0.25, 0.3, 0.5, 0.9, 1e-9}) {
    const uint32_t t = kernels::dropout_threshold(p);
    CHECK(static_cast<double>(t - 1) / 16777216.0 < p);
    CHECK(static_cast<double>(t) / 16777216.0 >= p);
  }
}

namespace {

// What two groups of ranks that cut positions and channels draw, put together again.
Tensor from_parts(const Tensor& x, int64_t pieces, int64_t slices) {
  Tensor out = empty_like(x);
  const int64_t l = x.size(1) / pieces, c = x.size(2) / slices;
  for (int64_t s = 0; s < pieces; ++s)
    for (int64_t t = 0; t < slices; ++t) {
      const auto part = [&](const Tensor& all) { return all.slice(1, s * l, (s + 1) * l).slice(2, t * c, (t + 1) * c); };
      Tensor to = part(out);
      copy_(to, dropout(Variable(part(x)), 0.5, "d", {s * l, x.size(1), t * c, x.size(2)}).data());
    }
  return out;
}

}  // namespace

TEST_CASE("a part of a tensor draws its part of the tensor's mask") {
  const Source source(5, 3);
  for (const Shape& shape : {Shape{2, 6, 9}, Shape{3, 1002, 3}, Shape{1, 6, 4098}, Shape{2, 3 * 512, 3 * 64}}) {
    const Tensor x = ones(shape, DType::f32, kCpu);
    const auto whole = dropout(Variable(x), 0.5, "d").data().to_vector<float>();
    for (const int64_t pieces : {1, 2, 3, 6})
      for (const int64_t slices : {1, 3}) REQUIRE(from_parts(x, pieces, slices).to_vector<float>() == whole);
  }
}

TEST_CASE("a part's mask on cuda is the cpu's", "[cuda]") {
  const Source source(5, 3);
  const Tensor x = testing::random_tensor({2, 3, 35}, Normal{}, 1, DType::f32);
  const DropoutPart part{4, 9, 35, 105};
  const auto cpu = dropout(Variable(x), 0.5, "d", part).data().to_vector<float>();
  const Device gpu = cuda_device(0);
  current_random().step = step_at(5, gpu);
  REQUIRE(dropout(Variable(x.to(gpu)), 0.5, "d", part).data().to_vector<float>() == cpu);
}
