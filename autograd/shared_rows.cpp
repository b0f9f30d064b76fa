#include "autograd/shared_rows.h"

namespace krait::autograd {

Variable share_rows(const Variable& w, const std::vector<SharedRows>& rows, int64_t whole, const comm::GroupPtr& group) {
  if (group->size() == 1) return w;
  return record("share_rows", {w}, w.data(), [rows, whole, group](const Tensor& dy) -> Grads {
    // Everybody's rows in their places, zeros elsewhere: one sum serves every set of members that shares a row.
    Tensor all = zeros(dy.shape().with(0, whole), accum_dtype(dy.dtype()), dy.device());
    for (const SharedRows& r : rows) {
      Tensor place = all.slice(0, r.at, r.at + r.end - r.begin);
      copy_(place, dy.slice(0, r.begin, r.end));
    }
    group->all_reduce(all).wait();
    Tensor dw = dy.clone();
    for (const SharedRows& r : rows) {
      Tensor own = dw.slice(0, r.begin, r.end);
      copy_(own, all.slice(0, r.at, r.at + r.end - r.begin));
    }
    return {dw};
  });
}

}  // namespace krait::autograd
