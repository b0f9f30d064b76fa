#include "autograd/shape.h"

#include <numeric>

#include "kernels/gather.h"
#include "kernels/reduce.h"

namespace krait::autograd {

Variable reshape(const Variable& x, const Shape& shape) {
  return record("reshape", {x}, x.data().reshape(shape),
                [from = x.shape()](const Tensor& dy) -> Grads { return {dy.reshape(from)}; });
}

Variable transpose(const Variable& x, int64_t a, int64_t b) {
  return record("transpose", {x}, x.data().transpose(a, b),
                [a, b](const Tensor& dy) -> Grads { return {dy.transpose(a, b)}; });
}

Variable permute(const Variable& x, const std::vector<int64_t>& order) {
  std::vector<int64_t> inverse(order.size());
  const Tensor y = x.data().permute(order);
  for (size_t i = 0; i < order.size(); ++i) inverse[static_cast<size_t>(x.shape().wrap(order[i]))] = static_cast<int64_t>(i);
  return record("permute", {x}, y, [inverse](const Tensor& dy) -> Grads { return {dy.permute(inverse)}; });
}

Variable unsqueeze(const Variable& x, int64_t dim) { return reshape(x, x.shape().inserted(dim, 1)); }

Variable squeeze(const Variable& x, int64_t dim) {
  KRAIT_CHECK(x.size(dim) == 1, "squeeze: dimension {} of {} is not 1", dim, x.shape());
  return reshape(x, x.shape().without(dim));
}

Variable expand(const Variable& x, const Shape& shape) {
  return record("expand", {x}, x.data().expand(shape),
                [from = x.shape()](const Tensor& dy) -> Grads { return {kernels::sum_to(dy, from)}; });
}

Variable slice(const Variable& x, int64_t dim, int64_t begin, int64_t end) {
  return record("slice", {x}, x.data().slice(dim, begin, end),
                [shape = x.shape(), dim, begin, end](const Tensor& dy) -> Grads {
                  Tensor dx = zeros(shape, dy.dtype(), dy.device());
                  Tensor part = dx.slice(dim, begin, end);
                  copy_(part, dy);
                  return {dx};
                });
}

Variable select(const Variable& x, int64_t dim, int64_t index) {
  const int64_t i = index < 0 ? index + x.size(dim) : index;
  return squeeze(slice(x, dim, i, i + 1), dim);
}

Vars split(const Variable& x, const std::vector<int64_t>& sizes, int64_t dim) {
  KRAIT_CHECK(std::accumulate(sizes.begin(), sizes.end(), int64_t{0}) == x.size(dim),
              "split: the sizes do not add up to dimension {} of {}", dim, x.shape());
  std::vector<Tensor> parts;
  int64_t begin = 0;
  for (const int64_t size : sizes) {
    parts.push_back(x.data().slice(dim, begin, begin + size));
    begin += size;
  }
  return record("split", {x}, parts,
                [shape = x.shape(), dtype = x.dtype(), device = x.device(), sizes, dim](const std::vector<Tensor>& dy) -> Grads {
                  Tensor dx = empty(shape, dtype, device);
                  int64_t at = 0;
                  for (size_t i = 0; i < sizes.size(); ++i) {
                    Tensor part = dx.slice(dim, at, at + sizes[i]);
                    if (dy[i].defined())
                      copy_(part, dy[i]);
                    else
                      zero_(part);
                    at += sizes[i];
                  }
                  return {dx};
                });
}

Vars chunk(const Variable& x, int64_t parts, int64_t dim) {
  KRAIT_CHECK(parts > 0 && x.size(dim) % parts == 0, "chunk: dimension {} of {} does not split into {} equal parts", dim,
              x.shape(), parts);
  return split(x, std::vector<int64_t>(static_cast<size_t>(parts), x.size(dim) / parts), dim);
}

Variable contiguous(const Variable& x) {
  return record("contiguous", {x}, x.data().contiguous(), [](const Tensor& dy) -> Grads { return {dy}; });
}

Variable concat(const Vars& parts, int64_t dim) {
  KRAIT_CHECK(!parts.empty(), "concat: nothing to join");
  const Shape& first = parts[0].shape();
  int64_t total = 0;
  for (const Variable& v : parts) {
    check_same("concat", parts[0].data(), v.data());
    KRAIT_CHECK(v.ndim() == first.ndim() && v.shape().with(dim, 1) == first.with(dim, 1),
                "concat: {} and {} differ outside dimension {}", first, v.shape(), dim);
    total += v.size(dim);
  }
  const Tensor y = empty(first.with(dim, total), parts[0].dtype(), parts[0].device());
  std::vector<int64_t> sizes;
  int64_t at = 0;
  for (const Variable& v : parts) {
    sizes.push_back(v.size(dim));
    Tensor part = y.slice(dim, at, at + sizes.back());
    copy_(part, v.data());
    at += sizes.back();
  }
  return record("concat", parts, y, [sizes, dim](const Tensor& dy) -> Grads {
    Grads grads;
    int64_t begin = 0;
    for (const int64_t size : sizes) {
      grads.push_back(dy.slice(dim, begin, begin + size));
      begin += size;
    }
    return grads;
  });
}

Variable stack(const Vars& parts, int64_t dim) {
  Vars slices;
  for (const Variable& v : parts) slices.push_back(unsqueeze(v, dim));
  return concat(slices, dim);
}

namespace {
// Copied out of a view that runs backwards.
Tensor flipped(const Tensor& x, int64_t dim) {
  if (x.numel() == 0) return x;
  std::vector<int64_t> strides = x.strides();
  strides[static_cast<size_t>(x.shape().wrap(dim))] *= -1;
  return Tensor(x.storage(), x.shape(), strides, x.offset() + (x.size(dim) - 1) * x.stride(dim), x.dtype()).clone();
}
}  // namespace

Variable flip(const Variable& x, int64_t dim) {
  return record("flip", {x}, flipped(x.data(), dim), [dim](const Tensor& dy) -> Grads { return {flipped(dy, dim)}; });
}

Variable cast(const Variable& x, DType dtype) {
  if (dtype == x.dtype()) return x;
  return record("cast", {x}, x.data().to(dtype), [from = x.dtype()](const Tensor& dy) -> Grads { return {dy.to(from)}; });
}

Variable gather(const Variable& x, int64_t dim, const Tensor& index) {
  return record("gather", {x}, kernels::gather_forward(x.data(), dim, index),
                [shape = x.shape(), dim, index](const Tensor& dy) -> Grads {
                  return {kernels::gather_backward(dy, dim, index, shape)};
                });
}

Variable index_select(const Variable& x, int64_t dim, const Tensor& index) {
  KRAIT_CHECK(index.ndim() == 1, "index_select: the index is {}, expected one dimension", index.shape());
  Tensor wide = index;
  for (int64_t d = x.shape().wrap(dim) + 1; d < x.ndim(); ++d) wide = wide.unsqueeze(-1);
  return gather(x, dim, wide.expand(x.shape().with(dim, index.size(0))));
}

}  // namespace krait::autograd
