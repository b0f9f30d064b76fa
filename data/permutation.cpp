#include "data/permutation.h"

#include <bit>
#include <numeric>
#include <random>
#include <utility>

#include "core/error.h"
#include "core/random.h"

namespace krait::data {

Permutation::Permutation(int64_t n, uint64_t key) : n_(static_cast<uint64_t>(n)), key_(key) {
  KRAIT_CHECK(n > 0, "a permutation of {} things does not exist", n);
  while ((uint64_t{1} << (2 * half_bits_)) < n_) ++half_bits_;
}

int64_t Permutation::operator()(int64_t i) const {
  KRAIT_ASSERT(i >= 0 && static_cast<uint64_t>(i) < n_, "{} of {}", i, n_);
  const uint64_t mask = (uint64_t{1} << half_bits_) - 1;
  uint64_t x = static_cast<uint64_t>(i);
  do {
    uint64_t left = x >> half_bits_, right = x & mask;
    for (uint64_t round = 0; round < 6; ++round) {
      const uint64_t mixed = left ^ (philox(key_, right, round).word[0] & mask);
      left = std::exchange(right, mixed);
    }
    x = left << half_bits_ | right;
  } while (x >= n_);
  return static_cast<int64_t>(x);
}

std::vector<int64_t> numpy_permutation(int64_t n, uint32_t seed) {
  std::mt19937 twister(seed);
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), int64_t{0});
  for (size_t i = order.size(); i-- > 1;) {
    const uint32_t mask = static_cast<uint32_t>(std::bit_ceil(i + 1) - 1);
    uint32_t j = 0;
    do {
      j = static_cast<uint32_t>(twister()) & mask;
    } while (j > i);
    std::swap(order[i], order[j]);
  }
  return order;
}

std::vector<int64_t> bit_reversal(int64_t n) {
  const auto size = std::bit_ceil(static_cast<uint64_t>(n));
  const int bits = std::countr_zero(size);
  std::vector<int64_t> order;
  order.reserve(static_cast<size_t>(n));
  for (uint64_t i = 0; i < size; ++i) {
    uint64_t reversed = 0;
    for (int bit = 0; bit < bits; ++bit) reversed |= (i >> bit & 1) << (bits - 1 - bit);
    if (reversed < static_cast<uint64_t>(n)) order.push_back(static_cast<int64_t>(reversed));
  }
  return order;
}

}  // namespace krait::data
