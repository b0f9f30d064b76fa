#include "train/signals.h"

#include <csignal>
#include <cstring>
#include <unistd.h>

#include "train/files.h"

namespace krait::train {
namespace {

volatile std::sig_atomic_t received = 0;
struct sigaction previous_int, previous_term, previous_hup;

extern "C" void on_signal(int signal) {
  if (received && signal == SIGHUP) return;  // of one closed terminal the kernel and the shell may both tell
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
  check_posix(sigaction(SIGHUP, nullptr, &previous_hup), "sigaction");
  if (previous_hup.sa_handler != SIG_IGN) check_posix(sigaction(SIGHUP, &action, nullptr), "sigaction");  // not below nohup
}

StopSignals::~StopSignals() {
  sigaction(SIGINT, &previous_int, nullptr);
  sigaction(SIGTERM, &previous_term, nullptr);
  sigaction(SIGHUP, &previous_hup, nullptr);
}

int stop_requested() { return received; }

}  // namespace krait::train
