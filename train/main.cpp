#include <fcntl.h>
#include <unistd.h>

#include <csignal>

#include "core/comm/job.h"
#include "core/waiting.h"
#include "train/cli.h"

namespace {

// The place of a standard stream that is closed would go to the first file that is opened, and what is printed would be
// written into that file. Output to a closed standard output keeps failing; messages to a closed standard error are lost.
void hold_closed_streams() {
  constexpr int kModes[] = {O_WRONLY, O_RDONLY, O_WRONLY};
  for (const int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO})
    if (::fcntl(fd, F_GETFD) < 0 && ::open("/dev/null", kModes[fd]) != fd) ::_exit(1);
}

}  // namespace

int main(int argc, char** argv) {
  hold_closed_streams();
  krait::let_waiting_threads_sleep(argv);
  // A limit on the size of files is an error of the write that meets it, like a full disk, and not the end.
  std::signal(SIGXFSZ, SIG_IGN);
  using namespace krait::train;
  const int status = cli::run(argc, argv,
                              {
                                  cli::add_train,
                                  cli::add_eval,
                                  cli::add_generate,
                                  cli::add_ablate,
                                  cli::add_data,
                                  cli::add_bench,
                                  cli::add_plan,
                                  cli::add_info,
                              });
  return krait::comm::finish(status);
}
