#include "kernels/ssd_time_step.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/parallel.h"

namespace krait::kernels::cpu {

namespace {

constexpr int64_t kGrain = 1024;  // values

template <class A>
A softplus(A u) {
  return std::max(u, A(0)) + std::log1p(std::exp(-std::abs(u)));
}

}  // namespace

void ssd_time_step_forward(Tensor& step_out, Tensor& a_out, const Tensor& dt_in, const Tensor& bias_in,
                           const Tensor& A_log_in, double low, double high) {
  const int64_t r = dt_in.size(0), h = dt_in.size(1), row = dt_in.stride(0);
  visit_float(dt_in.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const T* dt = dt_in.data<T>();
    const A *bias = bias_in.data<A>(), *A_log = A_log_in.data<A>();
    A *step = step_out.data<A>(), *a = a_out.data<A>();
    parallel_for(0, r, std::max<int64_t>(1, kGrain / h), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        for (int64_t k = 0; k < h; ++k) {
          const A s = softplus(static_cast<A>(dt[i * row + k]) + bias[k]);
          step[i * h + k] = std::min(std::max(s, static_cast<A>(low)), static_cast<A>(high));
          a[i * h + k] = -std::exp(A_log[k]) * step[i * h + k];
        }
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
    const T* dt = dt_in.data<T>();
    T* ddt = ddt_out.data<T>();
    const A *bias = bias_in.data<A>(), *A_log = A_log_in.data<A>();
    const A* dstep = dstep_in.defined() ? dstep_in.data<A>() : nullptr;
    const A* da = da_in.defined() ? da_in.data<A>() : nullptr;
    std::vector<A> parts(static_cast<size_t>(2 * chunks * h), A(0));
    parallel_for(0, chunks, std::max<int64_t>(1, kGrain / (h * chunk)), [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) {
        A *of_bias = parts.data() + 2 * c * h, *of_A = of_bias + h;
        for (int64_t i = c * chunk; i < std::min(r, (c + 1) * chunk); ++i)
          for (int64_t k = 0; k < h; ++k) {
            const A u = static_cast<A>(dt[i * row + k]) + bias[k], s = softplus(u);
            const bool inside = s >= static_cast<A>(low) && s <= static_cast<A>(high);
            const A step = std::min(std::max(s, static_cast<A>(low)), static_cast<A>(high)), scale = -std::exp(A_log[k]);
            const A up = da ? da[i * h + k] : A(0);
            const A g = inside ? ((dstep ? dstep[i * h + k] : A(0)) + scale * up) / (A(1) + std::exp(-u)) : A(0);
            ddt[i * to_row + k] = static_cast<T>(g);
            of_bias[k] += g;
            of_A[k] += scale * up * step;
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
