#include "kernels/inverse.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "core/parallel.h"

namespace krait::kernels::cpu {

namespace {

void invert(double* a, int32_t* swaps, int64_t n) {
  for (int64_t k = 0; k < n; ++k) {
    int64_t pivot = k;
    for (int64_t i = k + 1; i < n; ++i)
      if (std::abs(a[i * n + k]) > std::abs(a[pivot * n + k])) pivot = i;
    swaps[k] = static_cast<int32_t>(pivot);
    if (pivot != k) std::swap_ranges(a + k * n, a + (k + 1) * n, a + pivot * n);
    double* __restrict row = a + k * n;
    const double scale = 1.0 / row[k];
    row[k] = 1.0;
    for (int64_t j = 0; j < n; ++j) row[j] *= scale;
    for (int64_t i = 0; i < n; ++i) {
      if (i == k) continue;
      double* __restrict other = a + i * n;
      const double factor = other[k];
      other[k] = 0.0;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) other[j] -= factor * row[j];
    }
  }
  for (int64_t k = n - 1; k >= 0; --k)  // row swaps of the matrix are column swaps of the inverse, in reverse
    if (swaps[k] != k)
      for (int64_t i = 0; i < n; ++i) std::swap(a[i * n + k], a[i * n + swaps[k]]);
}

}  // namespace

void batched_inverse(Tensor& a, Tensor& swaps) {
  const int64_t n = a.size(1);
  parallel_for(0, a.size(0), 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) invert(a.data<double>() + b * n * n, swaps.data<int32_t>() + b * n, n);
  });
}

}  // namespace krait::kernels::cpu
