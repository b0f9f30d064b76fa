#pragma once
#include <nccl.h>

#include <chrono>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/cuda/check.h"

namespace krait::comm {

/// A thread that ends the job when work of this process's GPUs makes no progress within the time limit, or when NCCL
/// reports a failure: the host itself may be blocked, or far ahead.
class Watchdog {
 public:
  static Watchdog& instance();  // starts with the first call
  static bool started();

  struct Entry {
    const char* collective;
    std::shared_ptr<const std::string> place;  // group, for messages
    std::string tensor;
  };
  /// The work up to `event`, which is from take_event() and comes back when it is done.
  void watch(cudaEvent_t event, Entry entry);
  void watch(ncclComm_t comm, std::shared_ptr<const std::string> place);

  /// A call that blocks the host.
  class Blocking {
   public:
    explicit Blocking(Entry entry);
    ~Blocking();
    Blocking(const Blocking&) = delete;
    Blocking& operator=(const Blocking&) = delete;
  };

  cudaEvent_t take_event();
  void give_event(cudaEvent_t event);

 private:
  using Clock = std::chrono::steady_clock;
  struct Pending {
    cudaEvent_t event;  // null: the blocking call
    Entry entry;
    Clock::time_point start;
  };
  struct Communicator {
    ncclComm_t comm;
    std::shared_ptr<const std::string> place;
  };

  Watchdog();
  [[noreturn]] void run();
  void look(Clock::time_point now);

  std::mutex mutex_;
  std::vector<Pending> pending_;
  std::vector<Communicator> communicators_;
  std::vector<cudaEvent_t> events_;
  Clock::time_point progress_;  // when the last piece of work ended
};

}  // namespace krait::comm
