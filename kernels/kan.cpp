#include "kernels/kan.h"

namespace krait::kernels {

namespace {

void check_grid(const char* op, const Tensor& x, const Tensor& grid, int64_t order) {
  KRAIT_CHECK(order >= 0 && order <= kMaxSplineOrder, "{}: spline order {}, expected 0 to {}", op, order,
              kMaxSplineOrder);
  KRAIT_CHECK(x.ndim() >= 1 && grid.ndim() == 2 && grid.size(0) == x.size(-1) && grid.size(1) >= 2 * order + 2,
              "{}: grid is {}, expected ({}, G + {}) knots with G >= 1 to match x {} and order {}", op, grid.shape(),
              x.ndim() >= 1 ? x.size(-1) : 0, 2 * order + 1, x.shape(), order);
  KRAIT_CHECK(grid.device() == x.device(), "{}: x is {}, grid is {}", op, describe(x), describe(grid));
}

// Checks the shapes; contiguous tensors for the backends.
KanParameters checked(const char* op, const Tensor& x, const KanParameters& p) {
  check_grid(op, x, p.grid, p.order);
  check_same(op, x, p.spline);
  const int64_t in = x.size(-1), bases = p.grid.size(1) - p.order - 1;
  KRAIT_CHECK(p.spline.ndim() == 3 && p.spline.size(1) == in && p.spline.size(2) == bases,
              "{}: spline_weight is {}, expected (out, {}, {}) to match x {} and grid {} of order {}", op,
              p.spline.shape(), in, bases, x.shape(), p.grid.shape(), p.order);
  const Shape edges{p.spline.size(0), in};
  const auto edge_values = [&](const char* name, const Tensor& t) {
    if (!t.defined()) return t;
    check_same(op, x, t);
    KRAIT_CHECK(t.shape() == edges, "{}: {} is {}, expected {}", op, name, t.shape(), edges);
    return t.contiguous();
  };
  return {edge_values("base_weight", p.base), p.spline.contiguous(), edge_values("spline_scaler", p.scaler),
          p.grid.to(accum_dtype(x.dtype())).contiguous(), p.order};
}

bool is_empty(const Tensor& x, const KanParameters& p) { return x.numel() == 0 || p.spline.size(0) == 0; }

// The gradients that are wanted; zeros where no backend will run.
KanGrad make_grad(const Tensor& x, const KanParameters& p, KanWants wants) {
  const DType wide = accum_dtype(x.dtype());
  const auto make = [&](const Tensor& like, DType dtype) {
    return is_empty(x, p) ? zeros(like.shape(), dtype, x.device()) : empty(like.shape(), dtype, x.device());
  };
  KanGrad grad;
  if (wants.dx) grad.dx = make(x, x.dtype());
  if (!wants.weights) return grad;
  grad.spline = make(p.spline, wide);
  if (p.base.defined()) grad.base = make(p.base, wide);
  if (p.scaler.defined()) grad.scaler = make(p.scaler, wide);
  return grad;
}

template <class Backend>
KanGrad gradient(const Tensor& upstream, const Tensor& x, const KanParameters& p, KanWants wants, Backend backend) {
  KanGrad grad = make_grad(x, p, wants);
  if (is_empty(x, p) || (!wants.dx && !wants.weights)) return grad;
  KanGrad rows = grad;
  if (wants.dx) rows.dx = grad.dx.flatten_leading();
  backend(rows, upstream, x.flatten_leading());
  return grad;
}

}  // namespace

Tensor kan_forward(const Tensor& x_in, const KanParameters& parameters) {
  const KanParameters p = checked("kan", x_in, parameters);
  const Tensor x = x_in.contiguous();
  const Shape shape = x.shape().drop_last().append(p.spline.size(0));
  if (is_empty(x, p)) return zeros(shape, x.dtype(), x.device());
  const Tensor out = empty(shape, x.dtype(), x.device());
  Tensor y = out.flatten_leading();
  KRAIT_DISPATCH(x.device(), kan_forward(y, x.flatten_leading(), p));
  return out;
}

KanGrad kan_backward(const Tensor& dy, const Tensor& x, const KanParameters& parameters, KanWants wants) {
  const KanParameters p = checked("kan backward", x, parameters);
  check_same("kan backward", x, dy);
  const Shape shape = x.shape().drop_last().append(p.spline.size(0));
  KRAIT_CHECK(dy.shape() == shape, "kan backward: dy is {}, expected {}", dy.shape(), shape);
  return gradient(dy.contiguous(), x.contiguous(), p, wants, [&](KanGrad& grad, const Tensor& up, const Tensor& rows) {
    KRAIT_DISPATCH(x.device(), kan_backward(grad, up.flatten_leading(), rows, p));
  });
}

Tensor kan_edges_forward(const Tensor& x_in, const KanParameters& parameters) {
  const KanParameters p = checked("kan_edges", x_in, parameters);
  const Shape shape{p.spline.size(0), x_in.size(-1)};
  const DType wide = accum_dtype(x_in.dtype());
  if (is_empty(x_in, p)) return zeros(shape, wide, x_in.device());
  Tensor edges = empty(shape, wide, x_in.device());
  KRAIT_DISPATCH(x_in.device(), kan_edges_forward(edges, x_in.contiguous().flatten_leading(), p));
  return edges;
}

KanGrad kan_edges_backward(const Tensor& dedges, const Tensor& x, const KanParameters& parameters, KanWants wants) {
  const KanParameters p = checked("kan_edges backward", x, parameters);
  const Shape shape{p.spline.size(0), x.size(-1)};
  KRAIT_CHECK(dedges.shape() == shape && dedges.dtype() == accum_dtype(x.dtype()),
              "kan_edges backward: dedges is {}, expected {} {}", describe(dedges), accum_dtype(x.dtype()), shape);
  return gradient(dedges.contiguous(), x.contiguous(), p, wants,
                  [&](KanGrad& grad, const Tensor& up, const Tensor& rows) {
                    KRAIT_DISPATCH(x.device(), kan_edges_backward(grad, up, rows, p));
                  });
}

Tensor bspline_basis(const Tensor& x, const Tensor& grid, int64_t order, bool derivative) {
  check_grid("bspline_basis", x, grid, order);
  const DType wide = accum_dtype(x.dtype());
  Tensor basis = zeros(x.shape().append(grid.size(1) - order - 1), wide, x.device());
  if (x.numel() == 0) return basis;
  Tensor rows = basis.view({x.numel() / x.size(-1), x.size(-1), basis.size(-1)});
  KRAIT_DISPATCH(x.device(), bspline_basis(rows, x.to(wide).contiguous().flatten_leading(),
                                           grid.to(wide).contiguous(), order, derivative));
  return basis;
}

}  // namespace krait::kernels
