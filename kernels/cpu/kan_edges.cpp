#include "kernels/cpu/kan_edges.h"

#include "core/parallel.h"

// L1 norms of edges: one input at a time, all outputs in vectors. |phi| needs every edge's value for every row, so
// nothing can be summed over inputs first; values live in registers only.
namespace krait::kernels::cpu {

namespace {

// The values (or slopes) of one vector of edges in row b.
template <class A>
typename OutputLanes<A>::Vec edge_values(const A* c, A silu, const A* live, const A* base, int64_t width, int64_t k) {
  using L = OutputLanes<A>;
  typename L::Vec sum = silu * L::load(base);
  for (int64_t j = 0; j <= k; ++j) sum += c[j * kKanRows] * L::load(live + j * width);
  return sum;
}

// Calls f(i, packed weights of input i, scratch) for every input.
template <class A, class F>
void for_each_input(const Tensor& x, const KanParameters& p, const EdgeRows<A>& packed, F f) {
  parallel_for(0, x.size(1), kan_grain(x.size(0) * (p.order + 2) * packed.width()), [&](int64_t first, int64_t last) {
    std::vector<A> w(static_cast<size_t>(packed.size()));
    EdgeBasis<A> basis(p.order);
    for (int64_t i = first; i < last; ++i) {
      packed.pack(w.data(), p, i);
      f(i, w.data(), basis);
    }
  });
}

template <class A>
EdgeRows<A> rows_of(const KanParameters& p) {
  return {p.spline.size(1), p.spline.size(0), p.spline.size(2), p.order};
}

template <class A>
void forward(Tensor& edges, const Tensor& x_in, const KanParameters& p_in) {
  using L = OutputLanes<A>;
  const KanParameters p = in_sums<A>(p_in);
  const Tensor x = x_in.to(dtype_of<A>);
  const int64_t r = x.size(0), inputs = x.size(1), outputs = p.spline.size(0);
  const EdgeRows<A> packed = rows_of<A>(p);
  const int64_t width = packed.width();
  const KnotRows<A> knots(p.grid, p.order);
  for_each_input<A>(x, p, packed, [&](int64_t i, const A* w, EdgeBasis<A>& basis) {
    std::vector<A> sums(static_cast<size_t>(width), A(0));
    for (int64_t at = 0; at < r; at += kKanRows) {
      basis.compute(x.data<A>(), r, inputs, at, i, knots[i], false);
      for (int64_t b = 0; b < std::min(kKanRows, r - at); ++b)
        for (int64_t o = 0; o < width; o += L::n) {
          const auto phi = edge_values<A>(basis.value.data() + b, basis.silu[b], w + basis.interval[b] * width + o,
                                          w + packed.base_row() * width + o, width, p.order);
          L::store(sums.data() + o, L::load(sums.data() + o) + (phi < 0 ? -phi : phi));
        }
    }
    for (int64_t o = 0; o < outputs; ++o)
      edges.data<A>()[o * inputs + i] = sums[static_cast<size_t>(o)] / static_cast<A>(r);
  });
}

template <class A>
void backward(KanGrad& grad, const Tensor& dedges, const Tensor& x_in, const KanParameters& p_in) {
  using L = OutputLanes<A>;
  using Vec = typename L::Vec;
  const KanParameters p = in_sums<A>(p_in);
  const Tensor x = x_in.to(dtype_of<A>);
  const int64_t r = x.size(0), inputs = x.size(1), outputs = p.spline.size(0);
  const EdgeRows<A> packed = rows_of<A>(p);
  const int64_t width = packed.width();
  const KnotRows<A> knots(p.grid, p.order);
  Tensor dx = grad.dx.defined() ? empty({r, inputs}, dtype_of<A>, kCpu) : Tensor();
  for_each_input<A>(x, p, packed, [&](int64_t i, const A* w, EdgeBasis<A>& basis) {
    std::vector<A> g(static_cast<size_t>(packed.size()), A(0)), up(static_cast<size_t>(width), A(0));
    for (int64_t o = 0; o < outputs; ++o)
      up[static_cast<size_t>(o)] = dedges.data<A>()[o * inputs + i] / static_cast<A>(r);
    A* dx_to = dx.defined() ? dx.data<A>() : nullptr;
    for (int64_t at = 0; at < r; at += kKanRows) {
      basis.compute(x.data<A>(), r, inputs, at, i, knots[i], true);
      for (int64_t b = 0; b < std::min(kKanRows, r - at); ++b) {
        const int64_t live = basis.interval[b] * width, base = packed.base_row() * width;
        Vec slope_sum = {};
        for (int64_t o = 0; o < width; o += L::n) {
          const Vec phi = edge_values<A>(basis.value.data() + b, basis.silu[b], w + live + o, w + base + o, width, p.order);
          const Vec u = L::load(up.data() + o), zero = {};
          const Vec d = phi > 0 ? u : phi < 0 ? -u : zero;
          slope_sum += d * edge_values<A>(basis.slope.data() + b, basis.silu_slope[b], w + live + o, w + base + o,
                                          width, p.order);
          const auto add = [&](A* to, A c) { L::store(to, L::load(to) + c * d); };
          add(g.data() + base + o, basis.silu[b]);
          for (int64_t j = 0; j <= p.order; ++j)
            add(g.data() + live + j * width + o, basis.value[static_cast<size_t>(j * kKanRows + b)]);
        }
        if (dx_to) dx_to[(at + b) * inputs + i] = lane_sum<A>(slope_sum);
      }
    }
    if (grad.spline.defined()) packed.unpack_gradient(grad, g.data(), p, i);
  });
  if (dx.defined()) copy_(grad.dx, dx);
}

}  // namespace

void kan_edges_forward(Tensor& edges, const Tensor& x, const KanParameters& p) {
  if (x.dtype() == DType::f64) return forward<double>(edges, x, p);
  forward<float>(edges, x, p);
}

void kan_edges_backward(KanGrad& grad, const Tensor& dedges, const Tensor& x, const KanParameters& p) {
  if (x.dtype() == DType::f64) return backward<double>(grad, dedges, x, p);
  backward<float>(grad, dedges, x, p);
}

}  // namespace krait::kernels::cpu
