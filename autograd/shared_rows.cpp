#include "autograd/shared_rows.h"

namespace krait::autograd {

namespace {

struct Copies {
  Shape shape;
  std::vector<SharedRows> rows;
  // Everybody's rows of it in the flat buffer, from `at` on.
  Tensor places(const Tensor& flat, int64_t at, int64_t whole) const {
    const Shape all = shape.with(0, whole);
    return flat.slice(0, at, at + all.numel()).view(all);
  }
};

}  // namespace

void share_rows(const std::vector<SharedMatrix>& matrices, int64_t whole, const comm::GroupPtr& group) {
  if (group->size() == 1) return;
  Vars in;
  std::vector<Tensor> values;
  std::vector<Copies> copies;
  int64_t length = 0;
  for (const SharedMatrix& m : matrices) {
    if (!m.w.defined()) continue;
    in.push_back(m.w);
    values.push_back(m.w.data());
    copies.push_back({m.w.shape(), m.rows});
    length += m.w.shape().with(0, whole).numel();
  }
  if (in.empty()) return;
  const DType wide = accum_dtype(values.front().dtype());
  const Device device = values.front().device();
  const Vars out = record("share_rows", in, values, [=](const std::vector<Tensor>& dy) {
    // Everybody's rows in their places, zeros elsewhere: one sum serves every set of members that shares a row.
    const Tensor all = zeros({length}, wide, device);
    const auto for_each_run = [&](auto f) {  // f(matrix, rows here, rows in `all`)
      int64_t at = 0;
      for (size_t i = 0; i < copies.size(); ++i) {
        const Tensor places = copies[i].places(all, at, whole);
        at += places.numel();
        if (!dy[i].defined()) continue;
        for (const SharedRows& r : copies[i].rows) f(i, r, places.slice(0, r.at, r.at + r.end - r.begin));
      }
    };
    for_each_run([&](size_t i, const SharedRows& r, Tensor place) { copy_(place, dy[i].slice(0, r.begin, r.end)); });
    group->all_reduce(all).wait();
    Grads dw;
    for (const Tensor& d : dy) dw.push_back(d.defined() ? d.clone() : d);
    for_each_run([&](size_t i, const SharedRows& r, const Tensor& place) {
      Tensor own = dw[i].slice(0, r.begin, r.end);
      copy_(own, place);
    });
    return dw;
  });
  size_t next = 0;
  for (const SharedMatrix& m : matrices)
    if (m.w.defined()) m.w = out[next++];
}

}  // namespace krait::autograd
