#include "kernels/gated_rms_norm_split.h"

#include "kernels/cpu/gated_row.h"

namespace krait::kernels::cpu {

namespace {

template <class T, class A>
A square_sum(const T* __restrict x, const A* __restrict s, bool gated, int64_t c) {
  A sum = 0;
  if (gated) {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < c; ++j) {
      const A v = static_cast<A>(x[j]) * s[j];
      sum += v * v;
    }
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < c; ++j) sum += static_cast<A>(x[j]) * static_cast<A>(x[j]);
  }
  return sum;
}

template <class T, class A>
A dot_group(const T* __restrict dy, const T* __restrict x, const A* __restrict s, const A* __restrict w, A rstd, int64_t c) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < c; ++j) sum += static_cast<A>(dy[j]) * static_cast<A>(x[j]) * s[j] * rstd * w[j];
  return sum;
}

// f(s, row) for every row, with silu(z) of the row.
template <class T, class F>
void for_each_row(const Tensor& x, const Tensor& z_in, F f) {
  using A = accum_t<T>;
  const int64_t r = x.size(0), e = x.size(1), z_row = z_in.stride(0);
  const T* z = z_in.data<T>();
  parallel_for(0, r, std::max<int64_t>(1, kNormGrain / e), [&](int64_t first, int64_t last) {
    const std::unique_ptr<A[]> s(new A[static_cast<size_t>(e)]);
    for (int64_t i = first; i < last; ++i) {
      gate_row(s.get(), z + i * z_row, e);
      f(s.get(), i);
    }
  });
}

}  // namespace

void gated_rms_norm_squares(Tensor& squares, const Tensor& x, const Tensor& z, bool norm_first) {
  const int64_t e = x.size(1), groups = squares.size(1), c = e / groups;
  visit_float(x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    for_each_row<T>(x, z, [&](const A* s, int64_t i) {
      for (int64_t g = 0; g < groups; ++g)
        squares.data<A>()[i * groups + g] = square_sum(x.data<T>() + i * e + g * c, s + g * c, !norm_first, c);
    });
  });
}

void gated_rms_norm_apply(Tensor& y, const Tensor& x, const Tensor& z, const Tensor& w, const Tensor& rstd) {
  const int64_t e = x.size(1), groups = rstd.size(1), c = e / groups;
  visit_float(x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    for_each_row<T>(x, z, [&](const A* s, int64_t i) {
      for (int64_t g = 0, at = i * e; g < groups; ++g, at += c)
        write_again(y.data<T>() + at, x.data<T>() + at, s + g * c, w.data<A>() + g * c, rstd.data<A>()[i * groups + g], c);
    });
  });
}

void gated_rms_norm_dots(Tensor& dots, const Tensor& dy, const Tensor& x, const Tensor& z, const Tensor& w,
                         const Tensor& rstd) {
  const int64_t e = x.size(1), groups = rstd.size(1), c = e / groups;
  visit_float(x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    for_each_row<T>(x, z, [&](const A* s, int64_t i) {
      for (int64_t g = 0, at = i * e; g < groups; ++g, at += c)
        dots.data<A>()[i * groups + g] = dot_group(dy.data<T>() + at, x.data<T>() + at, s + g * c, w.data<A>() + g * c,
                                                   rstd.data<A>()[i * groups + g], c);
    });
  });
}

void gated_rms_norm_backward_split(Tensor& dx, Tensor& dz, Tensor& y, Tensor& dw, bool add_dw, const Tensor& dy, const Tensor& x,
                                   const Tensor& z, const Tensor& w, const Tensor& rstd, const Tensor& mean_in, bool norm_first) {
  visit_float(x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const auto group = norm_first ? write_gradient<true, T, A> : write_gradient<false, T, A>;
    backward_rows<T>(dx, dz, y, dw, add_dw, dy, x, z, w, rstd, [group, mean = mean_in.data<A>()](int64_t place, int64_t c, A scale, auto*... rows) {
      group(rows..., scale, mean[place], c);
    });
  });
}

}  // namespace krait::kernels::cpu
