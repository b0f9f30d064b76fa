#pragma once
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <exception>

namespace krait {
inline namespace core {

/// Threads that parallel_for and the BLAS use. n < 1 restores the default: the processors this process may
/// run on, or OMP_NUM_THREADS.
void set_num_threads(int n);
int num_threads();

/// Splits [begin, end) into at most num_threads() contiguous pieces of at least `grain` items and calls
/// f(first, last) on each, in parallel. Nested calls run inline. An exception of any piece is rethrown.
/// Results that depend on the split (float sums) must not be made with it: use fixed-size chunks.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, F&& f) {
  const int64_t n = end - begin;
  if (n <= 0) return;
  const int64_t pieces = std::min<int64_t>(num_threads(), (n + grain - 1) / std::max<int64_t>(grain, 1));
  if (pieces <= 1 || omp_in_parallel()) {
    f(begin, end);
    return;
  }
  std::exception_ptr failure;
#pragma omp parallel num_threads(static_cast<int>(pieces))
  {
    const int64_t p = omp_get_thread_num(), k = omp_get_num_threads();
    const int64_t first = begin + n * p / k, last = begin + n * (p + 1) / k;
    try {
      if (first < last) f(first, last);
    } catch (...) {
#pragma omp critical(krait_parallel_for)
      if (!failure) failure = std::current_exception();
    }
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace core
}  // namespace krait
