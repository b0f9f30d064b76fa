#include "kernels/ssm_gradients.h"

#include "core/parallel.h"
#include "kernels/visit_wide.h"

namespace krait::kernels::cpu {

void ssm_sum_gradients(Tensor& dlog_dt, Tensor& dlog_A_re, Tensor& dA_im, Tensor& dB, Tensor& dP,
                       const Tensor& contributions) {
  const int64_t h = contributions.size(0), n = contributions.size(1), fields = contributions.size(2);
  const int64_t s = dlog_A_re.size(0), group = h / s, rank = (fields - 5) / 2;
  const double* all = contributions.data<double>();
  visit_wide(dlog_dt.dtype(), [&]<class T>() {
    T *ddt = dlog_dt.data<T>(), *dre = dlog_A_re.data<T>(), *dim = dA_im.data<T>(), *db = dB.data<T>();
    T* dp = rank > 0 ? dP.data<T>() : nullptr;
    for (int64_t c = 0; c < h; ++c) {
      double sum = 0;
      for (int64_t j = 0; j < n; ++j) sum += all[(c * n + j) * fields + 4];
      ddt[c] = static_cast<T>(sum);
    }
    parallel_for(0, s * n, 256, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t set = i / n, j = i % n;
        const auto total = [&](int64_t field) {
          double sum = 0;
          for (int64_t c = set * group; c < (set + 1) * group; ++c) sum += all[(c * n + j) * fields + field];
          return static_cast<T>(sum);
        };
        dre[i] = total(0);
        dim[i] = total(1);
        db[2 * i] = total(2);
        db[2 * i + 1] = total(3);
        for (int64_t r = 0; r < rank; ++r)
          for (int64_t part = 0; part < 2; ++part) dp[((set * rank + r) * n + j) * 2 + part] = total(5 + 2 * r + part);
      }
    });
  });
}

}  // namespace krait::kernels::cpu
