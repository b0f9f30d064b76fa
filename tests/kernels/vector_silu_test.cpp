#include "kernels/cpu/vector_silu.h"

#include <bit>
#include <cmath>
#include <limits>

#include "core/random.h"
#include "kernels/activation.h"
#include "kernels/causal_conv1d.h"
#include "kernels/cpu/gated_row.h"
#include "tests/testing/catch.h"

using namespace krait;
using namespace krait::kernels;

namespace {

float silu_of(float x) {
  cpu::Vec<float> v[1] = {cpu::Vec<float>{} + x};
  cpu::vector_silu(v);
  return v[0][0];
}
float slope_of(float x) {
  cpu::Vec<float> v[1] = {cpu::Vec<float>{} + x};
  cpu::vector_silu_slope(v);
  return v[0][0];
}

double ulps(float y, double exact) {
  return std::fabs(static_cast<double>(y) - exact) / std::ldexp(1.0, std::max(std::ilogb(exact), -126) - 23);
}

}  // namespace

TEST_CASE("SiLU of vectors is within three units in the last place, its slope within those of its terms") {
  double value = 0, below = 0, above = 0;
  for (int i = 0; i <= 400000; ++i) {
    const float x = -86.5f + 126.0f * static_cast<float>(i) / 400000.0f;
    if (x == 0.0f) continue;
    const double s = 1 / (1 + std::exp(-static_cast<double>(x))), slope = s * (1 + x * (1 - s));
    value = std::max(value, ulps(silu_of(x), x * s));
    if (x > -86 && x < -2) below = std::max(below, ulps(slope_of(x), slope));
    if (x > -0.5f) above = std::max(above, ulps(slope_of(x), slope));
  }
  CHECK(value < 3);
  CHECK(below < 6);
  CHECK(above < 16);
}

TEST_CASE("SiLU of vectors has limits") {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  CHECK(silu_of(kInf) == kInf);
  CHECK(slope_of(kInf) == 1.0f);
  CHECK(silu_of(100.0f) == 100.0f);
  for (const float x : {-kInf, -1e30f, -100.0f}) {
    CHECK(std::fabs(silu_of(x)) < 1e-35f);
    CHECK(std::fabs(slope_of(x)) < 1e-35f);
  }
  CHECK(std::isnan(silu_of(std::numeric_limits<float>::quiet_NaN())));
  CHECK(std::isnan(slope_of(std::numeric_limits<float>::quiet_NaN())));
}

TEST_CASE("causal_conv1d: a position alone has the bits that it has among others") {
  const int64_t c = 43, l = 23;
  const auto normal = [](const Shape& shape, uint64_t key) {
    Tensor t = empty(shape, DType::f32, kCpu);
    fill_normal_(t, 0, 1, key);
    return t;
  };
  const Tensor x = normal({1, l, c}, 1), weight = normal({c, 4}, 2), bias = normal({c}, 3);
  const std::vector<float> whole = causal_conv1d_forward(x, weight, bias, {}, true).y.to_vector<float>();
  Tensor state = zeros({1, 3, c}, DType::f32, kCpu);
  for (int64_t t = 0; t < l; ++t) {
    const CausalConv1dOut one = causal_conv1d_forward(x.slice(1, t, t + 1), weight, bias, state, true);
    state = one.final_state;
    CHECK(one.y.to_vector<float>() == std::vector<float>(whole.begin() + t * c, whole.begin() + (t + 1) * c));
  }
}

TEST_CASE("gates: a value has the same bits wherever it stands in a row, with and without its slope") {
  constexpr int64_t e = 107;
  float z[e], s[e], again[e], slope[e];
  for (int64_t j = 0; j < e; ++j) z[j] = 0.37f * static_cast<float>(j - 50);
  cpu::gate_row<float, float>(s, z, e);
  cpu::gate_rows<float, float>(again, slope, z, e);
  for (int64_t j = 0; j < e; ++j) {
    float value, one, rise;
    cpu::gate_row<float, float>(&value, z + j, 1);
    cpu::gate_rows<float, float>(&one, &rise, z + j, 1);
    const double x = static_cast<double>(z[j]), sigmoid = 1 / (1 + std::exp(-x));
    CHECK(s[j] == value);
    CHECK(again[j] == one);
    CHECK(slope[j] == rise);
    CHECK(std::fabs(static_cast<double>(again[j]) - x * sigmoid) <= 4e-7 * std::fabs(x * sigmoid));
    CHECK(std::fabs(static_cast<double>(rise) - sigmoid * (1 + x * (1 - sigmoid))) < 1e-7 * (10 + std::fabs(x)));
  }
}

TEST_CASE("GELU with erf of vectors: value and slope") {
  const int64_t n = 200001;
  Tensor x = empty({n}, DType::f32, kCpu);
  for (int64_t i = 0; i < n; ++i) x.data<float>()[i] = -12.0f + 24.0f * static_cast<float>(i) / static_cast<float>(n - 1);
  const Tensor y = activation_forward(x, Activation::gelu_erf), dx = activation_backward(ones({n}, DType::f32, kCpu), x, Activation::gelu_erf);
  double above = 0, below = 0, slope = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double v = static_cast<double>(x.data<float>()[i]), phi = 0.5 * std::erfc(-v * std::sqrt(0.5));
    const double rise = phi + v * std::exp(-0.5 * v * v) * 0.3989422804014327;
    const double got = static_cast<double>(y.data<float>()[i]);
    if (v > 0) above = std::max(above, ulps(y.data<float>()[i], v * phi));
    // x^2 is rounded before the exponential
    if (v < 0) below = std::max(below, std::fabs(got / (v * phi) - 1) / (4 + v * v));
    slope = std::max(slope, std::fabs(static_cast<double>(dx.data<float>()[i]) - rise));
  }
  CHECK(above < 8);
  CHECK(below < 1.2e-7);
  CHECK(slope < 2.5e-7);
}

TEST_CASE("vectors of bf16 round as one value does") {
  constexpr int64_t n = cpu::kLanes<float>;
  for (uint64_t first = 0; first < uint64_t{1} << 32; first += 0x10001 * n + 77) {
    float from[n];
    bf16 to[n];
    for (int64_t i = 0; i < n; ++i) from[i] = std::bit_cast<float>(static_cast<uint32_t>(first + 0x10001 * static_cast<uint64_t>(i)));
    cpu::put_vector<float>(to, cpu::load(from));
    const cpu::Vec<float> again = cpu::widened<float>(to);
    bool same = true;
    for (int64_t i = 0; i < n; ++i) {
      const bf16 one(from[i]);
      same = same && to[i].bits == one.bits && std::bit_cast<uint32_t>(float{again[i]}) == uint32_t{one.bits} << 16;
    }
    if (!same) FAIL("from the bits " << first);
  }
}

TEST_CASE("activations by vectors: limits, and the same bits wherever a value stands") {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const int64_t n = 171;
  Tensor x = empty({n}, DType::f32, kCpu), dy = ones({n}, DType::f32, kCpu);
  for (int64_t i = 0; i < n; ++i) x.data<float>()[i] = 0.21f * static_cast<float>(i - 80);
  for (const Activation f : {Activation::silu, Activation::gelu_tanh, Activation::gelu_erf, Activation::relu2, Activation::sigmoid}) {
    const std::vector<float> y = activation_forward(x, f).to_vector<float>(), dx = activation_backward(dy, x, f).to_vector<float>();
    for (int64_t i = 0; i < n; ++i) {
      CHECK(activation_forward(x.slice(0, i, i + 1).contiguous(), f).item() == static_cast<double>(y[static_cast<size_t>(i)]));
      CHECK(activation_backward(dy.slice(0, i, i + 1).contiguous(), x.slice(0, i, i + 1).contiguous(), f).item() ==
            static_cast<double>(dx[static_cast<size_t>(i)]));
    }
    const Tensor ends = empty({4}, DType::f32, kCpu);
    for (int64_t i = 0; const float v : {kInf, 1e4f, -1e4f, std::numeric_limits<float>::quiet_NaN()}) ends.data<float>()[i++] = v;
    const std::vector<float> at = activation_forward(ends, f).to_vector<float>();
    CHECK(at[0] == (f == Activation::sigmoid ? 1.0f : kInf));
    CHECK(at[1] == (f == Activation::sigmoid ? 1.0f : f == Activation::relu2 ? 1e8f : 1e4f));
    CHECK(std::fabs(at[2]) < 1e-30f);
    CHECK(std::isnan(at[3]));
  }
}
