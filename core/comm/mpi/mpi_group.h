#pragma once
#include <mpi.h>

#include "core/comm/background.h"

namespace krait::comm {

/// CPU tensors over MPI's nonblocking collectives; CUDA tensors over NCCL, which is started with the first of them.
class MpiGroup final : public ProcessGroup {
 public:
  /// The communicator is kept until the end of the job: freeing it would be a call of all members, and the last
  /// reference to a group goes at different times on different ranks.
  MpiGroup(MPI_Comm comm, const std::string& name);

  Work all_reduce(Tensor t, Reduce op) override;
  Work all_gather(const Tensor& piece, Tensor whole) override;
  Work reduce_scatter(const Tensor& whole, Tensor piece) override;
  Work all_to_all(const Tensor& send, Tensor receive) override;
  Work broadcast(Tensor t, int root) override;
  Work exchange(const Tensor& send, int to, Tensor receive, int from) override;
  void barrier() override;
  GroupPtr split(int color, const std::string& name) override;
  /// See background_group(); before the first collective of CUDA tensors.
  void set_beside(const Beside& beside) { beside_ = beside; }
  int multiprocessors(Device device);
  ReachableMemory reachable(Device device);

 private:
  ProcessGroup& nccl(const char* collective, Device device);
  class Call;

  MPI_Comm comm_;
  std::string members_;  // "world ranks 0, 2", for messages
  Beside beside_;
  GroupPtr nccl_;
  ReachableMemory reachable_;  // of the copy engines; empty without
};

}  // namespace krait::comm
