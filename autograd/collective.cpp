#include "autograd/collective.h"

#include "core/comm/collectives.h"

namespace krait::autograd {

namespace {
// x is not looked at again: values that nobody else refers to are summed where they lie.
Tensor sum(const Tensor& x, comm::ProcessGroup& group) {
  if (x.use_count() > 1 || !x.is_contiguous()) return comm::all_reduce(x, group);
  group.all_reduce(x).wait();
  return x;
}
}  // namespace

Variable copy_to_group(const Variable& x, const comm::GroupPtr& group) {
  if (group->size() == 1) return x;
  return record("copy_to_group", {x}, x.data(),
                [group](const Tensor& dy) -> Grads { return {sum(dy, *group)}; });
}

Variable reduce_from_group(Variable x, const comm::GroupPtr& group) {
  if (group->size() == 1) return x;
  const Tensor y = sum(x.data(), *group);
  return record("reduce_from_group", {std::move(x)}, y, [](const Tensor& dy) -> Grads { return {dy}; });
}

Variable gather_from_group(const Variable& x, int64_t dim, const comm::GroupPtr& group) {
  if (group->size() == 1) return x;
  return record("gather_from_group", {x}, comm::all_gather(x.data(), dim, *group),
                [dim, group](const Tensor& dy) -> Grads { return {comm::own_part(dy, dim, *group)}; });
}

Variable all_gather_sum(const Variable& x, int64_t dim, const comm::GroupPtr& group) {
  if (group->size() == 1) return x;
  return record("all_gather_sum", {x}, comm::all_gather(x.data(), dim, *group),
                [dim, group](const Tensor& dy) -> Grads { return {comm::reduce_scatter(dy, dim, *group)}; });
}

Variable scatter_to_group(const Variable& x, int64_t dim, const comm::GroupPtr& group) {
  if (group->size() == 1) return x;
  return record("scatter_to_group", {x}, comm::own_part(x.data(), dim, *group),
                [dim, group](const Tensor& dy) -> Grads { return {comm::all_gather(dy, dim, *group)}; });
}

Variable reduce_scatter_to_group(const Variable& x, int64_t dim, const comm::GroupPtr& group) {
  if (group->size() == 1) return x;
  return record("reduce_scatter_to_group", {x}, comm::reduce_scatter(x.data(), dim, *group),
                [dim, group](const Tensor& dy) -> Grads { return {comm::all_gather(dy, dim, *group)}; });
}

Variable all_to_all(const Variable& x, int64_t split_dim, int64_t join_dim, const comm::GroupPtr& group) {
  if (group->size() == 1) return x;
  return record("all_to_all", {x}, comm::all_to_all(x.data(), split_dim, join_dim, *group),
                [split_dim, join_dim, group](const Tensor& dy) -> Grads {
                  return {comm::all_to_all(dy, join_dim, split_dim, *group)};
                });
}

}  // namespace krait::autograd
