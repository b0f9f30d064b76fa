#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

#include "core/device.h"

namespace krait {
inline namespace core {

/// Bytes handed out now and at most (since reset_peak), and bytes taken from the system.
struct MemoryStats {
  int64_t current_bytes = 0;
  int64_t peak_bytes = 0;
  int64_t reserved_bytes = 0;
  int64_t system_allocations = 0;  // calls to the system allocator so far: constant once a loop is warm
};

/// Memory ran out: how much was wanted, how much there is. What to change depends on the command.
class OutOfMemory : public Error {
 public:
  using Error::Error;
};

/// Device memory with a cache of freed blocks. Freed blocks are reused in stream order, without waiting.
class Allocator {
 public:
  virtual ~Allocator() = default;
  /// At least 64-byte aligned (512 on CUDA). Throws OutOfMemory with sizes. 0 bytes: null.
  virtual void* allocate(size_t bytes) = 0;
  virtual void deallocate(void* pointer) noexcept = 0;
  virtual MemoryStats stats() const = 0;
  virtual void reset_peak() = 0;
  /// Gives cached blocks back to the system.
  virtual void release_cached() = 0;
  /// Memory that a library has taken on the device for us, for good: it counts as handed out.
  virtual void note_taken(int64_t bytes) = 0;
};

Allocator& allocator(Device device);

/// A private set of blocks for a captured graph. While a Scope lives, this device's allocations come from it
/// and memory freed inside returns to it, so that a replay never writes to a block that somebody else holds.
/// The blocks go back to the device's allocator when the pool dies, which must be after the graph.
class MemoryPool {
 public:
  explicit MemoryPool(Device device);
  ~MemoryPool();
  MemoryPool(const MemoryPool&) = delete;
  MemoryPool& operator=(const MemoryPool&) = delete;

  class Scope {
   public:
    explicit Scope(MemoryPool& pool);
    ~Scope();
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Device device_;
    int previous_;
  };

 private:
  Device device_;
  int id_;
};

}  // namespace core
}  // namespace krait
