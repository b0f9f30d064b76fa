#include <csignal>

#include "core/comm/job.h"
#include "core/waiting.h"
#include "train/cli.h"

int main(int argc, char** argv) {
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
