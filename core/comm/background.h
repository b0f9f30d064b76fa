#pragma once
#include "core/comm/process_group.h"

namespace krait::comm {

/// A second group of the same members for collectives of CUDA tensors beside computation: each takes at most
/// `multiprocessors`, because a product whose tiles fill the GPU once takes twice as long when some are gone, and NCCL
/// by itself takes two dozen, also while it waits for the other ranks. In a group of one, and with 0, the
/// group itself. A call of all members.
GroupPtr background_group(const GroupPtr& group, int multiprocessors);

}  // namespace krait::comm
