#pragma once

namespace krait {
inline namespace core {

/// Work that a thread gathers before it goes to its stream. current_stream() queues what has been gathered first, so
/// that the order of work is that of the calls.
class Deferred {
 public:
  virtual ~Deferred() = default;
  virtual void flush() = 0;
};

/// This thread's; null: work is queued at once.
inline Deferred*& current_deferred() {
  thread_local Deferred* current = nullptr;
  return current;
}

}  // namespace core
}  // namespace krait
