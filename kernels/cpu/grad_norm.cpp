#include "kernels/grad_norm.h"

#include <bit>
#include <cmath>

#include "core/parallel.h"

namespace krait::kernels::cpu {

namespace {

// In double: 16 float lanes would need many more partial sums to be as exact, and memory is the bound either way.
template <class T>
double sum_of_squares(const T* __restrict x, int64_t n) {
  double s = 0;
  if constexpr (std::is_same_v<T, bf16>) {
    // GCC does not vectorise loads of a class: read the bits.
    const auto* const bits = reinterpret_cast<const uint16_t*>(x);
#pragma omp simd reduction(+ : s)
    for (int64_t i = 0; i < n; ++i) {
      const double v = std::bit_cast<float>(uint32_t{bits[i]} << 16);
      s += v * v;
    }
  } else {
#pragma omp simd reduction(+ : s)
    for (int64_t i = 0; i < n; ++i) {
      const double v = x[i];
      s += v * v;
    }
  }
  return s;
}

}  // namespace

void sum_squares(Tensor& sums, const Tensor& x) {
  double* const out = sums.data<double>();
  const int64_t n = x.numel();
  visit_float(x.dtype(), [&]<class T>() {
    const T* const values = x.data<T>();
    parallel_for(0, sums.numel(), 2, [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) {
        const int64_t begin = c * kNormChunk, end = std::min(begin + kNormChunk, n);
        out[c] = sum_of_squares(values + begin, end - begin);
      }
    });
  });
}

void norm_clip(Tensor& values, const Tensor& sums, double max_norm, const Tensor& skipped) {
  const double* const s = sums.data<double>();
  double total = 0;
  for (int64_t i = 0; i < sums.numel(); ++i) total += s[i];
  const bool finite = std::isfinite(total);
  const double norm = std::sqrt(total);
  double* const out = values.data<double>();
  out[0] = norm;
  out[1] = !finite ? 0 : max_norm > 0 ? std::min(1.0, max_norm / (norm + 1e-6)) : 1;
  out[2] = finite;
  out[3] = total;
  if (skipped.defined()) *skipped.data<int64_t>() += !finite;
}

}  // namespace krait::kernels::cpu
