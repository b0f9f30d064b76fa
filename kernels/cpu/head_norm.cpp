#include "kernels/head_norm.h"

#include "kernels/cpu/norm.h"

namespace krait::kernels::cpu {

void head_norm_forward(Tensor& y_out, Tensor& mean_out, Tensor& rstd_out, const Tensor& x_in, const Tensor& w_in,
                       double eps) {
  const int64_t p = x_in.size(-1), h = x_in.size(-2), n = x_in.numel() / p;
  visit_float(x_in.dtype(), [&]<class X>() {
    using A = accum_t<X>;
    X* y = y_out.data<X>();
    A *mean = mean_out.data<A>(), *rstd = rstd_out.data<A>();
    const X* x = x_in.data<X>();
    const A* w = w_in.data<A>();
    parallel_for(0, n, std::max<int64_t>(1, kNormGrain / p), [&](int64_t first, int64_t last) {
      const std::unique_ptr<A[]> row(new A[static_cast<size_t>(p)]);
      for (int64_t i = first; i < last; ++i) {
        load_row(row.get(), x + i * p, p);
        const auto s = row_statistics<true>(row.get(), p, static_cast<A>(eps));
        mean[i] = s.mean;
        rstd[i] = s.rstd;
        normalise_row<X, A>(y + i * p, row.get(), w + i % h * p, nullptr, A(0), s.mean, s.rstd, p);
      }
    });
  });
}

void head_norm_backward(Tensor& dx_out, Tensor& dw_out, bool add_dw, const Tensor& dy_in, const Tensor& x_in,
                        const Tensor& w_in, const Tensor& mean_in, const Tensor& rstd_in) {
  const int64_t p = x_in.size(-1), h = x_in.size(-2), c = h * p, r = x_in.numel() / c;
  const int64_t chunk = std::max<int64_t>(16, (r + 127) / 128), chunks = (r + chunk - 1) / chunk;
  visit_float(x_in.dtype(), [&]<class X>() {
    using A = accum_t<X>;
    const Tensor partial = empty({chunks, c}, dtype_of<A>, kCpu);
    A* dw_all = partial.data<A>();
    X* dx = dx_out.data<X>();
    const X *dy = dy_in.data<X>(), *x = x_in.data<X>();
    const A *w = w_in.data<A>(), *mean = mean_in.data<A>(), *rstd = rstd_in.data<A>();
    // Rows are cut by the shape alone, so that dw does not depend on the number of threads.
    parallel_for(0, chunks, std::max<int64_t>(1, kNormGrain / (c * chunk)), [&](int64_t first, int64_t last) {
      const std::unique_ptr<A[]> row(new A[static_cast<size_t>(p)]);
      for (int64_t k = first; k < last; ++k) {
        A* dw = dw_all + k * c;
        std::fill(dw, dw + c, A(0));
        for (int64_t i = k * chunk * h; i < std::min(r, (k + 1) * chunk) * h; ++i) {
          const int64_t at = i % h * p;
          backward_row<true, A>(row.get(), dw + at, static_cast<A*>(nullptr), dy + i * p, x + i * p, w + at, A(0), mean[i],
                                rstd[i], p);
          put_row(dx + i * p, row.get(), p);
        }
      }
    });
    sum_chunks(dw_out.data<A>(), add_dw, dw_all, chunks, c);
  });
}

}  // namespace krait::kernels::cpu
