#include "kernels/ssd_time_step.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "core/parallel.h"
#include "kernels/cpu/put.h"
#include "kernels/cpu/vector_math.h"

// Rows have few values: the elementary functions go over many rows at once.
namespace krait::kernels::cpu {

namespace {

constexpr int64_t kGrain = 1024;  // values

// -e^{A_log} of every head.
template <class A>
std::vector<A> rates(const Tensor& A_log) {
  std::vector<A> scale(static_cast<size_t>(A_log.numel()));
  for (size_t k = 0; k < scale.size(); ++k) scale[k] = -std::exp(A_log.data<A>()[k]);
  return scale;
}

}  // namespace

void ssd_time_step_forward(Tensor& step_out, Tensor& a_out, const Tensor& dt_in, const Tensor& bias_in,
                           const Tensor& A_log_in, double low, double high) {
  const int64_t r = dt_in.size(0), h = dt_in.size(1), row = dt_in.stride(0);
  visit_float(dt_in.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const T* dt_all = dt_in.data<T>();
    const std::vector<A> scales = rates<A>(A_log_in);
    const A *bias = bias_in.data<A>(), *scale = scales.data();
    A *step_all = step_out.data<A>(), *a_all = a_out.data<A>();
    const A least = static_cast<A>(low), most = static_cast<A>(high);
    parallel_for(0, r, std::max<int64_t>(1, kGrain / h), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        for (int64_t k = 0; k < h; ++k) step_all[i * h + k] = static_cast<A>(dt_all[i * row + k]) + bias[k];
#pragma omp simd
      for (int64_t i = first * h; i < last * h; ++i) {
        const A s = vsoftplus(step_all[i]), at_least = s < least ? least : s;
        step_all[i] = at_least > most ? most : at_least;
      }
      for (int64_t i = first; i < last; ++i)
        for (int64_t k = 0; k < h; ++k) a_all[i * h + k] = scale[k] * step_all[i * h + k];
    });
  });
}

// Rows are cut into chunks by the shape alone, so that the sums do not depend on the number of threads.
void ssd_time_step_backward(Tensor& ddt_out, Tensor& dbias_out, Tensor& dA_log_out, const Tensor& dstep_in,
                            const Tensor& da_in, const Tensor& dt_in, const Tensor& bias_in, const Tensor& A_log_in,
                            double low, double high) {
  const int64_t r = dt_in.size(0), h = dt_in.size(1), row = dt_in.stride(0), to_row = ddt_out.stride(0);
  const int64_t chunk = std::max<int64_t>(16, (r + 127) / 128), chunks = (r + chunk - 1) / chunk;
  visit_float(dt_in.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const T* dt_all = dt_in.data<T>();
    T* ddt_all = ddt_out.data<T>();
    const std::vector<A> scales = rates<A>(A_log_in), none(static_cast<size_t>(h), A(0));
    const A *bias = bias_in.data<A>(), *scale = scales.data();
    const A* dstep_all = dstep_in.defined() ? dstep_in.data<A>() : nullptr;
    const A* da_all = da_in.defined() ? da_in.data<A>() : nullptr;
    const A least = static_cast<A>(low), most = static_cast<A>(high);
    std::vector<A> parts(static_cast<size_t>(2 * chunks * h), A(0));
    parallel_for(0, chunks, std::max<int64_t>(1, kGrain / (h * chunk)), [&](int64_t first, int64_t last) {
      const std::unique_ptr<A[]> buffer(new A[static_cast<size_t>(2 * chunk * h)]);
      A *steps = buffer.get(), *slopes = steps + chunk * h;
      for (int64_t c = first; c < last; ++c) {
        A *of_bias = parts.data() + 2 * c * h, *of_A = of_bias + h;
        const int64_t begin = c * chunk, rows = std::min(r, begin + chunk) - begin;
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t k = 0; k < h; ++k) steps[i * h + k] = static_cast<A>(dt_all[(begin + i) * row + k]) + bias[k];
#pragma omp simd
        for (int64_t i = 0; i < rows * h; ++i) {
          const A u = steps[i], s = vsoftplus(u), at_least = s < least ? least : s;
          steps[i] = at_least > most ? most : at_least;
          slopes[i] = s >= least && s <= most ? vsigmoid(u) : A(0);
        }
        for (int64_t i = 0; i < rows; ++i) {
          T* ddt = ddt_all + (begin + i) * to_row;
          const A* dstep = dstep_all ? dstep_all + (begin + i) * h : none.data();
          const A* da = da_all ? da_all + (begin + i) * h : none.data();
#pragma omp simd
          for (int64_t k = 0; k < h; ++k) {
            const A up = scale[k] * da[k], g = (dstep[k] + up) * slopes[i * h + k];
            put(ddt[k], g);
            of_bias[k] += g;
            of_A[k] += up * steps[i * h + k];
          }
        }
      }
    });
    A *dbias = dbias_out.data<A>(), *dA_log = dA_log_out.data<A>();
    std::fill(dbias, dbias + h, A(0));
    std::fill(dA_log, dA_log + h, A(0));
    for (int64_t c = 0; c < chunks; ++c)
      for (int64_t k = 0; k < h; ++k) {
        dbias[k] += parts[static_cast<size_t>(2 * c * h + k)];
        dA_log[k] += parts[static_cast<size_t>((2 * c + 1) * h + k)];
      }
  });
}

}  // namespace krait::kernels::cpu
