#include "kernels/cpu/philox_words.h"

#include "tests/testing/catch.h"

using namespace krait;

TEST_CASE("Philox by vectors gives the words of its definition") {
  constexpr int64_t kMost = 64;
  constexpr uint64_t keys[] = {0, 0x123456789ABCDEF0u, ~uint64_t{0}}, steps[] = {0, 77, (uint64_t{5} << 32) + 1, ~uint64_t{0}};
  for (const uint64_t key : keys)
    for (const uint64_t step : steps)
      for (const uint64_t first : {uint64_t{0}, uint64_t{1}, (uint64_t{1} << 32) - 5, ~uint64_t{0} - 20})
        for (const int64_t counters : {int64_t{0}, int64_t{1}, int64_t{8}, int64_t{13}, kMost}) {
          uint32_t words[4 * kMost];
          kernels::cpu::philox_words(words, key, first, counters, step);
          bool same = true;
          for (int64_t i = 0; i < 4 * counters; ++i) same = same && words[i] == philox(key, first + static_cast<uint64_t>(i / 4), step).word[i % 4];
          CHECK(same);
        }
}
