#include "core/shape.h"

#include <algorithm>

namespace krait::core {

int64_t Shape::numel() const {
  int64_t n = 1;
  for (const int64_t d : dims_) n *= d;
  return n;
}

int64_t Shape::wrap(int64_t dim) const {
  KRAIT_CHECK(dim >= -ndim() && dim < ndim(), "dimension {} is out of range for shape {}", dim, str());
  return dim < 0 ? dim + ndim() : dim;
}

Shape Shape::drop_last(int64_t count) const {
  KRAIT_CHECK(count <= ndim(), "cannot drop {} dimensions of shape {}", count, str());
  return Shape(std::vector<int64_t>(dims_.begin(), dims_.end() - count));
}

Shape Shape::append(int64_t size) const {
  Shape out = *this;
  out.dims_.push_back(size);
  return out;
}

Shape Shape::with(int64_t dim, int64_t size) const {
  Shape out = *this;
  out[dim] = size;
  return out;
}

Shape Shape::without(int64_t dim) const {
  Shape out = *this;
  out.dims_.erase(out.dims_.begin() + wrap(dim));
  return out;
}

Shape Shape::inserted(int64_t dim, int64_t size) const {
  const int64_t at = dim < 0 ? dim + ndim() + 1 : dim;
  KRAIT_CHECK(at >= 0 && at <= ndim(), "cannot insert a dimension at {} into shape {}", dim, str());
  Shape out = *this;
  out.dims_.insert(out.dims_.begin() + at, size);
  return out;
}

std::string Shape::str() const {
  std::string s = "(";
  for (size_t i = 0; i < dims_.size(); ++i) s += fmt::format("{}{}", i ? ", " : "", dims_[i]);
  return s + (dims_.size() == 1 ? ",)" : ")");
}

Shape broadcast_shapes(const Shape& a, const Shape& b) {
  const int64_t n = std::max(a.ndim(), b.ndim());
  std::vector<int64_t> out(static_cast<size_t>(n), 1);
  for (int64_t i = 1; i <= n; ++i) {
    const int64_t da = i <= a.ndim() ? a[-i] : 1, db = i <= b.ndim() ? b[-i] : 1;
    KRAIT_CHECK(da == db || da == 1 || db == 1, "shapes {} and {} do not broadcast: {} against {}", a, b, da, db);
    out[static_cast<size_t>(n - i)] = da == 1 ? db : da;
  }
  return Shape(std::move(out));
}

}  // namespace krait::core
