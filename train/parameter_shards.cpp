#include "train/parameter_shards.h"

#include <algorithm>

namespace krait::train {

ParameterBytes parameter_bytes(double n, double wide, double compute, int states, int64_t zero, int64_t replicas) {
  const auto shared = [&](int64_t stage) { return zero >= stage ? 1.0 / static_cast<double>(replicas) : 1.0; };
  ParameterBytes b;
  // The copy stays whole until ZeRO-3; masters beside one go with the optimizer's state.
  b.values = n * (wide * (compute > 0 ? shared(1) : shared(3)) + compute * shared(3));
  b.gradients = n * wide * shared(2);
  // Beside what is whole a rank has the piece that it updates.
  if (zero == 1) b.gradients += n * wide * shared(1);
  if (zero == 1 || zero == 2) b.values += n * (compute > 0 ? compute : wide) * shared(1);
  b.state = n * states * wide * shared(1);
  return b;
}

ParameterShards::ParameterShards(layers::ParameterStore& store, comm::GroupPtr replicas, int64_t zero,
                                 const comm::ReachableMemory& reachable)
    : store_(store), replicas_(std::move(replicas)), zero_(zero), by_engines_(reachable != nullptr) {
  if (reachable && zero_ <= 1) store.move_grads(reachable(store.numel(), store.grad().dtype()));
  if (reachable && gathers() && store.compute().defined())
    store.move_compute(reachable(store.numel(), store.compute().dtype()));
  master_ = store.master();
  grad_ = store.grad();
  compute_ = store.compute();
  for (const auto& part : store.parts(store.master()))
    parts_.push_back({part.name, part.value.offset(), part.value.shape(), part.whole, part.shard});
  const int64_t ranks = replicas_->size(), rank = replicas_->rank();
  if (zero_ == 0) {
    pieces_.push_back({0, store.numel(), 0});
    numel_ = store.numel();
  } else {
    for (const auto& bucket : store.buckets()) {
      const int64_t length = (bucket.end - bucket.begin) / ranks;
      KRAIT_ASSERT(length * ranks == bucket.end - bucket.begin, "a bucket of {} elements for {} ranks", bucket.end - bucket.begin, ranks);
      const int64_t begin = bucket.begin + rank * length;
      pieces_.push_back({begin, begin + length, numel_});
      numel_ += length;
    }
  }
  for (const auto& [begin, end] : store.primary_ranges())
    for (const Piece& p : cut(begin, end)) {
      if (primary_.empty() || primary_.back().second != p.at) primary_.push_back({p.at, p.at});
      primary_.back().second += p.end - p.begin;
    }
  if (zero_ == 0) return;
  if (gathers())
    for (size_t b = 0; b < store.buckets().size(); ++b)
      for (size_t i = 0; i < store.buckets()[b].entries; ++i)
        store.data(store.buckets()[b].first_entry + i).before_use = [this, b] {
          if (!under_way_.empty()) under_way_[b].wait();
        };

  const auto own = [&](const Tensor& flat, bool travels) {
    if (!flat.defined()) return Tensor();
    Tensor out = travels && reachable ? reachable(numel_, flat.dtype()) : empty({numel_}, flat.dtype(), flat.device());
    for (const Piece& p : pieces_) {
      Tensor to = out.slice(0, p.at, p.at + p.end - p.begin);
      copy_(to, flat.slice(0, p.begin, p.end));
    }
    return out;
  };
  master_ = own(store.master(), false);
  compute_ = own(store.compute(), gathers());
  grad_ = zeros({numel_}, store.grad().dtype(), store.grad().device());
  if (zero_ == 3)
    store.release_values();
  else if (compute_.defined())
    store.release_masters();
}

std::vector<ParameterShards::Piece> ParameterShards::cut(int64_t begin, int64_t end) const {
  std::vector<Piece> out;
  for (const Piece& p : pieces_) {
    const int64_t first = std::max(begin, p.begin), last = std::min(end, p.end);
    if (first < last) out.push_back({first, last, p.at + first - p.begin});
  }
  return out;
}

int64_t ParameterShards::outer() const {
  const size_t n = store_.outer_buckets();
  if (n == store_.buckets().size()) return numel_;
  return sharded() ? pieces_[n].at : store_.buckets()[n].begin;
}

Tensor ParameterShards::piece_of(const Tensor& own, size_t bucket) const {
  const Piece& p = pieces_[bucket];
  return own.slice(0, p.at, p.at + p.end - p.begin);
}

comm::Work ParameterShards::fetch(size_t b, comm::ProcessGroup& group) {
  const auto& bucket = store_.buckets()[b];
  const Tensor& values = bucket.fp32 ? store_.master() : store_.compute();
  return group.all_gather(piece_of(bucket.fp32 ? master_ : compute_, b), values.slice(0, bucket.begin, bucket.end));
}

void ParameterShards::gather() {
  if (!gathers()) return;
  std::vector<comm::Work> works;
  for (size_t b = 0; b < store_.buckets().size(); ++b) works.push_back(fetch(b, *replicas_));
  for (comm::Work& w : works) w.wait();
}

// The embedding first: copy engines need nothing of the update beside them, small buckets' kernels wait until it ends.
void ParameterShards::begin_outer(comm::ProcessGroup& background) {
  KRAIT_ASSERT(gathers() && under_way_.empty(), "a gather is under way.");
  for (size_t b = store_.outer_buckets(); b-- > 0;) under_way_.push_back(fetch(b, by_engines_ ? background : *replicas_));
}

void ParameterShards::begin_gather(comm::ProcessGroup& background) {
  KRAIT_ASSERT(gathers() && under_way_.empty(), "a gather is under way.");
  for (size_t b = 0; b < store_.buckets().size(); ++b)
    under_way_.push_back(b < store_.outer_buckets() ? comm::Work() : fetch(b, background));
}

void ParameterShards::end_gather() {
  for (comm::Work& w : under_way_) w.wait();
  under_way_.clear();
}

void ParameterShards::refresh() {
  if (zero_ == 0) return store_.refresh_compute();
  if (compute_.defined()) copy_(compute_, master_);
  gather();
}

}  // namespace krait::train
