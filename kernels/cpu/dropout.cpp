#include "kernels/dropout.h"

#include <algorithm>

#include "core/parallel.h"
#include "kernels/cpu/put.h"
#include "kernels/cpu/vector_math.h"

namespace krait::kernels::cpu {

namespace {

constexpr int64_t kCounters = 256;  // Philox blocks made at a time
constexpr int64_t kWords = 4 * kCounters;

// Words 4 first, 4 first + 1, ... of the stream: all rounds of a counter in one loop body, so that it vectorises.
void philox_block(uint32_t* words, uint64_t key, uint64_t first, uint64_t step) {
#pragma omp simd
  for (int64_t i = 0; i < kCounters; ++i) {
    const Philox r = philox(key, first + static_cast<uint64_t>(i), step);
    for (int w = 0; w < 4; ++w) words[4 * i + w] = r.word[w];
  }
}

double multiply_add(double a, double b, double c) { return std::fma(a, b, c); }

}  // namespace

void dropout(Tensor& y_out, const Tensor& x_in, const Tensor& residual, const DropoutMask& mask) {
  const int64_t n = x_in.numel(), offset = mask.offset;
  const auto step = static_cast<uint64_t>(*mask.step.data<int64_t>());
  const uint32_t threshold = dropout_threshold(mask.p);
  const int64_t block0 = offset / kWords, block1 = (offset + n + kWords - 1) / kWords;
  visit_float(x_in.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const A scale = static_cast<A>(1.0 / (1.0 - mask.p));
    T* const y0 = y_out.data<T>();
    const T* const x0 = x_in.data<T>();
    const T* const r0 = residual.defined() ? residual.data<T>() : nullptr;
    parallel_for(block0, block1, 8, [&](int64_t first, int64_t last) {
      alignas(64) uint32_t words[kWords];
      for (int64_t block = first; block < last; ++block) {
        philox_block(words, mask.key, static_cast<uint64_t>(block * kCounters), step);
        // Elements of the tensor that this block of the stream covers.
        const int64_t begin = std::max(block * kWords, offset), end = std::min((block + 1) * kWords, offset + n);
        const uint32_t* const bits = words + (begin - block * kWords);
        const T* const x = x0 + (begin - offset);
        T* const y = y0 + (begin - offset);
        if (r0) {
          const T* const r = r0 + (begin - offset);
#pragma omp simd
          for (int64_t i = 0; i < end - begin; ++i) {
            const A kept = multiply_add(static_cast<A>(x[i]), scale, static_cast<A>(r[i]));
            put(y[i], (bits[i] >> 8) < threshold ? static_cast<A>(r[i]) : kept);
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
