#pragma once
#include <cstdint>

#include "core/dtype.h"

namespace krait {
namespace kernels {
namespace cuda {

/// How a recurrence is laid over the multiprocessors. A group is one head of `tile` rows of the batch; `split` blocks
/// share it, each owning `units` of the head's p units (the last one fewer): all their gates, so that the cell is
/// local. Per step a block multiplies its slice of the weights (rows x depth) with the whole vector of the group.
struct RecurrencePlan {
  int tile;       // rows of the batch, a multiple of 8
  int split;      // blocks of a group
  int units;      // of a block
  int rows;       // of the weight slice, padded
  int depth;      // length of the vector, padded
  int chunk;      // of the vector that is in shared memory at a time
  int k_split;    // parts of a chunk that are summed apart
  bool resident;  // the weight slice stays in shared memory; else it is read from cache each step
  bool exchange;  // the vector goes through global memory: another block made part of it, or it comes in chunks
  int64_t groups, concurrent;  // all, and those of one launch
  // Shared memory: offsets in bytes, and the total.
  int64_t vector_at, partial_at, state_at, shared;
};

/// Sizes of one direction: rows per unit of the product (forward the gates, backward 1), values per unit of the vector
/// (the other way round), states in shared memory.
struct RecurrenceSizes {
  int64_t batch, heads, units;
  int rows_per_unit, vector_per_unit, states;
  DType dtype;
};
struct GpuLimits {
  int64_t multiprocessors, shared;  // shared memory in bytes that a block may ask for
};
/// The cheapest plan by a rough count of cycles per step. Throws when even one unit per block does not fit.
RecurrencePlan plan_recurrence(const RecurrenceSizes& sizes, const GpuLimits& gpu);

}  // namespace cuda
}  // namespace kernels
}  // namespace krait
