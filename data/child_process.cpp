#include "data/child_process.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "core/error.h"

extern char** environ;

namespace krait::data {
namespace {

struct Pipe {
  int ends[2] = {-1, -1};
  Pipe() { KRAIT_CHECK(::pipe2(ends, O_CLOEXEC) == 0, "cannot make a pipe: {}", std::strerror(errno)); }
  ~Pipe() {
    close(0);
    close(1);
  }
  Pipe(const Pipe&) = delete;
  void close(int end) {
    if (ends[end] >= 0) ::close(ends[end]);
    ends[end] = -1;
  }
};

class Actions {
 public:
  Actions() { posix_spawn_file_actions_init(&actions_); }
  ~Actions() { posix_spawn_file_actions_destroy(&actions_); }
  Actions(const Actions&) = delete;
  posix_spawn_file_actions_t* get() { return &actions_; }

 private:
  posix_spawn_file_actions_t actions_;
};

// Ends the child when an exception leaves run_process.
class Child {
 public:
  explicit Child(pid_t pid) : pid_(pid) {}
  ~Child() {
    if (pid_ < 0) return;
    ::kill(pid_, SIGTERM);
    wait();
  }
  Child(const Child&) = delete;
  int wait() {
    int status = 0;
    while (::waitpid(pid_, &status, 0) < 0 && errno == EINTR) {
    }
    pid_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }

 private:
  pid_t pid_;
};

constexpr size_t kErrorsKept = 4096;

}  // namespace

bool has_program(const std::string& name) {
  const char* variable = std::getenv("PATH");
  const std::string path = variable ? variable : "/usr/local/bin:/usr/bin:/bin";
  for (size_t begin = 0; begin <= path.size();) {
    const size_t end = std::min(path.find(':', begin), path.size());
    const std::string directory = path.substr(begin, end - begin);
    if (::access(((directory.empty() ? "." : directory) + "/" + name).c_str(), X_OK) == 0) return true;
    begin = end + 1;
  }
  return false;
}

ProcessResult run_process(const std::vector<std::string>& arguments, const std::function<void(std::string_view)>& output,
                          const std::function<void()>& tick) {
  KRAIT_ASSERT(!arguments.empty());
  KRAIT_CHECK(has_program(arguments[0]), "the program {} is needed and was not found; install it", arguments[0]);
  std::vector<char*> argv;
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);

  Pipe out, errors;
  Actions actions;
  posix_spawn_file_actions_addopen(actions.get(), 0, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(actions.get(), out.ends[1], 1);
  posix_spawn_file_actions_adddup2(actions.get(), errors.ends[1], 2);
  pid_t pid = -1;
  const int failure = ::posix_spawnp(&pid, argv[0], actions.get(), nullptr, argv.data(), environ);
  KRAIT_CHECK(failure == 0, "cannot start {}: {}", arguments[0], std::strerror(failure));
  Child child(pid);
  out.close(1);
  errors.close(1);

  ProcessResult result;
  std::vector<char> buffer(size_t{1} << 16);
  while (out.ends[0] >= 0 || errors.ends[0] >= 0) {
    pollfd watched[2] = {{out.ends[0], POLLIN, 0}, {errors.ends[0], POLLIN, 0}};  // negative ones are skipped
    if (::poll(watched, 2, 100) < 0 && errno != EINTR) throw_error(fmt::format("poll: {}", std::strerror(errno)));
    for (int i = 0; i < 2; ++i) {
      if (watched[i].fd < 0 || watched[i].revents == 0) continue;
      const ssize_t n = ::read(watched[i].fd, buffer.data(), buffer.size());
      if (n < 0 && (errno == EINTR || errno == EAGAIN)) continue;
      if (n <= 0) {
        (i == 0 ? out : errors).close(0);
      } else if (i == 0) {
        output({buffer.data(), static_cast<size_t>(n)});
      } else {
        result.errors.append(buffer.data(), static_cast<size_t>(n));
        if (result.errors.size() > kErrorsKept) result.errors.erase(0, result.errors.size() - kErrorsKept);
      }
    }
    if (tick) tick();
  }
  result.status = child.wait();
  return result;
}

}  // namespace krait::data
