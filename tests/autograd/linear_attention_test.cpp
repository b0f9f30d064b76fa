#include "autograd/linear_attention.h"

#include <cmath>
#include <map>

#include "autograd/elementwise.h"
#include "autograd/fft_conv.h"
#include "autograd/reduce.h"
#include "autograd/shape.h"
#include "autograd/ssd.h"
#include "tests/testing/golden.h"
#include "tests/testing/op_case.h"

using namespace krait;

namespace {

// Position by position in fp64: q, k, v, g, state.
Vars recurrent(const Vars& in, FeatureMap feature, double eps) {
  const Tensor &q = in[0].data(), &k = in[1].data(), &v = in[2].data();
  const int64_t b = q.size(0), l = q.size(1), h = q.size(2), dk = q.size(3), dv = v.size(3);
  const bool elu = feature == FeatureMap::elu1;
  const auto phi = [&](double x) { return elu ? (x > 0 ? x + 1 : std::exp(x)) : x; };
  Tensor y = zeros(v.shape(), DType::f64, kCpu), state = in[4].data().clone();
  const int64_t rows = linear_attention_rows(feature, dv);
  for (int64_t i = 0; i < b; ++i)
    for (int64_t t = 0; t < l; ++t)
      for (int64_t j = 0; j < h; ++j) {
        const int64_t at = (i * l + t) * h + j;
        const double keep = std::exp(in[3].data().data<double>()[at]);
        double* s = state.data<double>() + (i * h + j) * rows * dk;
        std::vector<double> out(static_cast<size_t>(rows), 0.0);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t n = 0; n < dk; ++n) {
            double& cell = s[r * dk + n];
            cell = keep * cell + (r < dv ? v.data<double>()[at * dv + r] : 1.0) * phi(k.data<double>()[at * dk + n]);
            out[static_cast<size_t>(r)] += cell * phi(q.data<double>()[at * dk + n]);
          }
        const double scale = elu ? 1 / (out.back() + eps) : 1 / std::sqrt(static_cast<double>(dk));
        for (int64_t r = 0; r < dv; ++r) y.data<double>()[at * dv + r] = out[static_cast<size_t>(r)] * scale;
      }
  return {Variable(y), Variable(state)};
}

OpCase case_of(FeatureMap feature, int64_t chunk) {
  const auto shapes = [&](int64_t b, int64_t l, int64_t h, int64_t dk, int64_t dv) -> std::vector<Shape> {
    return {{b, l, h, dk}, {b, l, h, dk}, {b, l, h, dv}, {b, l, h}, {b, h, linear_attention_rows(feature, dv), dk}};
  };
  return {.name = feature == FeatureMap::elu1 ? "linear attention, elu + 1" : "linear attention, identity",
          .run =
              [=](const Vars& in) {
                const DType sums = accum_dtype(in[0].dtype());
                const auto out = linear_attention(in[0], in[1], in[2], cast(in[3], sums), cast(in[4], sums),
                                                  {.feature = feature, .chunk = chunk});
                return Vars{out.y, out.state};
              },
          .reference = [=](const Vars& in) { return recurrent(in, feature, 1e-6); },
          .shapes = {shapes(2, 19, 3, 5, 4), shapes(1, 1, 1, 3, 1), shapes(1, 33, 2, 4, 7), shapes(0, 3, 2, 4, 4),
                     shapes(2, 0, 1, 3, 2)},
          .tolerance = {{f32, 2e-5}, {bf16_type, 3e-2}},
          .fills = {{3, Uniform{-1, 0}}, {4, Uniform{0.5, 1}}}};  // a state with z > 0, as sums of keys are
}

}  // namespace

TEST_CASE("linear attention equals its recurrence") {
  for (const FeatureMap f : {FeatureMap::elu1, FeatureMap::identity}) check_reference(case_of(f, 8));
}
TEST_CASE("linear attention passes gradcheck") {
  for (const FeatureMap f : {FeatureMap::elu1, FeatureMap::identity}) check_grad(case_of(f, 8));
}
TEST_CASE("linear attention: cuda equals cpu", "[cuda]") {
  for (const FeatureMap f : {FeatureMap::elu1, FeatureMap::identity}) check_twin(case_of(f, 8));
}

TEST_CASE("linear attention names the shapes it refuses") {
  const auto v = [](const Shape& s) { return Variable(zeros(s, DType::f32, kCpu)); };
  CHECK(contains(error_of([&] { linear_attention(v({1, 2, 3, 4}), v({1, 2, 3, 5}), v({1, 2, 3, 4}), {}, {}); }),
                 "linear_attention: q is (1, 2, 3, 4), k (1, 2, 3, 5)"));
}

namespace {

constexpr DType kTypes[] = {DType::f64, DType::f32, DType::bf16};

// Data sets of "in/" as leaves, and their gradients.
struct Leaves {
  const GoldenCase& golden;
  DType dtype;
  Device device;
  std::map<std::string, Variable> all = {};
  Variable operator()(const std::string& name, bool wide = false) {
    const std::string path = "in/" + name;
    if (!golden.has(path)) return {};
    return all[path] = Variable(golden.tensor(path).to(wide ? accum_dtype(dtype) : dtype).to(device), true);
  }
  void check(const std::string& path, const Tensor& value) const {
    golden.check_within(path, value, golden.tolerance(path, dtype));
  }
  void check_grads() const {
    for (const auto& [path, v] : all) check("grad/" + path, v.grad());
  }
};

void check_linear_attention(const GoldenCase& c, DType dtype, int64_t chunk, Device device) {
  INFO(c.name() << " " << name_of(dtype) << " chunk " << chunk);
  Leaves leaf{c, dtype, device};
  const auto by_position = [](const Variable& v) { return v.defined() ? transpose(v, 1, 2) : v; };  // (b, h, l) -> (b, l, h)
  LinearAttentionOptions options{.eps = c.number("eps"), .chunk = chunk};
  if (c.text("feature") == "id") options.feature = FeatureMap::identity;
  const Variable S0 = leaf("S0", true);
  const auto out = linear_attention(by_position(leaf("q")), by_position(leaf("k")), by_position(leaf("v")),
                                    by_position(leaf("log_decay", true)), S0.defined() ? transpose(S0, 2, 3) : S0, options);
  const int64_t dv = out.y.size(3);
  const Variable y = by_position(out.y), S = transpose(slice(out.state, 2, 0, dv), 2, 3);
  leaf.check("out/y", y.data());
  leaf.check("state/S_last", S.data());
  backward({y, S}, {c.tensor("upstream/y").to(dtype).to(device), c.tensor("upstream/S_last").to(S.dtype()).to(device)});
  leaf.check_grads();
}

// Y = (M o C B^T) X with the masks of structured attention (Dao & Gu 2024, section 4).
void check_masked(const GoldenCase& c, DType dtype, Device device) {
  INFO(c.name() << " " << name_of(dtype));
  Leaves leaf{c, dtype, device};
  const Variable B = leaf("B"), C = leaf("C"), X = leaf("X");
  const int64_t l = X.size(0), p = X.size(1), n = B.size(1);
  const auto one_head = [&](const Variable& v) { return reshape(v, {1, l, 1, v.size(1)}); };
  const auto scan = [&](const Variable& log_decay) {  // (l)
    return ssd_scan(one_head(X), reshape(log_decay, {1, l, 1}), one_head(B), one_head(C), 4).y;
  };
  const std::string mask = c.text("mask");
  Variable Y;
  if (mask == "causal") {
    Y = scan(Variable(zeros({l}, accum_dtype(dtype), device)));
  } else if (mask == "decay") {
    Y = scan(expand(reshape(leaf("log_gamma", true), {1}), {l}));
  } else if (mask == "semiseparable") {
    Y = scan(leaf("log_a", true));
  } else {  // toeplitz: a long convolution of x (x) B with m, read out by C
    const Variable outer = reshape(expand(unsqueeze(X, 2), {l, p, n}) * expand(unsqueeze(B, 1), {l, p, n}), {1, l, p * n});
    const Variable h = fft_conv(outer, contiguous(expand(unsqueeze(leaf("m", true), 0), {p * n, l})));
    Y = sum(reshape(h, {l, p, n}) * expand(unsqueeze(C, 1), {l, p, n}), -1);
  }
  Y = reshape(Y, {l, p});
  leaf.check("out/Y", Y.data());
  backward(Y, c.tensor("upstream/Y").to(dtype).to(device));
  leaf.check_grads();
}

void check_goldens(Device device) {
  for (const DType dtype : kTypes) {
    for (const int64_t chunk : {3, 64})
      for_each_golden("baselines.h5", "linear_attention_",
                      [&](const GoldenCase& c) { check_linear_attention(c, dtype, chunk, device); });
    for_each_golden("baselines.h5", "masked_attention_", [&](const GoldenCase& c) { check_masked(c, dtype, device); });
  }
}

}  // namespace

TEST_CASE("linear attention and masked structured attention meet their goldens") { check_goldens(kCpu); }
TEST_CASE("linear attention and masked structured attention meet their goldens on cuda", "[cuda]") {
  check_goldens(cuda_device());
}
