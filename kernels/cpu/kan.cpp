#include "kernels/kan.h"

#include "core/parallel.h"
#include "kernels/cpu/kan_edges.h"

// Only the k+1 live coefficients of an edge are read (the gather form). Rows are worked off kKanRows at a time, so
// that bases are computed in vectors over rows and the weights of a few inputs stay in the first-level cache while
// all rows of the block pass by, in vectors over outputs.
namespace krait::kernels::cpu {

namespace {

constexpr int64_t kInputs = 8;  // whose weights are in the cache together

// sum_j c[j kKanRows] w[j width] over the k+1 live rows. K: the order where it is known, else -1.
template <int K, class A>
[[gnu::always_inline]] inline typename OutputLanes<A>::Vec live_sum(const A* c, const A* w, int64_t width, int64_t k) {
  using L = OutputLanes<A>;
  typename L::Vec sum = c[0] * L::load(w);
  const int64_t last = K >= 0 ? K : k;
#pragma GCC unroll 4
  for (int64_t j = 1; j <= last; ++j) sum += c[j * kKanRows] * L::load(w + j * width);
  return sum;
}

// y[b] += the edges out of one input, NV vectors of outputs at once.
template <int K, int NV, class A>
void add_edges(A* y, int64_t rows, const EdgeBasis<A>& basis, const A* w, const EdgeRows<A>& packed, bool base) {
  using L = OutputLanes<A>;
  const int64_t width = packed.width();
  for (int64_t b = 0; b < rows; ++b) {
    const A* live = w + basis.interval[b] * width;
    const A* c = basis.value.data() + b;
    A* to = y + b * width;
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      typename L::Vec sum = L::load(to + v * L::n) + live_sum<K>(c, live + v * L::n, width, basis.k);
      if (base) sum += basis.silu[b] * L::load(w + packed.base_row() * width + v * L::n);
      L::store(to + v * L::n, sum);
    }
  }
}

// dx[b] = sum_o dy[b,o] phi'_o(x[b]) for one input.
template <int K, class A>
void input_gradient(A* dx, const A* dy, int64_t rows, const EdgeBasis<A>& basis, const A* w,
                    const EdgeRows<A>& packed) {
  using L = OutputLanes<A>;
  const int64_t width = packed.width();
  for (int64_t b = 0; b < rows; ++b) {
    const A* live = w + basis.interval[b] * width;
    typename L::Vec sum = {};
    for (int64_t o = 0; o < width; o += L::n) {
      typename L::Vec slope = basis.silu_slope[b] * L::load(w + packed.base_row() * width + o);
      if (K != 0) slope += live_sum<K>(basis.slope.data() + b, live + o, width, basis.k);
      sum += slope * L::load(dy + b * width + o);
    }
    dx[b] = lane_sum<A>(sum);
  }
}

// g[row of basis] += B(x[b]) dy[b] for one input, NV vectors of outputs at once.
template <int K, int NV, class A>
void weight_gradient(A* g, const A* dy, int64_t rows, const EdgeBasis<A>& basis, const EdgeRows<A>& packed) {
  using L = OutputLanes<A>;
  const int64_t width = packed.width(), last = K >= 0 ? K : basis.k;
  typename L::Vec base[NV] = {};
  for (int64_t b = 0; b < rows; ++b) {
    A* live = g + basis.interval[b] * width;
    typename L::Vec up[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      up[v] = L::load(dy + b * width + v * L::n);
      base[v] += basis.silu[b] * up[v];
    }
#pragma GCC unroll 4
    for (int64_t j = 0; j <= last; ++j) {
      const A c = basis.value[static_cast<size_t>(j * kKanRows + b)];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        A* at = live + j * width + v * L::n;
        L::store(at, L::load(at) + c * up[v]);
      }
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    A* at = g + packed.base_row() * width + v * L::n;
    L::store(at, L::load(at) + base[v]);
  }
}

// f<K>() with the usual orders as constants.
template <class F>
void visit_order(int64_t order, F&& f) {
  if (order == 3) return f.template operator()<3>();
  if (order == 0) return f.template operator()<0>();
  f.template operator()<-1>();
}

// f<NV>(o) over the outputs in pieces of four vectors, then one.
template <class A, class F>
void for_each_piece(int64_t width, F&& f) {
  int64_t o = 0;
  for (; o + 4 * OutputLanes<A>::n <= width; o += 4 * OutputLanes<A>::n) f.template operator()<4>(o);
  for (; o < width; o += OutputLanes<A>::n) f.template operator()<1>(o);
}

// Rows of t (rows, n) padded to `width` columns, in the dtype of sums.
template <class A>
Tensor padded(const Tensor& t_in, int64_t width) {
  const Tensor t = t_in.to(dtype_of<A>);
  if (t.size(1) == width) return t;
  Tensor out = zeros({t.size(0), width}, t.dtype(), kCpu);
  Tensor view = out.slice(1, 0, t.size(1));
  copy_(view, t);
  return out;
}

template <class A>
Tensor pack_all(const EdgeRows<A>& packed, const KanParameters& p) {
  const int64_t inputs = p.spline.size(1);
  Tensor w = empty({inputs, packed.size()}, dtype_of<A>, kCpu);
  parallel_for(0, inputs, kan_grain(packed.size()), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) packed.pack(w.data<A>() + i * packed.size(), p, i);
  });
  return w;
}

template <class A>
EdgeRows<A> rows_of(const KanParameters& p) {
  return {p.spline.size(1), p.spline.size(0), p.spline.size(2), p.order};
}

template <class A>
void forward(Tensor& y, const Tensor& x_in, const KanParameters& p_in) {
  const KanParameters p = in_sums<A>(p_in);
  const Tensor x = x_in.to(dtype_of<A>);
  const int64_t r = x.size(0), inputs = x.size(1);
  const EdgeRows<A> packed = rows_of<A>(p);
  const int64_t width = packed.width();
  const Tensor w = pack_all(packed, p);
  const KnotRows<A> knots(p.grid, p.order);
  Tensor sums = empty({r, width}, dtype_of<A>, kCpu);
  parallel_for(0, (r + kKanRows - 1) / kKanRows, kan_grain(kKanRows * inputs * (p.order + 2) * width), [&](int64_t first, int64_t last) {
    std::vector<EdgeBasis<A>> bases(kInputs, EdgeBasis<A>(p.order));
    for (int64_t block = first; block < last; ++block) {
      const int64_t at = block * kKanRows, rows = std::min(kKanRows, r - at);
      A* to = sums.data<A>() + at * width;
      std::fill(to, to + rows * width, A(0));
      for (int64_t i0 = 0; i0 < inputs; i0 += kInputs) {
        const int64_t i1 = std::min(i0 + kInputs, inputs);
        for (int64_t i = i0; i < i1; ++i)
          bases[static_cast<size_t>(i - i0)].compute(x.data<A>(), r, inputs, at, i, knots[i], false);
        visit_order(p.order, [&]<int K>() {
          for_each_piece<A>(width, [&]<int NV>(int64_t o) {
            for (int64_t i = i0; i < i1; ++i)
              add_edges<K, NV>(to + o, rows, bases[static_cast<size_t>(i - i0)], w.data<A>() + i * packed.size() + o,
                               packed, p.base.defined());
          });
        });
      }
    }
  });
  copy_(y, sums.slice(1, 0, y.size(1)));
}

template <class A>
void backward_inputs(Tensor& dx_out, const Tensor& dy, const Tensor& x, const KanParameters& p,
                     const EdgeRows<A>& packed, const KnotRows<A>& knots) {
  const int64_t r = x.size(0), inputs = x.size(1), width = packed.width();
  const Tensor w = pack_all(packed, p);
  Tensor dx = empty({r, inputs}, dtype_of<A>, kCpu);
  parallel_for(0, (r + kKanRows - 1) / kKanRows, kan_grain(kKanRows * inputs * (p.order + 2) * width), [&](int64_t first, int64_t last) {
    EdgeBasis<A> basis(p.order);
    A column[kKanRows], *to = dx.data<A>();
    for (int64_t block = first; block < last; ++block) {
      const int64_t at = block * kKanRows, rows = std::min(kKanRows, r - at);
      for (int64_t i = 0; i < inputs; ++i) {
        basis.compute(x.data<A>(), r, inputs, at, i, knots[i], true);
        visit_order(p.order, [&]<int K>() {
          input_gradient<K>(column, dy.data<A>() + at * width, rows, basis, w.data<A>() + i * packed.size(), packed);
        });
        for (int64_t b = 0; b < rows; ++b) to[(at + b) * inputs + i] = column[b];
      }
    }
  });
  copy_(dx_out, dx);
}

// Every input's sums are made by one thread, in the order of the rows.
template <class A>
void backward_weights(KanGrad& grad, const Tensor& dy, const Tensor& x, const KanParameters& p,
                      const EdgeRows<A>& packed, const KnotRows<A>& knots) {
  const int64_t r = x.size(0), inputs = x.size(1), width = packed.width();
  parallel_for(0, inputs, kan_grain(r * (p.order + 2) * width), [&](int64_t first, int64_t last) {
    EdgeBasis<A> basis(p.order);
    std::vector<A> g(static_cast<size_t>(packed.size()));
    for (int64_t i = first; i < last; ++i) {
      std::fill(g.begin(), g.end(), A(0));
      for (int64_t at = 0; at < r; at += kKanRows) {
        basis.compute(x.data<A>(), r, inputs, at, i, knots[i], false);
        const int64_t rows = std::min(kKanRows, r - at);
        visit_order(p.order, [&]<int K>() {
          for_each_piece<A>(width, [&]<int NV>(int64_t o) {
            weight_gradient<K, NV>(g.data() + o, dy.data<A>() + at * width + o, rows, basis, packed);
          });
        });
      }
      packed.unpack_gradient(grad, g.data(), p, i);
    }
  });
}

}  // namespace

void kan_forward(Tensor& y, const Tensor& x, const KanParameters& p) {
  if (x.dtype() == DType::f64) return forward<double>(y, x, p);
  forward<float>(y, x, p);
}

void kan_backward(KanGrad& grad, const Tensor& dy_in, const Tensor& x_in, const KanParameters& p_in) {
  const auto run = [&]<class A>(A) {
    const KanParameters p = in_sums<A>(p_in);
    const EdgeRows<A> packed = rows_of<A>(p);
    const Tensor x = x_in.to(dtype_of<A>), dy = padded<A>(dy_in, packed.width());
    const KnotRows<A> knots(p.grid, p.order);
    if (grad.dx.defined()) backward_inputs<A>(grad.dx, dy, x, p, packed, knots);
    if (grad.spline.defined()) backward_weights<A>(grad, dy, x, p, packed, knots);
  };
  if (x_in.dtype() == DType::f64) return run(0.0);
  run(0.0F);
}

void bspline_basis(Tensor& basis, const Tensor& x, const Tensor& grid, int64_t order, bool derivative) {
  const auto run = [&]<class A>(A) {
    const int64_t r = x.size(0), inputs = x.size(1), n = basis.size(2);
    const KnotRows<A> knots(grid, order);
    parallel_for(0, inputs, kan_grain(r * 16 * (order + 1)), [&](int64_t first, int64_t last) {
      EdgeBasis<A> at(order);
      A* to = basis.data<A>();
      for (int64_t i = first; i < last; ++i)
        for (int64_t b0 = 0; b0 < r; b0 += kKanRows) {
          at.compute(x.data<A>(), r, inputs, b0, i, knots[i], derivative);
          const std::vector<A>& from = derivative ? at.slope : at.value;
          for (int64_t b = 0; b < std::min(kKanRows, r - b0); ++b)
            for (int64_t j = 0; j <= order; ++j) {
              const int64_t g = at.interval[static_cast<size_t>(b)] - order + j;
              if (g >= 0 && g < n)
                to[((b0 + b) * inputs + i) * n + g] = from[static_cast<size_t>(j * kKanRows + b)];
            }
        }
    });
  };
  if (x.dtype() == DType::f64) return run(0.0);
  run(0.0F);
}

}  // namespace krait::kernels::cpu
