#include "core/comm/collectives.h"

namespace krait::comm {
namespace {

int64_t part_size(const char* collective, const Tensor& x, int64_t dim, const ProcessGroup& group) {
  KRAIT_CHECK(x.size(dim) % group.size() == 0, "{} of group '{}': {} ranks do not divide dimension {} of {}", collective,
              group.name(), group.size(), dim, describe(x));
  return x.size(dim) / group.size();
}

// (.., p n, ..) -> (p, .., n, ..), contiguous.
Tensor cut(const Tensor& x, int64_t dim, int64_t parts) {
  std::vector<int64_t> order{dim};
  for (int64_t i = 0; i <= x.ndim(); ++i)
    if (i != dim) order.push_back(i);
  return x.reshape(x.shape().with(dim, x.size(dim) / parts).inserted(dim, parts)).permute(order).contiguous();
}

// (p, .., n, ..) -> (.., p n, ..)
Tensor join(const Tensor& parts, int64_t dim) {
  std::vector<int64_t> order;
  for (int64_t i = 1; i < parts.ndim(); ++i) order.push_back(i);
  order.insert(order.begin() + dim, 0);
  const Shape part(std::vector<int64_t>(parts.shape().begin() + 1, parts.shape().end()));
  return parts.permute(order).contiguous().view(part.with(dim, part[dim] * parts.size(0)));
}

}  // namespace

Tensor all_reduce(const Tensor& x, ProcessGroup& group, Reduce op) {
  if (group.size() == 1) return x;
  Tensor sum = x.clone();
  group.all_reduce(sum, op).wait();
  return sum;
}

Tensor all_gather(const Tensor& x, int64_t dim, ProcessGroup& group) {
  dim = x.shape().wrap(dim);
  if (group.size() == 1) return x;
  Tensor parts = empty(x.shape().inserted(0, group.size()), x.dtype(), x.device());
  group.all_gather(x.contiguous(), parts).wait();
  return join(parts, dim);
}

Tensor reduce_scatter(const Tensor& x, int64_t dim, ProcessGroup& group) {
  dim = x.shape().wrap(dim);
  const int64_t size = part_size("reduce_scatter", x, dim, group);
  if (group.size() == 1) return x;
  Tensor part = empty(x.shape().with(dim, size), x.dtype(), x.device());
  group.reduce_scatter(cut(x, dim, group.size()), part).wait();
  return part;
}

Tensor all_to_all(const Tensor& x, int64_t split_dim, int64_t join_dim, ProcessGroup& group) {
  split_dim = x.shape().wrap(split_dim);
  join_dim = x.shape().wrap(join_dim);
  part_size("all_to_all", x, split_dim, group);
  if (group.size() == 1) return x;
  const Tensor send = cut(x, split_dim, group.size());
  Tensor receive = empty_like(send);
  group.all_to_all(send, receive).wait();
  return join(receive, join_dim);
}

Tensor own_part(const Tensor& x, int64_t dim, const ProcessGroup& group) {
  const int64_t size = part_size("own_part", x, dim, group);
  if (group.size() == 1) return x;
  return x.slice(dim, group.rank() * size, (group.rank() + 1) * size);
}

}  // namespace krait::comm
