#pragma once
#include <cstdint>

#include "core/random.h"

namespace krait::data {

/// Random numbers one after another from (key, index): the words of philox(key, 0, index), philox(key, 1, index), ...
/// An example drawn from its own stream depends on nothing else.
class RandomStream {
 public:
  RandomStream(uint64_t key, int64_t index) : key_(key), index_(static_cast<uint64_t>(index)) {}

  uint32_t word() {
    if (used_ == 4) {
      words_ = philox(key_, counter_++, index_);
      used_ = 0;
    }
    return words_.word[used_++];
  }
  /// Uniform in [0, n) up to a bias of n / 2^32; 1 <= n < 2^31.
  int64_t below(int64_t n) { return static_cast<int64_t>((uint64_t{word()} * static_cast<uint64_t>(n)) >> 32); }
  /// Uniform in [first, last].
  int64_t between(int64_t first, int64_t last) { return first + below(last - first + 1); }
  /// 24 bits in [0, 1), exact as a float.
  float unit_float() { return uniform_from_bits(word()); }
  /// 53 bits in [0, 1).
  double unit() {
    const uint64_t high = word();
    return static_cast<double>((high << 32 | word()) >> 11) * 0x1.0p-53;
  }
  bool coin() { return (word() >> 31) != 0; }

 private:
  uint64_t key_, index_, counter_ = 0;
  Philox words_{};
  int used_ = 4;
};

}  // namespace krait::data
