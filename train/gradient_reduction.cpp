#include "train/gradient_reduction.h"

#include <deque>

#include "kernels/accumulate.h"

namespace krait::train {

namespace {

/// Tells when the gradients of a bucket are complete, from the last bucket to the first.
class BucketOrder {
 public:
  BucketOrder(layers::ParameterStore& store, std::function<void(size_t bucket)> start)
      : store_(store), start_(std::move(start)), waiting_for_(store.buckets().size()), done_(store.entries().size()) {
    for (size_t b = 0; b < waiting_for_.size(); ++b)
      for_trainable(b, [&](size_t e) { store.variable(e).on_grad_ready([this, b, e] { ready(b, e); }); });
  }
  BucketOrder(const BucketOrder&) = delete;
  BucketOrder& operator=(const BucketOrder&) = delete;

  void begin() {
    next_ = static_cast<int64_t>(waiting_for_.size()) - 1;
    done_.assign(done_.size(), false);
    for (size_t b = 0; b < waiting_for_.size(); ++b) {
      waiting_for_[b] = 0;
      for_trainable(b, [&](size_t) { ++waiting_for_[b]; });
    }
    active_ = true;
  }
  /// What is left: buckets with parameters that the loss did not depend on.
  void end() {
    active_ = false;
    while (next_ >= 0) start_(static_cast<size_t>(next_--));
  }

 private:
  template <class F>
  void for_trainable(size_t b, F f) {
    const auto& bucket = store_.buckets()[b];
    for (size_t e = bucket.first_entry; e < bucket.first_entry + bucket.entries; ++e)
      if (store_.entries()[e].options.trainable) f(e);
  }
  void ready(size_t bucket, size_t entry) {
    if (!active_) return;
    KRAIT_CHECK(!done_[entry], "{} takes part in several recomputed blocks, so that its gradient cannot be summed while "
                "the backward pass goes on; use train.recompute: none", store_.entries()[entry].name);
    done_[entry] = true;
    --waiting_for_[bucket];
    while (next_ >= 0 && waiting_for_[static_cast<size_t>(next_)] == 0) start_(static_cast<size_t>(next_--));
  }

  layers::ParameterStore& store_;
  std::function<void(size_t)> start_;
  std::vector<int64_t> waiting_for_;  // parameters of each bucket whose gradients are not complete
  std::vector<bool> done_;            // by parameter
  int64_t next_ = -1;                 // to be started
  bool active_ = false;
};

/// Which group sums a bucket. The embedding's, complete when the backward pass has ended, has nothing left to compute
/// beside; what little ends with it goes on beside it. Decided by the layout alone, because all ranks must use one group
/// for a bucket.
class BucketGroups {
 public:
  BucketGroups(const layers::ParameterStore& store, const Replicas& replicas)
      : replicas_(replicas), embedding_(store.outer_buckets() - 1) {}
  comm::ProcessGroup& of(size_t bucket) const { return bucket == embedding_ ? *replicas_.group : *replicas_.background; }

 private:
  Replicas replicas_;
  size_t embedding_;
};

Tensor to_travel(const Tensor& gradients, ReduceDtype dtype) {
  return dtype == ReduceDtype::bf16 ? gradients.to(DType::bf16) : gradients;
}

class OverlappedReduction final : public GradientReduction {
 public:
  OverlappedReduction(layers::ParameterStore& store, ParameterShards& shards, const Replicas& replicas, ReduceDtype dtype)
      : store_(store), shards_(shards), groups_(store, replicas), dtype_(dtype),
        order_(store, [this](size_t b) { start(b); }) {}

  void begin(bool last) override {
    if (last) order_.begin();
  }
  void end(bool last, const std::function<void()>& inner_done) override {
    if (!last) return;
    order_.end();
    // The tail is still under way while the others' gradients are zeroed.
    for (Sum& sum : under_way_) {
      if (sum.bucket + 1 == store_.outer_buckets()) inner_done();
      sum.work.wait();
      if (dtype_ != ReduceDtype::as_is) copy_(sum.wanted, sum.travelled);
      if (shards_.sharded()) zero_(sum.whole);
    }
    under_way_.clear();
  }

 private:
  void start(size_t b) {
    const auto& bucket = store_.buckets()[b];
    const Tensor whole = store_.grad().slice(0, bucket.begin, bucket.end);
    comm::ProcessGroup& group = groups_.of(b);
    const Tensor sent = to_travel(whole, dtype_);
    if (!shards_.sharded()) {
      under_way_.push_back({b, whole, whole, sent, group.all_reduce(sent)});
      return;
    }
    const Tensor own = shards_.piece_of(shards_.grad(), b);
    const Tensor piece = dtype_ == ReduceDtype::as_is ? own : empty(own.shape(), sent.dtype(), sent.device());
    under_way_.push_back({b, whole, own, piece, group.reduce_scatter(sent, piece)});
  }

  struct Sum {
    size_t bucket;
    Tensor whole;              // the bucket's gradients
    Tensor wanted, travelled;  // of another dtype, or the same tensor
    comm::Work work;
  };
  layers::ParameterStore& store_;
  ParameterShards& shards_;
  BucketGroups groups_;
  ReduceDtype dtype_;
  std::vector<Sum> under_way_;
  BucketOrder order_;
};

class BucketReduction final : public GradientReduction {
 public:
  BucketReduction(layers::ParameterStore& store, ParameterShards& shards, const Replicas& replicas, ReduceDtype travels)
      : store_(store), shards_(shards), groups_(store, replicas), travels_(travels), dtype_(shards.grad().dtype()),
        device_(shards.grad().device()), buffers_(store.buckets().size()), order_(store, [this](size_t b) { start(b); }) {
    bucket_of_.resize(store.entries().size());
    for (size_t b = 0; b < buffers_.size(); ++b)
      for (size_t i = 0; i < store.buckets()[b].entries; ++i) bucket_of_[store.buckets()[b].first_entry + i] = b;
    store.release_grads([this](size_t e) {
      const size_t b = bucket_of_[e];
      return store_.view(buffer(b), e, store_.buckets()[b].begin);
    });
  }

  void begin(bool) override { order_.begin(); }
  void end(bool last, const std::function<void()>& inner_done) override {
    order_.end();
    while (!under_way_.empty()) finish_oldest();
    if (last) inner_done();
  }

 private:
  const Tensor& buffer(size_t b) {
    const auto& bucket = store_.buckets()[b];
    if (!buffers_[b].defined()) buffers_[b] = zeros({bucket.end - bucket.begin}, dtype_, device_);
    return buffers_[b];
  }
  void start(size_t b) {
    const auto& bucket = store_.buckets()[b];
    comm::ProcessGroup& group = groups_.of(b);
    const Tensor sent = to_travel(buffer(b), travels_);
    const Tensor piece = empty({(bucket.end - bucket.begin) / group.size()}, sent.dtype(), device_);
    under_way_.push_back({b, piece, group.reduce_scatter(sent, piece)});
    buffers_[b] = {};
    for (size_t e = bucket.first_entry; e < bucket.first_entry + bucket.entries; ++e) store_.variable(e).drop_grad();
    if (under_way_.size() > 2) finish_oldest();
  }
  void finish_oldest() {
    Sum& sum = under_way_.front();
    sum.work.wait();
    Tensor own = shards_.piece_of(shards_.grad(), sum.bucket);
    kernels::accumulate(own, sum.piece.to(dtype_));
    under_way_.pop_front();
  }

  struct Sum {
    size_t bucket;
    Tensor piece;
    comm::Work work;
  };
  layers::ParameterStore& store_;
  ParameterShards& shards_;
  BucketGroups groups_;
  ReduceDtype travels_;
  DType dtype_;
  Device device_;
  std::vector<Tensor> buffers_;  // by bucket; undefined: no contribution yet
  std::vector<size_t> bucket_of_;
  std::deque<Sum> under_way_;
  BucketOrder order_;
};

class OrderedReduction final : public GradientReduction {
 public:
  OrderedReduction(layers::ParameterStore& store, comm::GroupPtr replicas)
      : store_(store), replicas_(std::move(replicas)),
        sums_(zeros({store.numel() / replicas_->size()}, store.grad().dtype(), store.grad().device())) {}

  void begin(bool) override {}

  void end(bool last, const std::function<void()>& inner_done) override {
    const int64_t ranks = replicas_->size();
    for (const auto& bucket : store_.buckets()) {
      const Tensor whole = store_.grad().slice(0, bucket.begin, bucket.end);
      const int64_t length = whole.numel() / ranks;
      Tensor sum = sums_.slice(0, bucket.begin / ranks, bucket.begin / ranks + length);
      Tensor pieces = empty_like(whole);  // of every rank's gradients the part that is summed here
      replicas_->all_to_all(whole, pieces).wait();
      for (int64_t r = 0; r < ranks; ++r) kernels::accumulate(sum, pieces.slice(0, r * length, (r + 1) * length));
      if (last) replicas_->all_gather(sum, whole).wait();
    }
    zero_(last ? sums_ : store_.grad());
    if (last) inner_done();
  }

 private:
  layers::ParameterStore& store_;
  comm::GroupPtr replicas_;
  Tensor sums_;
};

}  // namespace

std::unique_ptr<GradientReduction> overlapped_reduction(layers::ParameterStore& store, ParameterShards& shards,
                                                        const Replicas& replicas, ReduceDtype dtype) {
  return std::make_unique<OverlappedReduction>(store, shards, replicas, dtype);
}

std::unique_ptr<GradientReduction> bucket_reduction(layers::ParameterStore& store, ParameterShards& shards,
                                                    const Replicas& replicas, ReduceDtype dtype) {
  return std::make_unique<BucketReduction>(store, shards, replicas, dtype);
}

std::unique_ptr<GradientReduction> ordered_reduction(layers::ParameterStore& store, comm::GroupPtr replicas) {
  return std::make_unique<OrderedReduction>(store, std::move(replicas));
}

}  // namespace krait::train
