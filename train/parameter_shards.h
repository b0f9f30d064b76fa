#pragma once
#include <vector>

#include "core/comm/background.h"
#include "layers/parameter_store.h"

namespace krait::train {

/// The ranks that hold the same parameters, as one group and as another for what goes on beside computation
/// (comm::background_group).
struct Replicas {
  comm::GroupPtr group, background;
};

/// Bytes that a rank holds for n parameters while it trains, each in `wide` (the master weights' size) and, with a copy for
/// products, `compute` bytes more; of `states` numbers of optimizer state each.
struct ParameterBytes {
  double values = 0, gradients = 0, state = 0;
};
ParameterBytes parameter_bytes(double n, double wide, double compute, int states, int64_t zero, int64_t replicas);

/// What this rank updates of the flat buffers: everything, or with ZeRO (Rajbhandari et al. 2020) its piece of every
/// bucket, one r-th of it, laid out one after the other in buffers of the rank's own.
///   zero 1  master weights and optimizer state of own pieces alone
///   zero 2  also the gradients; the others live from their first contribution to the reduction of their bucket
///   zero 3  also the values that layers use; a bucket is gathered when one of its parameters is used
class ParameterShards {
 public:
  /// What travels lies in `reachable` memory, where there is such a thing.
  ParameterShards(layers::ParameterStore& store, comm::GroupPtr replicas, int64_t zero, const comm::ReachableMemory& reachable = {});

  /// [begin, end) of the flat buffers lies at `at` of the rank's own.
  struct Piece {
    int64_t begin, end, at;
  };
  bool sharded() const { return zero_ > 0; }
  int64_t zero() const { return zero_; }
  int64_t numel() const { return numel_; }
  /// The own part of a flat range, ascending.
  std::vector<Piece> cut(int64_t begin, int64_t end) const;
  /// How many of the own elements are of outer buckets (ParameterStore::outer_buckets); they are the first.
  int64_t outer() const;
  /// The own piece of a bucket in a buffer of the rank's own.
  Tensor piece_of(const Tensor& own, size_t bucket) const;

  /// What the optimizer works on. Without ZeRO these are the store's buffers.
  Tensor& master() { return master_; }
  Tensor& grad() { return grad_; }
  Tensor& compute() { return compute_; }

  /// A named part of a parameter and where it lies in the flat buffers: for checkpoints.
  struct Part {
    std::string name;
    int64_t offset = 0;
    Shape local, whole;
    layers::Shard shard;
  };
  const std::vector<Part>& parts() const { return parts_; }
  /// Of the rank's own elements those that count in the norm, in its buffers.
  const std::vector<std::pair<int64_t, int64_t>>& primary_ranges() const { return primary_; }

  /// After an update: every rank gets the pieces that the others have updated. Of ZeRO-1 and 2; the others have none.
  bool gathers() const { return zero_ == 1 || zero_ == 2; }
  void gather();
  /// The same in two parts. What the forward pass begins with, the first outer() elements, is gathered beside the update of
  /// the others.
  void begin_outer(comm::ProcessGroup& background);
  /// The rest while the forward pass goes on: each bucket is waited for where one of its parameters is first used.
  void begin_gather(comm::ProcessGroup& background);
  void end_gather();
  /// After the own master weights were set (from a checkpoint): everything that follows from them.
  void refresh();

  ParameterShards(const ParameterShards&) = delete;
  ParameterShards& operator=(const ParameterShards&) = delete;

 private:
  comm::Work fetch(size_t bucket, comm::ProcessGroup& group);
  layers::ParameterStore& store_;
  comm::GroupPtr replicas_;
  int64_t zero_, numel_ = 0;
  bool by_engines_;
  std::vector<Piece> pieces_;  // by bucket; a single one without ZeRO
  std::vector<Part> parts_;
  std::vector<std::pair<int64_t, int64_t>> primary_;
  Tensor master_, grad_, compute_;
  std::vector<comm::Work> under_way_;  // by bucket, until end_gather
};

}  // namespace krait::train
