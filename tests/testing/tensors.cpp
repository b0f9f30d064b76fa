#include "tests/testing/tensors.h"

#include <cmath>
#include <limits>

#include "core/random.h"

namespace krait::testing {

double relative_error(const Tensor& a, const Tensor& reference) {
  if (a.shape() != reference.shape()) return std::numeric_limits<double>::infinity();
  const auto x = a.to_vector<double>(), r = reference.to_vector<double>();
  double difference = 0, scale = 1e-6;
  for (size_t i = 0; i < r.size(); ++i) {
    if (!std::isfinite(r[i]) || !std::isfinite(x[i])) {
      const bool same = (std::isnan(r[i]) && std::isnan(x[i])) || r[i] == x[i];
      if (!same) return std::numeric_limits<double>::infinity();
      continue;
    }
    difference = std::max(difference, std::abs(x[i] - r[i]));
    scale = std::max(scale, std::abs(r[i]));
  }
  return difference / scale;
}

Tensor random_tensor(const Shape& shape, const Fill& fill, uint64_t seed, DType dtype) {
  Tensor t = empty(shape, DType::f64, kCpu);
  const uint64_t key = random_key(seed, "test");
  if (const auto* n = std::get_if<Normal>(&fill))
    fill_normal_(t, n->mean, n->std, key);
  else if (const auto* u = std::get_if<Uniform>(&fill))
    fill_uniform_(t, u->low, u->high, key);
  else
    fill_(t, std::get<Constant>(fill).value);
  return t.to(dtype);
}

Tensor random_integers(const Shape& shape, IntegerRange range, uint64_t seed) {
  Tensor u = empty(shape, DType::f64, kCpu);
  fill_uniform_(u, static_cast<double>(range.low), static_cast<double>(range.high), random_key(seed, "integers"));
  return u.to(DType::i64);
}

Tensor strided_copy_of(const Tensor& t) {
  // One more element per dimension, stored with the dimensions reversed.
  std::vector<int64_t> order;
  Shape reversed;
  for (int64_t i = t.ndim() - 1; i >= 0; --i) {
    order.push_back(i);
    reversed.push_back(t.size(i) + 1);
  }
  Tensor view = zeros(reversed, t.dtype(), t.device()).permute(order);
  for (int64_t i = 0; i < t.ndim(); ++i) view = view.slice(i, 1, t.size(i) + 1);
  copy_(view, t);
  return view;
}

}  // namespace krait::testing
