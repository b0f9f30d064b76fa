#include "autograd/sequence_exchange.h"

#include <algorithm>

#include "kernels/elementwise.h"

namespace krait::autograd {

namespace {

constexpr int kNobody = -1;

// The part of a halo that comes from the member `distance` to the left: rows [begin, end) of it, the sender's last.
struct Hop {
  int distance;
  int64_t begin, end;
};

std::vector<Hop> hops_of(int64_t rows, int64_t length, const comm::ProcessGroup& group) {
  std::vector<Hop> hops;
  int64_t end = length > 0 ? rows : 0;
  for (int distance = 1; end > 0 && distance < group.size(); ++distance, end -= length)
    hops.push_back({distance, std::max<int64_t>(0, end - length), end});
  return hops;
}

int left_of(const comm::ProcessGroup& group, int distance) {
  return group.rank() >= distance ? group.rank() - distance : kNobody;
}
int right_of(const comm::ProcessGroup& group, int distance) {
  return group.rank() + distance < group.size() ? group.rank() + distance : kNobody;
}
void put(Tensor to, const Tensor& from) { copy_(to, from); }

Tensor halo(const Tensor& x, int64_t rows, comm::ProcessGroup& group) {
  const int64_t l = x.size(1);
  Tensor out = zeros(x.shape().with(1, rows), x.dtype(), x.device());
  std::vector<Tensor> parts;
  std::vector<comm::Work> works;
  const auto hops = hops_of(rows, l, group);
  for (const Hop& hop : hops) {
    const int from = left_of(group, hop.distance), to = right_of(group, hop.distance);
    const int64_t n = hop.end - hop.begin;
    parts.push_back(from == kNobody ? Tensor() : empty(x.shape().with(1, n), x.dtype(), x.device()));
    works.push_back(group.exchange(to == kNobody ? Tensor() : x.slice(1, l - n, l).contiguous(), to, parts.back(), from));
  }
  for (size_t i = 0; i < hops.size(); ++i) {
    works[i].wait();
    if (parts[i].defined()) put(out.slice(1, hops[i].begin, hops[i].end), parts[i]);
  }
  return out;
}

}  // namespace

LeftHalo::LeftHalo(const Tensor& x, int64_t rows, const comm::GroupPtr& group, const Tensor& segments)
    : group_(group), length_(x.size(1)) {
  if (group->size() == 1 || rows == 0) return;
  KRAIT_CHECK(x.ndim() >= 2 && rows > 0, "halo_from_left: {} rows of {}, expected (b, l, ...)", rows, x.shape());
  if (segments.defined() && x.size(1) > 0) {
    KRAIT_CHECK(segments.shape() == (Shape{x.size(0), x.size(1)}), "halo_from_left: segments are {} for x {}",
                segments.shape(), x.shape());
    const Tensor ids = halo(segments, rows, *group).to(DType::f64);
    kept_ = kernels::equal(ids, segments.slice(1, 0, 1).to(DType::f64)).to(x.dtype());
    for (int64_t d = 2; d < x.ndim(); ++d) kept_ = kept_.unsqueeze(-1);
  }
  rows_ = masked(halo(x, rows, *group));
}

Tensor LeftHalo::masked(const Tensor& t) const { return kept_.defined() ? kernels::mul(t, kept_) : t; }

void LeftHalo::add_gradient(const Tensor& dx, const Tensor& dhalo) const {
  const int64_t l = dx.size(1);
  const Tensor back = masked(dhalo.to(dx.dtype()));
  std::vector<Tensor> parts;
  std::vector<comm::Work> works;
  const auto hops = hops_of(dhalo.size(1), l, *group_);
  for (const Hop& hop : hops) {
    const int to = left_of(*group_, hop.distance), from = right_of(*group_, hop.distance);
    parts.push_back(from == kNobody ? Tensor() : empty(dx.shape().with(1, hop.end - hop.begin), dx.dtype(), dx.device()));
    works.push_back(group_->exchange(to == kNobody ? Tensor() : back.slice(1, hop.begin, hop.end).contiguous(), to,
                                     parts.back(), from));
  }
  for (size_t i = 0; i < hops.size(); ++i) {
    works[i].wait();
    if (!parts[i].defined()) continue;
    const Tensor rows = dx.slice(1, l - parts[i].size(1), l);
    put(rows, kernels::add(rows.contiguous(), parts[i]));
  }
}

Tensor LeftHalo::history(const Tensor& carried) const {
  if (!rows_.defined()) return carried;
  if (!carried.defined()) return rows_;
  check_halo_with_carried(length_, rows_.size(1), *group_);
  return group_->rank() == 0 ? kernels::add(rows_, carried) : rows_;  // zeros on the first member
}

void check_halo_with_carried(int64_t length, int64_t rows, const comm::ProcessGroup& group) {
  KRAIT_CHECK(length >= rows,
              "a state is carried into pieces of {} positions, but the convolution looks {} back; lower "
              "parallelism.sequence ({})",
              length, rows, group.size());
}

Variable halo_from_left(const Variable& x, int64_t rows, const comm::GroupPtr& group, const Tensor& segments) {
  const LeftHalo halo(x.data(), rows, group, segments);
  if (!halo.rows().defined()) return {};
  return record("halo_from_left", {x}, halo.rows(), [halo, shape = x.shape()](const Tensor& dy) -> Grads {
    const Tensor dx = zeros(shape, dy.dtype(), dy.device());
    halo.add_gradient(dx, dy);
    return {dx};
  });
}

Variable receive_from_left(const Variable& like, const Shape& shape, DType dtype, const comm::GroupPtr& group) {
  const int from = left_of(*group, 1);
  if (from == kNobody) return {};
  const Tensor state = empty(shape, dtype, like.device());
  group->exchange({}, kNobody, state, from).wait();
  return record("receive_from_left", {like}, state, [group, from](const Tensor& dy) -> Grads {
    group->exchange(dy.contiguous(), from, {}, kNobody).wait();
    return {Tensor()};
  });
}

Variable send_right(const Variable& y, const Variable& state, const comm::GroupPtr& group) {
  const int to = right_of(*group, 1);
  if (to == kNobody) return y;
  group->exchange(state.data().contiguous(), to, {}, kNobody).wait();
  return record("send_right", {y, state}, y.data(),
                [group, to, shape = state.shape(), dtype = state.dtype()](const Tensor& dy) -> Grads {
                  const Tensor dstate = empty(shape, dtype, dy.device());
                  group->exchange({}, kNobody, dstate, to).wait();
                  return {dy, dstate};
                });
}

}  // namespace krait::autograd
