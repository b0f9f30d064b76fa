#pragma once
#include <atomic>
#include <thread>

namespace krait::comm {

/// Answers the other ranks' roll calls until it dies, before MPI ends.
class RollCallThread {
 public:
  RollCallThread();  // a call of all ranks
  ~RollCallThread();
  RollCallThread(const RollCallThread&) = delete;
  RollCallThread& operator=(const RollCallThread&) = delete;

 private:
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

}  // namespace krait::comm
