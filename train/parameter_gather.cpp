#include "train/parameter_gather.h"

#include <algorithm>

namespace krait::train {

ParameterGather::ParameterGather(layers::ParameterStore& store, ParameterShards& shards, const Replicas& replicas)
    : store_(store), shards_(shards), replicas_(replicas), whole_(store.buckets().size()) {
  for (size_t b = 0; b < whole_.size(); ++b) {
    const auto& bucket = store.buckets()[b];
    for (size_t e = bucket.first_entry; e < bucket.first_entry + bucket.entries; ++e)
      store.data(e).before_use = [this, b] { use(b); };
  }
}

void ParameterGather::begin_micro_batch() {
  drop_all();
  recording_ = order_.empty();
  in_order_ = !recording_;
}

void ParameterGather::drop_all() {
  if (ahead_) ahead_->work.wait();
  ahead_.reset();
  for (size_t b = 0; b < whole_.size(); ++b)
    if (whole_[b].defined()) drop(b);
  recent_.clear();
  place_ = 0;
  in_order_ = recording_ = false;
}

comm::Work ParameterGather::fetch(size_t b, comm::ProcessGroup& group) {
  const auto& bucket = store_.buckets()[b];
  const Tensor piece = shards_.piece_of(bucket.fp32 ? shards_.master() : shards_.compute(), b);
  whole_[b] = empty({bucket.end - bucket.begin}, piece.dtype(), piece.device());
  return group.all_gather(piece, whole_[b]);
}

void ParameterGather::drop(size_t b) {
  const auto& bucket = store_.buckets()[b];
  for (size_t e = bucket.first_entry; e < bucket.first_entry + bucket.entries; ++e) store_.variable(e).set_data({});
  whole_[b] = {};
}

void ParameterGather::use(size_t b) {
  if (!recent_.empty() && recent_.back() == b) return;
  if (const auto it = std::find(recent_.begin(), recent_.end(), b); it != recent_.end()) {
    recent_.erase(it);
    recent_.push_back(b);
    return;
  }
  if (ahead_) {
    ahead_->work.wait();
    const size_t fetched = ahead_->bucket;
    ahead_.reset();
    if (fetched != b) whole_[fetched] = {};
  }
  if (!whole_[b].defined()) fetch(b, *replicas_.group).wait();
  const auto& bucket = store_.buckets()[b];
  for (size_t e = bucket.first_entry; e < bucket.first_entry + bucket.entries; ++e)
    store_.variable(e).set_data(store_.view(whole_[b], e, bucket.begin));
  recent_.push_back(b);
  if (recent_.size() > kKept) {
    drop(recent_.front());
    recent_.pop_front();
  }
  if (recording_) order_.push_back(b);
  if (!in_order_) return;
  in_order_ = place_ < order_.size() && order_[place_] == b;
  ++place_;
  if (!in_order_ || place_ == order_.size()) return;
  const size_t next = order_[place_];
  if (std::find(recent_.begin(), recent_.end(), next) == recent_.end()) ahead_ = Ahead{next, fetch(next, *replicas_.background)};
}

}  // namespace krait::train
