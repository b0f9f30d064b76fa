#include "autograd/causal_conv1d.h"

#include <cmath>

#include "autograd/shape.h"
#include "kernels/causal_conv1d.h"
#include "tests/testing/op_case.h"

using namespace krait;

namespace {

double silu_of(double p) { return p / (1 + std::exp(-p)); }

// {y, final state} by loops over fp64 CPU tensors. segments may be empty; inputs are x, weight, bias, initial, of
// which the last two may be absent.
Vars plain(const Vars& in, bool silu, const std::vector<int32_t>& segments = {}) {
  const Tensor x = in[0].data().contiguous(), w = in[1].data().contiguous();
  const int64_t b = x.size(0), l = x.size(1), c = x.size(2), k = w.size(1);
  Tensor y = empty_like(x), last = zeros({b, k - 1, c}, f64, kCpu);
  const auto input = [&](int64_t r, int64_t s, int64_t t, int64_t i) {
    if (!segments.empty() && segments[static_cast<size_t>(r * l + std::max<int64_t>(s, 0))] != segments[static_cast<size_t>(r * l + t)]) return 0.0;
    if (s >= 0) return x.data<double>()[(r * l + s) * c + i];
    return in.size() > 3 ? in[3].data().contiguous().data<double>()[(r * (k - 1) + s + k - 1) * c + i] : 0.0;
  };
  for (int64_t r = 0; r < b; ++r)
    for (int64_t i = 0; i < c; ++i) {
      for (int64_t t = 0; t < l; ++t) {
        double p = in.size() > 2 ? in[2].data().contiguous().data<double>()[i] : 0.0;
        for (int64_t j = 0; j < k; ++j) p += w.data<double>()[i * k + j] * input(r, t - k + 1 + j, t, i);
        y.data<double>()[(r * l + t) * c + i] = silu ? silu_of(p) : p;
      }
      for (int64_t j = 0; j < k - 1; ++j) {
        double& to = last.data<double>()[(r * (k - 1) + j) * c + i];
        if (l > 0) to = input(r, l - k + 1 + j, l - 1, i);
        else if (in.size() > 3) to = in[3].data().contiguous().data<double>()[(r * (k - 1) + j) * c + i];
      }
    }
  return {Variable(y), Variable(last)};
}

Vars outputs(const ConvOut& out) { return {out.y, out.final_state}; }

const OpCase kWithState{.name = "causal_conv1d with state",
                        .run = [](const Vars& in) { return outputs(causal_conv1d(in[0], in[1], in[2], in[3], true)); },
                        .reference = [](const Vars& in) { return plain(in, true); },
                        .shapes = {{{1, 1, 1}, {1, 4}, {1}, {1, 3, 1}}, {{2, 2, 5}, {5, 4}, {5}, {2, 3, 5}},
                                   {{2, 9, 3}, {3, 1}, {3}, {2, 0, 3}}, {{1, 0, 3}, {3, 4}, {3}, {1, 3, 3}},
                                   {{3, 67, 5}, {5, 3}, {5}, {3, 2, 5}}, {{1, 130, 9}, {9, 8}, {9}, {1, 7, 9}},
                                   {{2, 5, 4}, {4, 11}, {4}, {2, 10, 4}}, {{1, 150, 3}, {3, 11}, {3}, {1, 10, 3}},
                                   {{2, 33, 530}, {530, 4}, {530}, {2, 3, 530}}, {{1, 2, 8}, {8, 4}, {8}, {1, 3, 8}},
                                   {{2, 71, 16}, {16, 4}, {16}, {2, 3, 16}}},
                        .inputs = {Normal{}, Normal{.mean = 3}}};

const OpCase kPlain{.name = "causal_conv1d without bias, state and silu",
                    .run = [](const Vars& in) { return outputs(causal_conv1d(in[0], in[1], {}, {}, false)); },
                    .reference = [](const Vars& in) { return plain(in, false); },
                    .shapes = {{{1, 1, 1}, {1, 2}}, {{2, 70, 6}, {6, 4}}, {{0, 4, 3}, {3, 4}}, {{2, 21, 2}, {2, 9}}, {{2, 70, 24}, {24, 4}}}};

// Documents of uneven length, one shorter than the filter, over more than one tile of 64.
std::vector<int32_t> documents(int64_t b, int64_t l, int64_t length) {
  std::vector<int32_t> s;
  for (int64_t r = 0; r < b; ++r)
    for (int64_t t = 0; t < l; ++t) s.push_back(static_cast<int32_t>((t + r) / length + (t > 63) + (t + 2 > l) + 3 * r));
  return s;
}

OpCase packed(int64_t k, int64_t length = 7) {
  OpCase c = kWithState;
  c.name = "causal_conv1d with documents";
  c.run = [length](const Vars& in) {
    const int64_t b = in[0].size(0), l = in[0].size(1);
    return outputs(causal_conv1d(in[0], in[1], in[2], in[3], true,
                                 from_vector(documents(b, l, length), {b, l}).to(in[0].device())));
  };
  c.reference = [length](const Vars& in) { return plain(in, true, documents(in[0].size(0), in[0].size(1), length)); };
  c.shapes = {{{2, 131, 5}, {5, k}, {5}, {2, k - 1, 5}}, {{1, 2, 3}, {3, k}, {3}, {1, k - 1, 3}},
              {{1, 1, 3}, {3, k}, {3}, {1, k - 1, 3}}, {{2, 75, 8}, {8, k}, {8}, {2, k - 1, 8}}};
  c.inputs = {Normal{}};
  return c;
}

// Where four positions go together several times within a document, over whole vectors of channels and some more.
OpCase packed_long() {
  OpCase c = packed(4, 23);
  c.shapes = {{{2, 131, 21}, {21, 4}, {21}, {2, 3, 21}}, {{1, 90, 16}, {16, 4}, {16}, {1, 3, 16}}};
  return c;
}

// x as the first or second half of a wider tensor, the way a layer's projection hands it over.
const OpCase kHalf{.name = "causal_conv1d of a slice",
                   .run =
                       [](const Vars& in) {
                         const Vars halves = chunk(in[0], 2, -1);
                         return Vars{causal_conv1d(halves[1], in[1], {}, {}, false).y};
                       },
                   .reference =
                       [](const Vars& in) {
                         const int64_t c = in[0].size(-1) / 2;
                         return Vars{plain({Variable(in[0].data().slice(-1, c, 2 * c)), in[1]}, false)[0]};
                       },
                   .shapes = {{{2, 37, 10}, {5, 4}}, {{1, 1, 2}, {1, 4}}, {{2, 37, 16}, {8, 4}}, {{2, 37, 42}, {21, 4}}}};

}  // namespace

TEST_CASE("causal_conv1d matches plain loops") {
  check_reference(kWithState);
  check_reference(kPlain);
  check_reference(kHalf);
  for (const int64_t k : {2, 4, 6, 10}) check_reference(packed(k));
  check_reference(packed_long());
}

TEST_CASE("causal_conv1d passes gradcheck") {
  check_grad(kWithState);
  check_grad(kPlain);
  for (const int64_t k : {2, 4, 6, 10}) check_grad(packed(k));
  check_grad(packed_long());
}

TEST_CASE("causal_conv1d: cuda equals cpu", "[cuda]") {
  check_twin(kWithState);
  check_twin(kPlain);
  check_twin(kHalf);
  for (const int64_t k : {2, 4, 6, 10}) check_twin(packed(k));
  check_twin(packed_long());
}

TEST_CASE("causal_conv1d_step by step gives the whole convolution") {
  const Tensor x = random_tensor({2, 13, 5}, Normal{}, 1), w = random_tensor({5, 4}, Normal{}, 2);
  const Tensor bias = random_tensor({5}, Normal{}, 3);
  Tensor state = random_tensor({2, 3, 5}, Normal{}, 4);
  const auto whole = kernels::causal_conv1d_forward(x, w, bias, state, true);
  for (int64_t t = 0; t < 13; ++t)
    CHECK(relative_error(kernels::causal_conv1d_step(state, x.select(1, t), w, bias, true), whole.y.select(1, t)) == 0);
  CHECK(relative_error(state, whole.final_state) == 0);
}

TEST_CASE("causal_conv1d takes fp32 weights with bf16 inputs and adds to gradient buffers") {
  const Variable x(random_tensor({3, 21, 8}, Normal{}, 1, DType::bf16), true);
  Variable w(random_tensor({8, 4}, Normal{}, 2, DType::f32), true), bias(random_tensor({8}, Normal{}, 3, DType::f32), true);
  const Tensor dy = random_tensor({3, 21, 8}, Normal{}, 4, DType::bf16);
  backward(causal_conv1d(x, w, bias, {}, true).y, dy);
  const auto dw = w.grad().to_vector<float>(), db = bias.grad().to_vector<float>();
  CHECK(w.grad().dtype() == DType::f32);
  w.set_grad(ones({8, 4}, DType::f32, kCpu));
  bias.set_grad(ones({8}, DType::f32, kCpu));
  backward(causal_conv1d(x, w, bias, {}, true).y, dy);
  for (size_t i = 0; i < dw.size(); ++i) CHECK(w.grad().to_vector<float>()[i] == 1.0F + dw[i]);
  for (size_t i = 0; i < db.size(); ++i) CHECK(bias.grad().to_vector<float>()[i] == 1.0F + db[i]);
}

TEST_CASE("causal_conv1d names both shapes when refusing") {
  const auto t = [](const Shape& s, DType d = DType::f32) { return Variable(zeros(s, d, kCpu)); };
  CHECK(contains(error_of([&] { causal_conv1d(t({2, 3}), t({3, 4}), {}, {}, true); }),
                 "causal_conv1d: x is (2, 3), expected (batch, length, channels)"));
  CHECK(contains(error_of([&] { causal_conv1d(t({2, 3, 5}), t({4, 4}), {}, {}, true); }),
                 "causal_conv1d: weight is (4, 4), expected (5, width) to match x (2, 3, 5)"));
  CHECK(contains(error_of([&] { causal_conv1d(t({2, 3, 5}), t({5, 4}), t({4}), {}, true); }), "bias is (4,), expected (5)"));
  CHECK(contains(error_of([&] { causal_conv1d(t({2, 3, 5}), t({5, 4}), {}, t({2, 4, 5}), true); }),
                 "the initial state is (2, 4, 5), expected (2, 3, 5)"));
  CHECK(contains(error_of([&] { causal_conv1d(t({2, 3, 5}), t({5, 4}, DType::f64), {}, {}, true); }), "weight is float64"));
  CHECK(contains(error_of([&] { causal_conv1d(t({2, 3, 5}), t({5, 4}), {}, {}, true, zeros({2, 4}, DType::i32, kCpu)); }),
                 "segments are (2, 4), expected (2, 3)"));
}
