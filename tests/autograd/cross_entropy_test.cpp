#include "autograd/cross_entropy.h"

#include <cmath>

#include "autograd/elementwise.h"
#include "autograd/linear.h"
#include "tests/testing/op_case.h"

using namespace krait;

namespace {

constexpr CrossEntropyOptions kAll{.ignore_index = 1, .label_smoothing = 0.1, .z_loss = 0.01};
constexpr CrossEntropyOptions kCapped{.ignore_index = 1, .label_smoothing = 0.1, .z_loss = 0.01, .logit_cap = 1.5};

OpCase cross_entropy_case(const CrossEntropyOptions& o) {
  const auto reference = [o](const Vars& in) {
    const Tensor s = in[0].data().contiguous();
    const int64_t v = s.size(1), valid = o.valid_vocab ? o.valid_vocab : v;
    double sum = 0;
    int64_t kept = 0;
    for (int64_t i = 0; i < s.size(0); ++i) {
      const double* row = s.data<double>() + i * v;
      const int64_t y = in[1].data().contiguous().data<int64_t>()[i];
      if (y == o.ignore_index) continue;
      double z = 0, mean = 0;
      for (int64_t j = 0; j < valid; ++j) z += std::exp(row[j]), mean += row[j] / static_cast<double>(valid);
      const double lse = std::log(z);
      sum += (1 - o.label_smoothing) * (lse - row[y]) + o.label_smoothing * (lse - mean) + o.z_loss * lse * lse;
      ++kept;
    }
    return Variable(full({}, kept ? sum / static_cast<double>(kept) : 0.0, DType::f64, kCpu));
  };
  return {.name = "cross_entropy",
          .run = [o](const Vars& in) { return cross_entropy(in[0], in[1].data(), o); },
          .reference = reference,
          .shapes = {{{1, 5}, {1}}, {{7, 33}, {7}}, {{3, 4099}, {3}}, {{0, 8}, {0}}},
          .inputs = {Normal{}, Constant{0}},
          .integers = {{1, {0, 5}}}};
}

const OpCase kFused{
    .name = "linear_cross_entropy",
    .run = [](const Vars& in) { return linear_cross_entropy(in[0], in[1], in[2].data(), kAll, 1.0, 4).loss; },
    .reference =
        [](const Vars& in) { return cross_entropy(matmul(in[0], in[1], false, true), in[2].data(), kAll); },
    .shapes = {{{1, 3}, {6, 3}, {1}}, {{11, 7}, {33, 7}, {11}}, {{0, 3}, {5, 3}, {0}}},
    .integers = {{2, {0, 5}}}};

// The cap as an operation of its own, in front of the loss without one.
Variable capped(const Variable& logits) { return kCapped.logit_cap * tanh(logits / kCapped.logit_cap); }

const OpCase kCappedLoss{
    .name = "cross_entropy with a cap",
    .run = [](const Vars& in) { return cross_entropy(in[0], in[1].data(), kCapped); },
    .reference = [](const Vars& in) { return cross_entropy(capped(in[0]), in[1].data(), kAll); },
    .shapes = {{{1, 5}, {1}}, {{7, 33}, {7}}, {{3, 4099}, {3}}, {{0, 8}, {0}}},
    .inputs = {Normal{}, Normal{.mean = -0.5, .std = 2}, Constant{0}},  // ordinary, near the cap, degenerate
    .integers = {{1, {0, 5}}}};

const OpCase kCappedHead{
    .name = "linear_cross_entropy with a cap",
    .run = [](const Vars& in) { return linear_cross_entropy(in[0], in[1], in[2].data(), kCapped, 1.0, 4).loss; },
    .reference =
        [](const Vars& in) { return cross_entropy(capped(matmul(in[0], in[1], false, true)), in[2].data(), kAll); },
    .shapes = {{{1, 3}, {6, 3}, {1}}, {{11, 7}, {33, 7}, {11}}, {{5, 3}, {64, 3}, {5}}, {{0, 3}, {5, 3}, {0}}},
    .integers = {{2, {0, 5}}}};

struct Result {
  double loss;
  Tensor dx, dw;
};
Result train(bool fused, const Tensor& x_in, const Tensor& w_in, const Tensor& y, double seed, bool in_place,
             const CrossEntropyOptions& o, double loss_scale = 1.0) {
  const Variable x(x_in, true);
  Variable w(w_in, true);
  if (in_place) w.set_grad(zeros(w.shape(), accum_dtype(w.dtype()), w.device()));
  const Variable loss = fused ? linear_cross_entropy(x, w, y, o, loss_scale, 5).loss
                              : cross_entropy(linear(x, w), y, o);
  backward(loss, full({}, seed, loss.dtype(), loss.device()));
  return {loss.data().item(), x.grad(), w.grad()};
}

}  // namespace

TEST_CASE("cross entropy with every option matches plain loops") {
  check_reference(cross_entropy_case({}));
  check_reference(cross_entropy_case(kAll));
}
TEST_CASE("cross entropy passes gradcheck") {
  check_grad(cross_entropy_case({}));
  check_grad(cross_entropy_case(kAll));
}
TEST_CASE("cross entropy: cuda equals cpu", "[cuda]") {
  check_twin(cross_entropy_case({}));
  check_twin(cross_entropy_case(kAll));
  OpCase padded = cross_entropy_case({.valid_vocab = 5});
  check_twin(padded);
  padded.shapes = {{{9, 50304}, {9}}};
  check_twin(padded);
}
TEST_CASE("the fused head matches the unfused one") { check_reference(kFused); }
TEST_CASE("the fused head passes gradcheck") { check_grad(kFused); }
TEST_CASE("fused head: cuda equals cpu", "[cuda]") { check_twin(kFused); }

TEST_CASE("capped logits match the cap as an operation of its own") {
  check_reference(kCappedLoss);
  check_reference(kCappedHead);
}
TEST_CASE("cross entropy of capped logits passes gradcheck") {
  check_grad(kCappedLoss);
  check_grad(kCappedHead);
}
TEST_CASE("capped logits: cuda equals cpu", "[cuda]") {
  check_twin(kCappedLoss);
  check_twin(kCappedHead);
  OpCase padded = kCappedLoss;
  padded.run = [](const Vars& in) {
    CrossEntropyOptions o = kCapped;
    o.valid_vocab = 50257;
    return cross_entropy(in[0], in[1].data(), o);
  };
  padded.shapes = {{{9, 50304}, {9}}};
  check_twin(padded);
}

TEST_CASE("padded vocabulary columns count for nothing and get no gradient") {
  const Tensor s = random_tensor({6, 40}, Normal{}, 1), y = random_integers({6}, {0, 30}, 2);
  const Variable padded(s, true), cut(s.slice(1, 0, 30).contiguous(), true);
  const CrossEntropyOptions o{.label_smoothing = 0.1, .z_loss = 0.01};
  CrossEntropyOptions masked = o;
  masked.valid_vocab = 30;
  const Variable a = cross_entropy(padded, y, masked), b = cross_entropy(cut, y, o);
  CHECK(a.data().item() == Approx(b.data().item()).epsilon(1e-13));
  backward(a);
  backward(b);
  CHECK(relative_error(padded.grad().slice(1, 0, 30), cut.grad()) < 1e-13);
  CHECK(padded.grad().slice(1, 30, 40).contiguous().to_vector<double>() == std::vector<double>(60, 0.0));
}

TEST_CASE("a batch of ignored targets has loss 0 and gradient 0") {
  const Tensor y = full({5}, -100, DType::i64, kCpu), x = random_tensor({5, 4}, Normal{}, 1, f32);
  const Result r = train(true, x, random_tensor({7, 4}, Normal{}, 2, f32), y, 1.0, false, {.z_loss = 0.1});
  CHECK(r.loss == 0.0);
  CHECK(r.dx.to_vector<float>() == std::vector<float>(20, 0.0f));
  CHECK(r.dw.to_vector<float>() == std::vector<float>(28, 0.0f));
}

TEST_CASE("the fused head equals the unfused one: upstream gradients, in-place weights, int32 targets, bf16") {
  const Tensor x = random_tensor({13, 8}, Normal{}, 1), w = random_tensor({21, 8}, Normal{}, 2);
  const Tensor y = random_integers({13}, {0, 21}, 3);
  const Result plain = train(false, x, w, y, 0.25, false, kAll);
  const Result fused = train(true, x, w, y.to(DType::i32), 0.25, false, kAll);
  CHECK(fused.loss == Approx(plain.loss).epsilon(1e-13));
  CHECK(relative_error(fused.dx, plain.dx) < 1e-12);
  CHECK(relative_error(fused.dw, plain.dw) < 1e-12);
  const Result in_place = train(true, x, w, y, 1.0, true, kAll, 0.25);
  CHECK(in_place.loss == Approx(0.25 * plain.loss).epsilon(1e-13));
  CHECK(relative_error(in_place.dx, plain.dx) < 1e-12);
  CHECK(relative_error(in_place.dw, plain.dw) < 1e-12);

  const Tensor xb = x.to(bf16_type), wb = w.to(bf16_type);
  const Result wide = train(false, xb.to(f64), wb.to(f64), y, 1.0, false, kAll);
  const Result narrow = train(true, xb, wb, y, 1.0, true, kAll);
  CHECK(narrow.dw.dtype() == f32);
  CHECK(narrow.loss == Approx(wide.loss).epsilon(1e-2));
  CHECK(relative_error(narrow.dx, wide.dx) < 3e-2);
  CHECK(relative_error(narrow.dw, wide.dw) < 3e-2);
}

TEST_CASE("an external count replaces the number of kept targets") {
  const Variable s(random_tensor({4, 6}, Normal{}, 1, f32), true);
  const Tensor y = random_integers({4}, {0, 6}, 2), count = full({}, 16, f32, kCpu);
  const Variable a = cross_entropy(s, y, {}, count);
  CHECK(a.data().item() == Approx(cross_entropy(s, y).data().item() / 4));
  const Variable x(random_tensor({4, 3}, Normal{}, 3, f32)), w(random_tensor({6, 3}, Normal{}, 4, f32));
  const LossOut out = linear_cross_entropy(x, w, y, {}, 1.0, 0, count);
  CHECK(out.loss.data().item() == Approx(out.nll_sum.item() / 16));
  CHECK(out.count.item() == 16);
}

TEST_CASE("evaluation gives nll per token") {
  const Tensor x = random_tensor({9, 5}, Normal{}, 1, f32), w = random_tensor({30, 5}, Normal{}, 2, f32);
  Tensor y = random_integers({9}, {0, 30}, 3);
  y.data<int64_t>()[4] = -100;
  const Tensor nll = kernels::linear_cross_entropy_nll(x, w, y, {}, 4);
  CHECK(nll.shape() == Shape{9});
  CHECK(relative_error(nll, kernels::cross_entropy_forward(kernels::matmul(x, w, false, true), y, {}).nll) < 1e-6);
  CHECK(nll.to_vector<float>()[4] == 0.0f);
  const Tensor under_cap = kernels::linear_cross_entropy_nll(x, w, y, {.logit_cap = 1.5}, 4);
  const Tensor logits = capped(Variable(kernels::matmul(x, w, false, true))).data();
  CHECK(relative_error(under_cap, kernels::cross_entropy_forward(logits, y, {}).nll) < 1e-6);
}

TEST_CASE("cross entropy names what it refuses") {
  const Variable s(zeros({3, 6}, f32, kCpu), true), x(zeros({3, 2}, f32, kCpu), true);
  const auto targets = [](std::vector<int64_t> y) { return from_vector(y); };
  CHECK(contains(error_of([&] { cross_entropy(s, targets({0, 6, 1})); }), "target 1 is 6, expected 0 to 5"));
  CHECK(contains(error_of([&] { cross_entropy(s, targets({0, 4, -1}), {.valid_vocab = 4}); }),
                 "target 1 is 4, expected 0 to 3"));
  CHECK(contains(error_of([&] { cross_entropy(s, targets({0, 1})); }), "logits (3, 6) with targets"));
  CHECK(contains(error_of([&] { cross_entropy(s, targets({0, 1, 2}).to(f32)); }), "expected int64 or int32"));
  CHECK(contains(error_of([&] { cross_entropy(s, targets({0, 1, 2}), {.valid_vocab = 7}); }), "valid_vocab 7"));
  CHECK(contains(error_of([&] { cross_entropy(s, targets({0, 1, 2}), {.logit_cap = -1}); }), "logit_cap -1"));
  Variable w(zeros({6, 2}, f32, kCpu), true);
  w.set_grad(zeros({6, 2}, f32, kCpu));
  const Variable loss = linear_cross_entropy(x, w, targets({0, 1, 2})).loss;
  CHECK(contains(error_of([&] { backward(loss, full({}, 0.5, f32, kCpu)); }), "pass the factor as loss_scale"));
}
