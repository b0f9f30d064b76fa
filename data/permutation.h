#pragma once
#include <cstdint>
#include <vector>

namespace krait::data {

/// A random order of [0, n), computed place by place in constant memory: a Feistel network of six Philox rounds over
/// the next power of four, walked along its cycles until it lands below n (Black & Rogaway 2002).
class Permutation {
 public:
  Permutation(int64_t n, uint64_t key);
  int64_t operator()(int64_t i) const;

 private:
  uint64_t n_, key_;
  int half_bits_ = 1;
};

/// NumPy's RandomState(seed).permutation(n): MT19937 (Matsumoto & Nishimura 1998) and a backward Fisher-Yates shuffle
/// whose indices are drawn by masking and rejection.
std::vector<int64_t> numpy_permutation(int64_t n, uint32_t seed);

/// 0 .. 2^k - 1 with their k bits reversed, those >= n left out; 2^k is the first power of two >= n.
std::vector<int64_t> bit_reversal(int64_t n);

}  // namespace krait::data
