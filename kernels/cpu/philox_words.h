#pragma once
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstring>

#include "core/random.h"

namespace krait::kernels::cpu {

/// Words 4 first, 4 first + 1, ... of stream `key` at `step` (core/random.h), a multiple of 8 counters: `words` has room for
/// as many. Half of a product's 64 bits is each of the words that a round makes, so that a counter takes four 64-bit lanes;
/// from a loop over counters the compiler makes shuffles that take twice as long as the products.
inline void philox_words(uint32_t* words, uint64_t key, uint64_t first, int64_t counters, uint64_t step) {
#if defined(__AVX2__)
  typedef uint64_t Lanes __attribute__((vector_size(32)));
  constexpr int kPair = 2;  // vectors at once: a round waits for its products
  const auto times = [](Lanes a, uint32_t b) __attribute__((always_inline)) {  // of the low halves
    return (Lanes)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
  };
  for (int64_t i = 0; i < counters; i += 4 * kPair, words += 16 * kPair) {
    Lanes c[kPair][4];  // in the low halves; what the high ones hold is not read
    for (int n = 0; n < kPair; ++n) {
      c[n][0] = Lanes{0, 1, 2, 3} + (first + static_cast<uint64_t>(i + 4 * n));
      c[n][1] = c[n][0] >> 32;
      c[n][2] = Lanes{} + step;
      c[n][3] = c[n][2] >> 32;
    }
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
      for (auto& x : c) {
        const Lanes p0 = times(x[0], 0xD2511F53u), p1 = times(x[2], 0xCD9E8D57u);
        x[0] = (p1 >> 32) ^ x[1] ^ uint64_t{k0};
        x[1] = p1;
        x[2] = (p0 >> 32) ^ x[3] ^ uint64_t{k1};
        x[3] = p0;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    for (int n = 0; n < kPair; ++n) {  // (4 words, 4 counters) transposed
      const __m256i low = (__m256i)((c[n][0] & 0xFFFFFFFFu) | (c[n][1] << 32)), high = (__m256i)((c[n][2] & 0xFFFFFFFFu) | (c[n][3] << 32));
      const __m256i even = _mm256_unpacklo_epi64(low, high), odd = _mm256_unpackhi_epi64(low, high);
      const __m256i parts[2] = {_mm256_permute2x128_si256(even, odd, 0x20), _mm256_permute2x128_si256(even, odd, 0x31)};
      std::memcpy(words + 16 * n, parts, sizeof parts);
    }
  }
#else
#pragma omp simd
  for (int64_t i = 0; i < counters; ++i) {
    const Philox r = philox(key, first + static_cast<uint64_t>(i), step);
    for (int w = 0; w < 4; ++w) words[4 * i + w] = r.word[w];
  }
#endif
}

}  // namespace krait::kernels::cpu
