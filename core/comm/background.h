#pragma once
#include <functional>

#include "core/comm/process_group.h"

namespace krait::comm {

/// How collectives of CUDA tensors go on beside computation.
struct Beside {
  /// At most so many; 0: as many as NCCL likes. A product whose tiles fill the GPU once takes twice as long when some are
  /// gone, and NCCL by itself takes two dozen, also while it waits for the other ranks.
  int multiprocessors = 0;
  /// Large sums and gathers by the copy engines, which takes none, where NCCL and the machine can (one host).
  bool copy_engines = false;
};

/// A second group of the same members for what goes on beside computation. Of a group of one, and with nothing asked for,
/// the group itself. A call of all members.
GroupPtr background_group(const GroupPtr& group, const Beside& beside);
/// How many multiprocessors it takes on the device for large sums. A call of all members, before anything is captured.
int multiprocessors_beside(const GroupPtr& background, Device device);
/// Makes (numel) zeros that the group's copy engines read and write where they lie; everything else is copied through
/// buffers of theirs. Kept until the process ends. A call of all members with the same sizes. Null without copy engines.
using ReachableMemory = std::function<Tensor(int64_t numel, DType dtype)>;
ReachableMemory reachable_memory(const GroupPtr& background, Device device);

}  // namespace krait::comm
