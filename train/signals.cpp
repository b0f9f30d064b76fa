#include "train/signals.h"

#include <csignal>
#include <cstring>
#include <unistd.h>

#include "train/files.h"

namespace krait::train {
namespace {

volatile std::sig_atomic_t received = 0;
struct sigaction previous_int, previous_term;

extern "C" void on_signal(int signal) {
  if (received) ::_exit(128 + signal);
  received = signal;
  const char message[] = "\nstopping with a checkpoint; once more to stop at once\n";
  [[maybe_unused]] const ssize_t ignored = ::write(STDERR_FILENO, message, sizeof message - 1);
}

}  // namespace

StopSignals::StopSignals() {
  received = 0;
  struct sigaction action {};
  action.sa_handler = on_signal;
  action.sa_flags = SA_RESTART;
  sigemptyset(&action.sa_mask);
  check_posix(sigaction(SIGINT, &action, &previous_int), "sigaction");
  check_posix(sigaction(SIGTERM, &action, &previous_term), "sigaction");
}

StopSignals::~StopSignals() {
  sigaction(SIGINT, &previous_int, nullptr);
  sigaction(SIGTERM, &previous_term, nullptr);
}

int stop_requested() { return received; }

}  // namespace krait::train
