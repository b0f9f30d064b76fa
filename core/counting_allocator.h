#pragma once
#include <algorithm>
#include <mutex>

#include "core/allocator.h"

namespace krait {
inline namespace core {

/// What allocators share: the counts, behind one lock.
class CountingAllocator : public Allocator {
 public:
  MemoryStats stats() const override {
    const std::lock_guard lock(mutex_);
    return stats_;
  }
  void reset_peak() override {
    const std::lock_guard lock(mutex_);
    stats_.peak_bytes = stats_.current_bytes;
  }
  void release_cached() override {
    const std::lock_guard lock(mutex_);
    release_locked();
  }
  void note_taken(int64_t bytes) override {
    const std::lock_guard lock(mutex_);
    count(bytes);
    stats_.reserved_bytes += bytes;
  }

 protected:
  // With the lock held, both.
  virtual void release_locked() = 0;
  void count(int64_t bytes) {
    stats_.current_bytes += bytes;
    stats_.peak_bytes = std::max(stats_.peak_bytes, stats_.current_bytes);
  }

  mutable std::mutex mutex_;
  MemoryStats stats_;
};

}  // namespace core
}  // namespace krait
