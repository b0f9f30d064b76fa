#pragma once
#include <cstdint>
#include <string_view>

#include "core/dtype.h"
#include "core/tensor.h"

namespace krait {
inline namespace core {

/// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): four 32-bit words from
/// a 64-bit key and a 128-bit counter. The same words on CPU and GPU.
struct Philox {
  uint32_t word[4];
};

KRAIT_HOST_DEVICE inline uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((uint64_t{a} * b) >> 32);
}

KRAIT_HOST_DEVICE inline Philox philox(uint64_t key, uint64_t counter_low, uint64_t counter_high) {
  uint32_t c0 = static_cast<uint32_t>(counter_low), c1 = static_cast<uint32_t>(counter_low >> 32);
  uint32_t c2 = static_cast<uint32_t>(counter_high), c3 = static_cast<uint32_t>(counter_high >> 32);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint32_t h0 = multiply_high(0xD2511F53u, c0), l0 = 0xD2511F53u * c0;
    const uint32_t h1 = multiply_high(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
    c0 = h1 ^ c1 ^ k0;
    c1 = l1;
    c2 = h0 ^ c3 ^ k1;
    c3 = l0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

/// 24 random bits as a float in [0, 1): exact, so equal on every device.
KRAIT_HOST_DEVICE inline float uniform_from_bits(uint32_t bits) {
  return static_cast<float>(bits >> 8) * (1.0f / 16777216.0f);
}

/// Key of a named stream of random numbers: mixes the run's seed with the name.
/// Streams with different names are independent; the same name gives the same numbers on every rank.
uint64_t random_key(uint64_t seed, std::string_view stream);

/// Where a training step's random numbers come from. `step` is an int64 scalar tensor on the device of the
/// computation, so that a captured graph draws new numbers at every replay; it counts micro-batches over the run.
/// Element e of stream `key` at that step is word e % 4 of philox(key, e / 4, step).
struct RandomSource {
  uint64_t seed = 0;
  Tensor step;
  int64_t batch_offset = 0;  // global index of this rank's first sequence: numbers do not depend on the ranks
};
/// The source that dropout and other random layers use. Set by the trainer.
RandomSource& current_random();

// Initial values: made on the CPU in double and rounded, so that they do not depend on the device.
// Any floating dtype and device; element e depends on key and e alone.
void fill_uniform_(Tensor& t, double low, double high, uint64_t key);
void fill_normal_(Tensor& t, double mean, double std, uint64_t key);

}  // namespace core
}  // namespace krait
