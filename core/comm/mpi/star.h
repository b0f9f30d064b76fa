#pragma once
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

namespace krait::comm {

/// The processes of a job that no launcher of MPI's started, each with a TCP connection to a thread of rank 0. It
/// carries what MPI's processes tell each other at their start, sees at once when one of them dies, and ends them all.
/// It lives until the process ends.
class Star {
 public:
  struct Options {
    std::string host;  // of rank 0
    int port = 0;
    int rank = 0, size = 1;
    std::string version;  // must be the same on all ranks
    double limit = 300;   // seconds until all ranks must have come
  };
  /// A call of all ranks. Error for one of them that says why they do not come together; the others exit in silence.
  explicit Star(const Options& options);

  /// A number that no other job has at the same time.
  uint32_t job() const { return job_; }
  /// Ranks on the same machine as this one, ascending.
  const std::vector<int>& local_ranks() const { return local_ranks_; }

  /// Every rank's part, by rank. A call of all ranks; the main thread's.
  std::vector<std::string> all_gather(const std::string& part);
  /// The job has ended well; from here on a rank may go.
  void leave();
  /// Ends all processes of the job, this one too; prints nothing on this machine.
  [[noreturn]] void end_job(int status);
  /// Called by all ranks: rank 0 prints the message and ends them.
  [[noreturn]] void fail(const std::string& message);
  /// Called before the process is ended from here.
  void before_exit(std::function<void()> f);

 private:
  void meet(double limit);
  void read_frames();
  [[noreturn]] void ended(std::string_view order);
  [[noreturn]] void lost_rank_0();
  void clean_up();
  [[noreturn]] void exit_now(int status);

  int rank_, size_, socket_ = -1;
  uint32_t job_ = 0;
  std::vector<int> local_ranks_;
  std::string host_of_0_;
  std::thread server_;  // rank 0's

  std::mutex mutex_;  // of what follows
  std::function<void()> before_exit_;
  std::condition_variable arrived_;
  std::vector<std::string> round_;
  bool have_round_ = false, leaving_ = false;
};

}  // namespace krait::comm
