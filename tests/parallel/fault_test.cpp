// Hidden cases in which the last rank fails while the others are in a collective; faults.sh runs them and looks at how
// the job ends.
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <stdexcept>

#include "core/comm/job.h"
#include "tests/parallel/world.h"

namespace krait {
namespace {

template <class F>
void fail_on_last_rank(F fail) {
  Tensor t = ones({3}, DType::f32, kCpu);
  world()->all_reduce(t).wait();
  if (world()->rank() == world()->size() - 1) fail();
  world()->all_reduce(t).wait();
}

}  // namespace

TEST_CASE("fault: killed", "[.]") {
  fail_on_last_rank([] { std::raise(SIGKILL); });
}
TEST_CASE("fault: rank 0 killed", "[.]") {
  Tensor t = ones({3}, DType::f32, kCpu);
  world()->all_reduce(t).wait();
  if (world()->rank() == 0) std::raise(SIGKILL);
  world()->all_reduce(t).wait();
}
TEST_CASE("fault: exits", "[.]") {
  fail_on_last_rank([] { std::exit(0); });
}
TEST_CASE("fault: leaves without a word", "[.]") {
  fail_on_last_rank([] { _exit(0); });
}
TEST_CASE("fault: error", "[.]") {
  fail_on_last_rank([] { comm::abort_job("the disk is full", 3); });
}
TEST_CASE("fault: exception", "[.]") {
  fail_on_last_rank([] { throw std::runtime_error("unexpected"); });
}
TEST_CASE("fault: stalls", "[.]") {
  fail_on_last_rank([] { sleep(1000); });
}
TEST_CASE("fault: stopped", "[.]") {
  fail_on_last_rank([] { std::raise(SIGSTOP); });
}
TEST_CASE("fault: other group", "[.]") {
  const comm::GroupPtr pair = world()->split(world()->rank() > 0, "pair");
  fail_on_last_rank([&] {
    Tensor t = ones({5}, DType::f32, kCpu);
    pair->all_reduce(t).wait();
  });
}
TEST_CASE("fault: leaves early", "[.]") {
  const comm::GroupPtr others = world()->split(world()->rank() < 2, "others");
  if (world()->rank() < 2) return;
  Tensor t = ones({3}, DType::f32, kCpu);
  world()->all_reduce(t).wait();
}
TEST_CASE("fault: stalls on a GPU", "[.]") {
  Tensor t = ones({3}, DType::f32, comm::local_cuda_device());
  world()->all_reduce(t).wait();
  if (world()->rank() == world()->size() - 1) sleep(1000);
  world()->all_reduce(t).wait();
  t.cpu();
}
TEST_CASE("fault: killed on a GPU", "[.]") {
  Tensor t = ones({3}, DType::f32, comm::local_cuda_device());
  world()->all_reduce(t).wait();
  if (world()->rank() == world()->size() - 1) std::raise(SIGKILL);
  world()->all_reduce(t).wait();
  t.cpu();
}
TEST_CASE("fault: error on all ranks", "[.]") { comm::abort_job("no such file", 2); }

}  // namespace krait
