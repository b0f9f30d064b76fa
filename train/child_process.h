#pragma once
#include <sys/types.h>

#include <string>
#include <utility>
#include <vector>

namespace krait::train {

/// A program running beside this one, its output in a file.
class ChildProcess {
 public:
  /// arguments[0] is the program (a path). Output and errors are appended to `log`. Environment entries are added.
  ChildProcess(const std::vector<std::string>& arguments,
               const std::vector<std::pair<std::string, std::string>>& environment, const std::string& log);
  /// Interrupts a child that still runs and waits for it: it writes a checkpoint and ends.
  ~ChildProcess();
  ChildProcess(ChildProcess&& other) noexcept : pid_(std::exchange(other.pid_, -1)) {}
  ChildProcess& operator=(ChildProcess&& other) noexcept {
    std::swap(pid_, other.pid_);
    return *this;
  }

  /// Whether it still runs; once it does not, `status` is its exit status, or 128 + the signal that ended it.
  bool running(int& status);
  void interrupt() const;

 private:
  pid_t pid_ = -1;
};

/// The path of this program.
std::string own_program();

}  // namespace krait::train
