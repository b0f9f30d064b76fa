#pragma once
#include <memory>
#include <vector>

#include "core/comm/backend.h"
#include "core/comm/nccl/check.h"

namespace krait::comm {

/// Collectives among the GPUs of one host beside which all multiprocessors compute: NCCL (2.28 or later) moves the pieces
/// with the copy engines, between buffers that it has registered, and a kernel of a few microseconds adds them in rank
/// order. 25 MiB over NVLink between two H200: 66 us; in NCCL's kernels on four multiprocessors 194 us. What does not lie
/// in such memory (reachable()) is copied into it and out of it.
class CopyEngines {
 public:
  /// Null where NCCL or the machine has no such thing. `comm`: the group's communicator. A call of all members.
  static std::unique_ptr<CopyEngines> make(const ProcessGroup& group, const Share& share, ncclComm_t comm);

  /// Large sums of floating values that cut into aligned pieces.
  bool serves(const Tensor& whole) const;
  void reduce_scatter(const Tensor& whole, const Tensor& piece, cudaStream_t stream);
  void all_gather(const Tensor& piece, const Tensor& whole, cudaStream_t stream);
  void all_reduce(const Tensor& t, cudaStream_t stream);
  /// See reachable_memory().
  Tensor reachable(int64_t numel, DType dtype, Device device);
  ncclComm_t comm() const { return comm_; }

 private:
  CopyEngines(int rank, int size, ncclComm_t group) : rank_(rank), size_(size), group_(group) {}
  bool start(const Share& share);
  void* registered(size_t bytes);
  bool all_agree(bool own) const;
  bool reaches(const Tensor& t) const;
  template <class F>
  void in_chunks(int64_t n, int64_t element, F f) const;

  int rank_, size_;
  ncclComm_t group_, comm_ = nullptr;
  struct Block {
    char* begin;
    int64_t bytes;
  };
  std::vector<Block> blocks_;  // of reachable()
  void *send_ = nullptr, *receive_ = nullptr;  // kept until the process ends, like the communicator
};

}  // namespace krait::comm
