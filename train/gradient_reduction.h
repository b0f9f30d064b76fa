#pragma once
#include <functional>
#include <memory>

#include "train/parameter_shards.h"

namespace krait::train {

/// Sums gradients over the ranks that hold the same parameters, and leaves the sum where the optimizer reads it.
class GradientReduction {
 public:
  virtual ~GradientReduction() = default;
  /// Around the backward pass of a micro-batch. `last`: of the step.
  virtual void begin(bool last) = 0;
  /// `inner_done`, of the step's last: called when all sums but those of the outer buckets (ParameterStore::outer_buckets)
  /// are where the optimizer reads them; what it queues may go on beside the others.
  virtual void end(bool last, const std::function<void()>& inner_done) = 0;
};

/// What travels: gradients as they are, or rounded to bf16, half of the bytes. A rounded sum of D ranks is off by up to
/// D / 2 units of 2^-8 of the largest partial sum, and so are the gradients that the optimizer reads.
enum class ReduceDtype { as_is, bf16 };

/// Bucket by bucket, each as soon as the backward pass has finished with its parameters, while it goes on with the
/// others; always from the last bucket to the first, so that all ranks start them in one order. What is left when the
/// backward pass ends (the embedding, whose gradient is its last) is summed by the whole GPU.
std::unique_ptr<GradientReduction> overlapped_reduction(layers::ParameterStore& store, ParameterShards& shards,
                                                        const Replicas& replicas, ReduceDtype dtype = ReduceDtype::as_is);

/// ZeRO-2: the same after every micro-batch into the ranks' pieces. There is no buffer of all gradients: a bucket's is
/// made with its first contribution and let go when its sum is on its way.
std::unique_ptr<GradientReduction> bucket_reduction(layers::ParameterStore& store, ParameterShards& shards,
                                                    const Replicas& replicas, ReduceDtype dtype = ReduceDtype::as_is);

/// runtime.deterministic: strict. The gradients of the micro-batches are added one by one in their global order,
/// m = k D + d, so that the sum does not depend, bit for bit, on the number of ranks D. Costs, against the sum above: one
/// exchange of all gradients after every micro-batch, not overlapped with the backward pass, instead of one a step, and
/// memory for 1/D of the gradients and one more bucket.
std::unique_ptr<GradientReduction> ordered_reduction(layers::ParameterStore& store, comm::GroupPtr replicas);

}  // namespace krait::train
