#pragma once
#include "core/deferred.h"
#include "core/device.h"

namespace krait::kernels::cuda {

/// What gathers this thread's steps on the device, if it is a Queue.
template <class Queue>
Queue* gathering(Device device) {
  auto* queue = dynamic_cast<Queue*>(current_deferred());
  return queue != nullptr && queue->device() == device ? queue : nullptr;
}

}  // namespace krait::kernels::cuda
