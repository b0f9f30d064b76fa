#pragma once
#include <deque>
#include <optional>
#include <vector>

#include "train/parameter_shards.h"

namespace krait::train {

/// ZeRO-3: the values of a bucket's parameters are put together from all ranks when one of them is used, and let go when
/// a few other buckets have been used since. What a recorded function keeps for its backward stays until that has run;
/// with train.recompute: block these are the parameters of one block.
/// From the second micro-batch on the next bucket is fetched while the present one is used.
/// Every rank must use its parameters in the same order.
class ParameterGather {
 public:
  ParameterGather(layers::ParameterStore& store, ParameterShards& shards, const Replicas& replicas);
  /// A micro-batch of the training loop begins: nothing is together, and buckets will be used in the order of last time.
  void begin_micro_batch();
  /// Values have changed, or another use of the model begins or ends.
  void drop_all();

 private:
  void use(size_t bucket);
  comm::Work fetch(size_t bucket, comm::ProcessGroup& group);
  void drop(size_t bucket);

  static constexpr size_t kKept = 4;  // buckets; an expression may name parameters of several
  layers::ParameterStore& store_;
  ParameterShards& shards_;
  Replicas replicas_;
  std::vector<Tensor> whole_;   // by bucket; undefined: not together
  std::deque<size_t> recent_;   // those together, the last used at the end
  struct Ahead {
    size_t bucket = 0;
    comm::Work work;
  };
  std::optional<Ahead> ahead_;
  std::vector<size_t> order_;   // of fetches in a micro-batch
  size_t place_ = 0;            // in it
  bool in_order_ = false, recording_ = false;
};

}  // namespace krait::train
