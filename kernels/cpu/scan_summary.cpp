#include <memory>

#include "core/parallel.h"
#include "kernels/cpu/scan_block.h"

namespace krait::kernels::cpu {

using namespace scan;

namespace {

// h = exp(delta A) h + (delta x) B
template <class A>
void forwards(A* __restrict h, const A* __restrict a, const A* __restrict delta, const A* __restrict dx,
              const A* __restrict b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const A bi = b[i];
#pragma omp simd
    for (int64_t j = 0; j < kBlock; ++j)
      h[i * kBlock + j] = vexp(delta[j] * a[i * kBlock + j]) * h[i * kBlock + j] + dx[j] * bi;
  }
}

// r = exp(delta A) (r + g C)
template <class A>
void backwards(A* __restrict r, const A* __restrict a, const A* __restrict delta, const A* __restrict g,
               const A* __restrict c, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const A ci = c[i];
#pragma omp simd
    for (int64_t j = 0; j < kBlock; ++j)
      r[i * kBlock + j] = vexp(delta[j] * a[i * kBlock + j]) * (r[i * kBlock + j] + g[j] * ci);
  }
}

template <class A>
void gate(A* __restrict g, const A* __restrict z) {
#pragma omp simd
  for (int64_t j = 0; j < kBlock; ++j) g[j] *= vsilu(z[j]);
}

// f(channels, batch row, A of the block (n, kBlock), state (n, kBlock) of zeros, room for n values): one task a block.
template <class T, class F>
void for_each_block(const SelectiveScanInputs& in, F f) {
  using A = accum_t<T>;
  const int64_t e = in.x.size(2), n = in.A.size(1), blocks = blocks_of(e);
  parallel_for(0, in.x.size(0) * blocks, 1, [&](int64_t first, int64_t last) {
    const std::unique_ptr<A[]> scratch(new A[static_cast<size_t>(n * (2 * kBlock + 1))]);
    A *a = scratch.get(), *h = a + n * kBlock, *weights = h + n * kBlock;
    for (int64_t task = first; task < last; ++task) {
      const int64_t row = task / blocks;
      const Channels<T> s(in, row, task % blocks);
      load_block(a, in.A.data<A>() + s.at * n, n, s.count);
      std::fill(h, h + n * kBlock, A(0));
      f(s, row, a, h, weights);
    }
  });
}

}  // namespace

void selective_scan_summary(Tensor& state, Tensor& deltas, const SelectiveScanInputs& in) {
  visit_float(in.x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    for_each_block<T>(in, [&](const Channels<T>& s, int64_t row, const A* a, A* h, A* b) {
      Row<A> x, raw, delta, dx, sum = {};
      if (in.h0.defined()) load_block(h, in.h0.data<A>() + (row * s.e + s.at) * s.n, s.n, s.count);
      for (int64_t t = 0; t < s.l; ++t) {
        if (s.begins(t)) std::fill(h, h + s.n * kBlock, A(0));
        load_row(x, s.x + t * s.x_row, s.count);
        load_row(raw, s.dt + t * s.dt_row, s.count);
        load_states(b, s.b + t * s.b_row, s.n);
        discretise(delta, dx, raw, s.bias, x, s.softplus, s.count);
        forwards(h, a, delta, dx, b, s.n);
        for (int64_t j = 0; j < kBlock; ++j) sum[j] += delta[j];
      }
      store_block(state.data<A>() + (row * s.e + s.at) * s.n, h, s.n, s.count);
      store_row(deltas.data<A>() + row * s.e + s.at, sum, s.count);
    });
  });
}

void selective_scan_initial_gradient(Tensor& gradient, const Tensor& dy_in, const SelectiveScanInputs& in) {
  visit_float(in.x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    for_each_block<T>(in, [&](const Channels<T>& s, int64_t row, const A* a, A* r, A* c) {
      const T* dy = dy_in.data<T>() + row * dy_in.stride(0) + s.at;
      Row<A> g, z, raw, delta, unused;
      for (int64_t t = s.l - 1; t >= 0; --t) {
        load_row(g, dy + t * dy_in.stride(1), s.count);
        if (s.z != nullptr) {
          load_row(z, s.z + t * s.z_row, s.count);
          gate(g, z);
        }
        load_row(raw, s.dt + t * s.dt_row, s.count);
        load_states(c, s.c + t * s.c_row, s.n);
        discretise(delta, unused, raw, s.bias, g, s.softplus, s.count);
        backwards(r, a, delta, g, c, s.n);
        if (s.begins(t)) std::fill(r, r + s.n * kBlock, A(0));
      }
      store_block(gradient.data<A>() + (row * s.e + s.at) * s.n, r, s.n, s.count);
    });
  });
}

}  // namespace krait::kernels::cpu
