#include "core/random.h"

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

template <class F>  // value(philox words of element e) -> double
void fill_from(Tensor& t, uint64_t key, F value) {
  Tensor host = empty(t.shape(), DType::f64, kCpu);
  double* p = host.data<double>();
  parallel_for(0, host.numel(), 4096, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) p[i] = value(philox(key, static_cast<uint64_t>(i), 0));
  });
  copy_(t, host);
}

}  // namespace

void fill_uniform_(Tensor& t, double low, double high, uint64_t key) {
  fill_from(t, key, [=](const Philox& r) { return low + (high - low) * unit(r.word[0], r.word[1]); });
}

void fill_normal_(Tensor& t, double mean, double std, uint64_t key) {
  fill_from(t, key, [=](const Philox& r) {  // Box-Muller; 1 - u keeps the logarithm finite
    const double u = 1.0 - unit(r.word[0], r.word[1]), v = unit(r.word[2], r.word[3]);
    return mean + std * std::sqrt(-2.0 * std::log(u)) * std::cos(2.0 * std::numbers::pi * v);
  });
}

}  // namespace krait::core
