#pragma once
#include "core/device.h"

namespace krait {
inline namespace core {

/// A queue of work on a device. `handle` is a cudaStream_t; null on a CPU, where work is immediate.
struct Stream {
  Device device;
  void* handle = nullptr;
};

/// The stream that kernels of this thread use on the device. Allocations are ordered by it:
/// memory freed while work is queued is reused only by later work of the same stream.
Stream current_stream(Device device);

/// What one stream recorded; replaying it costs one launch. Empty on a CPU.
/// Tensors used inside must be allocated inside capture (they keep their addresses) or outlive the graph.
/// Inside, nothing may wait for the device or read values back.
class CapturedGraph {
 public:
  explicit CapturedGraph(Device device);  // throws Error for a CPU or a build without CUDA
  ~CapturedGraph();
  CapturedGraph(const CapturedGraph&) = delete;
  CapturedGraph& operator=(const CapturedGraph&) = delete;

  /// Between begin() and end() work is recorded, not run. Call it with the allocator in a MemoryPool scope.
  void begin();
  void end();
  void replay();
  int64_t node_count() const;

 private:
  struct Impl;
  Impl* impl_;
};

/// True while the current stream of the device records a graph.
bool is_capturing(Device device);

}  // namespace core
}  // namespace krait
