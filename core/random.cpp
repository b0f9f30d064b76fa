#include "core/random.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numbers>

#include "core/parallel.h"

namespace krait::core {

uint64_t random_key(uint64_t seed, std::string_view stream) {
  uint64_t h = 0xCBF29CE484222325u;  // FNV-1a of the name, then a SplitMix64 finaliser over both
  for (const char c : stream) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001B3u;
  uint64_t z = h + 0x9E3779B97F4A7C15u * (seed + 1);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

RandomSource& current_random() {
  static RandomSource source;
  return source;
}

namespace {

double unit(uint32_t high, uint32_t low) {  // 53 bits, in [0, 1)
  return static_cast<double>(((uint64_t{high} << 32) | low) >> 11) * 0x1.0p-53;
}

// philox() of a counter below 2^64, for the lanes of a loop.
[[gnu::always_inline]] inline Philox philox_lane(uint64_t key, uint64_t counter) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

template <class T, class F>  // value(philox words of element e) -> double
void fill_values(T* to, int64_t n, uint64_t key, F value) {
  parallel_for(0, n, 4096, [&](int64_t first, int64_t last) {
#pragma omp simd
    for (int64_t i = first; i < last; ++i) to[i] = static_cast<T>(value(philox_lane(key, static_cast<uint64_t>(i))));
  });
}

bool in_place(const Tensor& t, DType dtype) { return t.dtype() == dtype && t.device().is_cpu() && t.is_contiguous(); }

template <class F>
void fill_from(Tensor& t, uint64_t key, F value) {
  if (in_place(t, DType::f32)) return fill_values(t.data<float>(), t.numel(), key, value);
  Tensor host = in_place(t, DType::f64) ? t : empty(t.shape(), DType::f64, kCpu);
  fill_values(host.data<double>(), host.numel(), key, value);
  if (!in_place(t, DType::f64)) copy_(t, host);
}

// Box-Muller; 1 - u keeps the logarithm finite.
double normal_value(const Philox& r, double mean, double std) {
  const double u = 1.0 - unit(r.word[0], r.word[1]), v = unit(r.word[2], r.word[3]);
  return mean + std * std::sqrt(-2.0 * std::log(u)) * std::cos(2.0 * std::numbers::pi * v);
}

// ln u of u in [2^-53, 1], to 1e-15 of itself: u = 2^k (1 + s) / (1 - s), ln = k ln 2 + 2 artanh s.
[[gnu::always_inline]] inline double log_of_unit(double u) {
  const uint64_t bits = std::bit_cast<uint64_t>(u) + (0x3FF0000000000000u - 0x3FE6A09E667F3BCDu);
  const double k = static_cast<double>(static_cast<int64_t>(bits >> 52) - 1023);
  const double m = std::bit_cast<double>((bits & 0x000FFFFFFFFFFFFFu) + 0x3FE6A09E667F3BCDu);
  const double s = (m - 1.0) / (m + 1.0), s2 = s * s;
  double p = 1.0 / 21.0;
#pragma GCC unroll 10
  for (int i = 19; i >= 3; i -= 2) p = p * s2 + 1.0 / i;
  return k * std::numbers::ln2 + 2.0 * (s + s * s2 * p);
}

// cos 2 pi v of v in [0, 1), to 1e-15: turns are reduced exactly to [-1/4, 1/4].
[[gnu::always_inline]] inline double cos_of_turn(double v) {
  const double half = v < 0.25 ? 0.0 : v < 0.75 ? 0.5 : 1.0, t = v - half, x = 2.0 * std::numbers::pi * t, x2 = x * x;
  double p = 1.0;
#pragma GCC unroll 12
  for (int i = 22; i >= 2; i -= 2) p = 1.0 - p * x2 * (1.0 / (i * (i - 1)));
  return half == 0.5 ? -p : p;
}

// fp32 of normal_value() of elements [first, last), by vector code whose error is below `doubt`; where rounding could see
// it, by normal_value() itself. So the result is that of rounding the fp64 draws, in a tenth of the time.
void round_normals(float* to, int64_t first, int64_t last, double mean, double std, uint64_t key) {
  constexpr int64_t kBlock = 256;
  const double doubt = 1e-13 * std::fabs(std) + 1e-15 * std::fabs(mean);
  double y[kBlock];
  for (int64_t at = first; at < last; at += kBlock) {
    const int64_t n = std::min(kBlock, last - at);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const Philox r = philox_lane(key, static_cast<uint64_t>(at + i));
      const double u = 1.0 - unit(r.word[0], r.word[1]), v = unit(r.word[2], r.word[3]);
      y[i] = mean + std * std::sqrt(-2.0 * log_of_unit(u)) * cos_of_turn(v);
    }
    int doubtful = 0;
#pragma omp simd reduction(+ : doubtful)
    for (int64_t i = 0; i < n; ++i) {
      to[at + i] = static_cast<float>(y[i]);
      doubtful += static_cast<float>(y[i] - doubt) != static_cast<float>(y[i] + doubt);
    }
    for (int64_t i = 0; doubtful > 0 && i < n; ++i)
      if (static_cast<float>(y[i] - doubt) != static_cast<float>(y[i] + doubt))
        to[at + i] = static_cast<float>(normal_value(philox(key, static_cast<uint64_t>(at + i), 0), mean, std));
  }
}

}  // namespace

void fill_uniform_(Tensor& t, double low, double high, uint64_t key) {
  fill_from(t, key, [=](const Philox& r) { return low + (high - low) * unit(r.word[0], r.word[1]); });
}

void fill_normal_(Tensor& t, double mean, double std, uint64_t key) {
  if (!in_place(t, DType::f32))
    return fill_from(t, key, [=](const Philox& r) { return normal_value(r, mean, std); });
  float* to = t.data<float>();
  parallel_for(0, t.numel(), 4096, [&](int64_t first, int64_t last) { round_normals(to, first, last, mean, std, key); });
}

}  // namespace krait::core
