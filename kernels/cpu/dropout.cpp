#include "kernels/dropout.h"

#include <algorithm>
#include <cmath>

#include "core/parallel.h"
#include "kernels/cpu/philox_words.h"
#include "kernels/cpu/put.h"
#include "kernels/cpu/vector_math.h"

namespace krait::kernels::cpu {

namespace {

constexpr int64_t kCounters = 256;  // Philox blocks made at a time
constexpr int64_t kWords = 4 * kCounters;

double multiply_add(double a, double b, double c) { return std::fma(a, b, c); }

}  // namespace

void dropout(Tensor& y_out, const Tensor& x_in, const Tensor& residual, const DropoutMask& mask) {
  const int64_t n = x_in.numel(), run = mask.run_of(n);
  const auto step = static_cast<uint64_t>(*mask.step.data<int64_t>());
  const uint32_t threshold = dropout_threshold(mask.p);
  const int64_t blocks = (run + 2 * kWords - 2) / kWords;  // of the stream, at most, that a run reaches into
  visit_float(x_in.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const A scale = static_cast<A>(1.0 / (1.0 - mask.p));
    T* const y0 = y_out.data<T>();
    const T* const x0 = x_in.data<T>();
    const T* const r0 = residual.defined() ? residual.data<T>() : nullptr;
    parallel_for(0, n / run * blocks, std::max<int64_t>(8, 8 * kWords / run), [&](int64_t first, int64_t last) {
      alignas(64) uint32_t words[kWords];
      for (int64_t item = first; item < last; ++item) {
        const int64_t r = item / blocks;
        const int64_t start = DropoutMask::start(r, mask.offset, mask.runs, mask.run_stride, mask.group_stride);
        const int64_t block = start / kWords + item % blocks;
        // Elements of the run that this block of the stream covers.
        const int64_t begin = std::max(block * kWords, start), end = std::min((block + 1) * kWords, start + run);
        if (begin >= end) continue;
        philox_words(words, mask.key, static_cast<uint64_t>(begin / 4), (end + 3) / 4 - begin / 4, step);
        const uint32_t* const bits = words + begin % 4;
        const int64_t at = r * run + begin - start;
        const T* const x = x0 + at;
        T* const y = y0 + at;
        if (r0) {
          const T* const add = r0 + at;
#pragma omp simd
          for (int64_t i = 0; i < end - begin; ++i) {
            const A kept = multiply_add(static_cast<A>(x[i]), scale, static_cast<A>(add[i]));
            put(y[i], (bits[i] >> 8) < threshold ? static_cast<A>(add[i]) : kept);
          }
        } else {
#pragma omp simd
          for (int64_t i = 0; i < end - begin; ++i) {
            const A kept = static_cast<A>(x[i]) * scale;
            put(y[i], (bits[i] >> 8) < threshold ? A(0) : kept);
          }
        }
      }
    });
  });
}

}  // namespace krait::kernels::cpu
