// What core offers of CUDA in a build without it: nothing, said clearly.
#include "core/device.h"

#include "core/cpu/allocator.h"
#include "core/dispatch.h"
#include "core/stream.h"

namespace krait::core {

DeviceInfo cpu_info();

int cuda_device_count() { return 0; }
bool built_with_cuda() { return false; }
DeviceInfo device_info(Device device) {
  if (device.is_cuda()) throw_no_cuda();
  return cpu_info();
}
void synchronize(Device) {}

Allocator& allocator(Device device) {
  if (device.is_cuda()) throw_no_cuda();
  return cpu_allocator();
}

Stream current_stream(Device device) { return {device, nullptr}; }
bool is_capturing(Device) { return false; }

CapturedGraph::CapturedGraph(Device) : impl_(nullptr) { throw_no_cuda(); }
CapturedGraph::~CapturedGraph() = default;
void CapturedGraph::begin() { throw_no_cuda(); }
void CapturedGraph::end() { throw_no_cuda(); }
void CapturedGraph::replay() { throw_no_cuda(); }
int64_t CapturedGraph::node_count() const { return 0; }

MemoryPool::MemoryPool(Device device) : device_(device), id_(0) {}
MemoryPool::~MemoryPool() = default;
MemoryPool::Scope::Scope(MemoryPool& pool) : device_(pool.device_), previous_(0) {}
MemoryPool::Scope::~Scope() = default;

}  // namespace krait::core
