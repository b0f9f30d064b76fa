#include "kernels/reduce.h"

#include <cmath>
#include <limits>

#include "kernels/elementwise.h"

namespace krait::kernels {

namespace {

std::vector<bool> reduced(const Shape& shape, const Dims& dims) {
  std::vector<bool> flags(static_cast<size_t>(shape.ndim()), dims.empty());
  for (const int64_t d : dims) {
    const auto at = static_cast<size_t>(shape.wrap(d));
    KRAIT_CHECK(!flags[at], "reduction of {} names dimension {} twice", shape, d);
    flags[at] = true;
  }
  return flags;
}

// x as contiguous (o, r, i). Dimensions to reduce that are not neighbours are moved to the end, which copies.
Tensor as_three(const Tensor& x, const std::vector<bool>& flags) {
  const int64_t n = x.ndim();
  int64_t first = n, last = -1;  // range of reduced dimensions larger than 1
  bool apart = false;
  for (int64_t d = 0; d < n; ++d) {
    if (!flags[static_cast<size_t>(d)] || x.size(d) == 1) continue;
    if (first == n) first = d;
    for (int64_t k = last + 1; last >= 0 && k < d; ++k)
      apart = apart || (!flags[static_cast<size_t>(k)] && x.size(k) != 1);
    last = d;
  }
  if (last < 0) return x.reshape({x.numel(), 1, 1});
  Tensor t = x;
  if (apart) {
    std::vector<int64_t> order;
    for (const bool wanted : {false, true})
      for (int64_t d = 0; d < n; ++d)
        if (flags[static_cast<size_t>(d)] == wanted) order.push_back(d);
    first = 0;
    for (const bool f : flags) first += f ? 0 : 1;
    last = n - 1;
    t = x.permute(order);
  }
  int64_t o = 1, r = 1, i = 1;
  for (int64_t d = 0; d < n; ++d) (d < first ? o : d <= last ? r : i) *= t.size(d);
  return t.contiguous().view({o, r, i});
}

void check_float(std::string_view name, const Tensor& x) {
  KRAIT_CHECK(x.dtype() == DType::f32 || x.dtype() == DType::f64 || x.dtype() == DType::bf16,
              "{}: expected float32, float64 or bfloat16, found {}", fmt::string_view(name.data(), name.size()),
              describe(x));
}

Tensor scaled_sum(std::string_view name, const Tensor& x, const Dims& dims, bool keep, bool average) {
  check_float(name, x);
  Tensor y = empty(reduced_shape(x.shape(), dims, keep), x.dtype(), x.device());
  if (x.numel() == 0) {
    fill_(y, average ? std::numeric_limits<double>::quiet_NaN() : 0.0);
    return y;
  }
  const double scale = average ? static_cast<double>(y.numel()) / static_cast<double>(x.numel()) : 1.0;
  const Tensor three = as_three(x, reduced(x.shape(), dims));
  Tensor flat = y.view({three.size(0), three.size(2)});
  KRAIT_DISPATCH(x.device(), sum(flat, three, scale));
  return y;
}

template <class F>
Tensor extreme(std::string_view name, const Tensor& x, const Dims& dims, bool keep, F&& choose) {
  check_float(name, x);
  Tensor y = empty(reduced_shape(x.shape(), dims, keep), x.dtype(), x.device());
  if (y.numel() == 0) return y;
  KRAIT_CHECK(x.numel() > 0, "{}: {} has no values to choose from", fmt::string_view(name.data(), name.size()), x.shape());
  const Tensor three = as_three(x, reduced(x.shape(), dims));
  Tensor flat = y.view({three.size(0), three.size(2)});
  choose(flat, three);
  return y;
}

}  // namespace

Shape reduced_shape(const Shape& shape, const Dims& dims, bool keep) {
  const std::vector<bool> flags = reduced(shape, dims);
  Shape out;
  for (int64_t d = 0; d < shape.ndim(); ++d) {
    if (!flags[static_cast<size_t>(d)])
      out.push_back(shape[d]);
    else if (keep)
      out.push_back(1);
  }
  return out;
}

Tensor sum(const Tensor& x, const Dims& dims, bool keep) { return scaled_sum("sum", x, dims, keep, false); }
Tensor mean(const Tensor& x, const Dims& dims, bool keep) { return scaled_sum("mean", x, dims, keep, true); }

Tensor amax(const Tensor& x, const Dims& dims, bool keep) {
  return extreme("amax", x, dims, keep, [](Tensor& y, const Tensor& three) { KRAIT_DISPATCH(y.device(), amax(y, three)); });
}

Tensor amin(const Tensor& x, const Dims& dims, bool keep) {
  return extreme("amin", x, dims, keep, [](Tensor& y, const Tensor& three) { KRAIT_DISPATCH(y.device(), amin(y, three)); });
}

Tensor logsumexp(const Tensor& x, const Dims& dims, bool keep) {
  check_float("logsumexp", x);
  const Shape shape = reduced_shape(x.shape(), dims, keep);
  const DType wide = accum_dtype(x.dtype());
  if (x.numel() == 0) return full(shape, -std::numeric_limits<double>::infinity(), x.dtype(), x.device());
  const Tensor three = as_three(x, reduced(x.shape(), dims));
  Tensor highest = empty({three.size(0), three.size(2)}, x.dtype(), x.device());
  KRAIT_DISPATCH(x.device(), amax(highest, three));
  // Finite, so that rows of -inf, or with +inf, do not become NaN by inf - inf.
  constexpr double kLargest = 3e38;
  const Tensor shift = clamp(highest.to(wide), -kLargest, kLargest);
  Tensor total = empty_like(shift);
  KRAIT_DISPATCH(x.device(), sum_exp(total, three, shift));
  return add(log(total), shift).to(x.dtype()).view(shape);
}

Tensor argmax(const Tensor& x, int64_t dim, bool keep) {
  check_float("argmax", x);
  KRAIT_CHECK(x.ndim() > 0 && x.size(dim) > 0, "argmax: {} has no values along dimension {}", x.shape(), dim);
  const Shape shape = reduced_shape(x.shape(), {dim}, keep);
  Tensor y = empty(shape, DType::i64, x.device());
  if (y.numel() == 0) return y;
  const Tensor rows = x.transpose(dim, -1);
  // Moving `dim` last by exchange keeps the other dimensions in place of one another: undo it on the result.
  Tensor flat = empty(rows.shape().with(-1, 1), DType::i64, x.device());
  Tensor out = flat.view({flat.numel()});
  KRAIT_DISPATCH(x.device(), argmax(out, rows.contiguous().view({-1, x.size(dim)})));
  const Tensor back = flat.transpose(dim, -1);
  copy_(y, back.reshape(shape));
  return y;
}

Tensor sum_to(const Tensor& x, const Shape& shape) {
  if (x.shape() == shape) return x;
  const int64_t lead = x.ndim() - shape.ndim();
  KRAIT_CHECK(lead >= 0, "sum_to: {} is no broadcast of {}", x.shape(), shape);
  Dims dims;
  for (int64_t d = 0; d < x.ndim(); ++d) {
    const int64_t wanted = d < lead ? 1 : shape[d - lead];
    KRAIT_CHECK(wanted == x.size(d) || wanted == 1, "sum_to: {} is no broadcast of {}", x.shape(), shape);
    if (d < lead || (wanted == 1 && x.size(d) != 1)) dims.push_back(d);
  }
  if (dims.empty()) return x.reshape(shape);
  return sum(x, dims, true).view(shape);
}

}  // namespace krait::kernels
