#include "core/random.h"

#include <cmath>
#include <set>

#include "core/parallel.h"
#include "tests/testing/catch.h"

using namespace krait;

namespace {
bool same(const Philox& r, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return r.word[0] == a && r.word[1] == b && r.word[2] == c && r.word[3] == d;
}
}  // namespace

TEST_CASE("philox4x32-10 gives the known answers of its authors") {
  CHECK(same(philox(0, 0, 0), 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8));
  const uint64_t all = ~uint64_t{0};
  CHECK(same(philox(all, all, all), 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd));
  // Counter and key from the digits of pi.
  CHECK(same(philox(0x299f31d0a4093822, 0x85a308d3243f6a88, 0x0370734413198a2e), 0xd16cfe09, 0x94fdcceb, 0x5001e420,
             0x24126ea1));
}

TEST_CASE("uniform values of bits lie in [0, 1) and are exact") {
  CHECK(uniform_from_bits(0) == 0.0f);
  CHECK(uniform_from_bits(0xFFu) == 0.0f);
  CHECK(uniform_from_bits(0x80000000u) == 0.5f);
  CHECK(uniform_from_bits(0xFFFFFFFFu) == 1.0f - 0x1p-24f);
}

TEST_CASE("keys of streams differ by seed and name and stay what they are") {
  std::set<uint64_t> keys;
  for (uint64_t seed = 0; seed < 100; ++seed)
    for (const char* name : {"", "a", "b", "ab", "ba", "layers.0.dropout", "layers.1.dropout"})
      keys.insert(random_key(seed, name));
  CHECK(keys.size() == 700);
  CHECK(random_key(1337, "init") == random_key(1337, std::string("in") + "it"));
}

TEST_CASE("fill_normal has the moments of a normal distribution") {
  const int64_t n = 1000000;
  Tensor t = empty({n}, DType::f64, kCpu);
  fill_normal_(t, 0, 1, 42);
  double m1 = 0, m2 = 0, m3 = 0, m4 = 0, tail = 0, lag = 0;
  const double* p = t.data<double>();
  for (int64_t i = 0; i < n; ++i) {
    m1 += p[i];
    m2 += p[i] * p[i];
    m3 += p[i] * p[i] * p[i];
    m4 += p[i] * p[i] * p[i] * p[i];
    tail += std::fabs(p[i]) > 1.959964;
    if (i) lag += p[i] * p[i - 1];
  }
  const double count = static_cast<double>(n);
  CHECK(std::fabs(m1 / count) < 4e-3);
  CHECK(std::fabs(m2 / count - 1) < 6e-3);
  CHECK(std::fabs(m3 / count) < 1.6e-2);
  CHECK(std::fabs(m4 / count - 3) < 4e-2);
  CHECK(std::fabs(tail / count - 0.05) < 1e-3);
  CHECK(std::fabs(lag / count) < 4e-3);
}

TEST_CASE("fill_uniform stays in its interval") {
  Tensor t = empty({200000}, DType::f32, kCpu);
  fill_uniform_(t, -2, 3, 1);
  double sum = 0, low = 9, high = -9;
  for (const float v : t.to_vector<float>()) {
    sum += v;
    low = std::min<double>(low, v);
    high = std::max<double>(high, v);
  }
  CHECK((low >= -2 && low < -1.999 && high <= 3 && high > 2.999));
  CHECK(sum / 200000 == Approx(0.5).margin(0.015));
}

TEST_CASE("initial values in fp32 are those in fp64, rounded") {
  const int64_t n = 1 << 20;
  Tensor exact = empty({n}, DType::f64, kCpu), rounded = empty({n}, DType::f32, kCpu);
  for (const auto fill : {fill_normal_, fill_uniform_})
    for (const auto& [a, b] : {std::pair{0.0, 0.02}, {1.5, 3.0}}) {
      fill(exact, a, b, 7);
      fill(rounded, a, b, 7);
      CHECK(rounded.to_vector<float>() == exact.to(DType::f32).to_vector<float>());
    }
}

TEST_CASE("initial values depend on key and element alone") {
  Tensor a = empty({10007}, DType::f64, kCpu), b = empty({10007}, DType::f64, kCpu), shorter = empty({7}, DType::f64, kCpu);
  fill_normal_(a, 1, 2, 5);
  set_num_threads(1);
  fill_normal_(b, 1, 2, 5);
  set_num_threads(0);
  fill_normal_(shorter, 1, 2, 5);
  CHECK(a.to_vector<double>() == b.to_vector<double>());
  CHECK(shorter.to_vector<double>() == a.slice(0, 0, 7).to_vector<double>());
  fill_normal_(b, 1, 2, 6);
  CHECK(a.to_vector<double>() != b.to_vector<double>());
  Tensor rounded = empty({10007}, DType::bf16, kCpu), view = empty({10007, 2}, DType::f64, kCpu).select(1, 1);
  fill_normal_(rounded, 1, 2, 5);
  fill_normal_(view, 1, 2, 5);
  CHECK(rounded.to_vector<float>() == a.to(DType::bf16).to_vector<float>());
  CHECK(view.to_vector<double>() == a.to_vector<double>());
}
