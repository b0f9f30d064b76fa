#pragma once
#include <algorithm>
#include <string>
#include <vector>

#include "core/error.h"

namespace krait::layers {

/// "8, 12 or 16": divisors of n nearest to `wanted`, those that `fits` accepts. For suggestions in messages.
template <class Fits>
std::string near_divisors(int64_t n, int64_t wanted, Fits fits) {
  std::vector<int64_t> below, above;
  for (int64_t d = 1; d <= n; ++d) {
    if (n % d == 0 && fits(d)) (d <= wanted ? below : above).push_back(d);
  }
  std::vector<int64_t> near(below.end() - std::min<int64_t>(2, static_cast<int64_t>(below.size())), below.end());
  if (!above.empty()) near.push_back(above.front());
  std::string text;
  for (size_t i = 0; i < near.size(); ++i) {
    text += (i == 0 ? "" : i + 1 == near.size() ? " or " : ", ") + fmt::format("{}", near[i]);
  }
  return text;
}
inline std::string near_divisors(int64_t n, int64_t wanted) {
  return near_divisors(n, wanted, [](int64_t) { return true; });
}

}  // namespace krait::layers
