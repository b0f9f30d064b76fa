// What happens to a run of several ranks when one of them is killed, the disk is full or somebody asks it to stop.
#include <csignal>
#include <thread>

#include "tests/train/parallel_runs.h"

using namespace krait;
using namespace krait::testing;
using Clock = std::chrono::steady_clock;
namespace fs = std::filesystem;

namespace {

const std::string kConfig = std::string(KRAIT_TEST_SOURCE_DIR) + "/configs/lm/mamba2.yaml";

std::string options(const std::string& store, const std::string& more = "") {
  return fmt::format("runtime.device=cpu data.path={} data.context=24 train.steps=40 train.micro_batch_size=2 "
                     "train.tokens_per_step=192 lr_scheduler.warmup_steps=1 eval.interval=0 eval.max_tokens=200 "
                     "checkpoint.interval=2 checkpoint.keep_latest=3 logging.interval=1 logging.tensorboard=false {}",
                     store, more);
}

/// A job in the background.
class Job {
 public:
  Job(int ranks, const std::string& arguments, const TemporaryDirectory& tmp, const std::string& wrapper = "")
      : err_(tmp / "job.err"), out_(tmp / "job.out") {
    pid_ = ::fork();
    REQUIRE(pid_ >= 0);
    if (pid_ == 0) {
      const std::string command = fmt::format("exec env {} {} '{}' train {} > '{}' 2> '{}' < /dev/null", mpirun(ranks), wrapper,
                                              krait_program(), arguments, out_, err_);
      ::execl("/bin/sh", "sh", "-c", command.c_str(), nullptr);
      ::_exit(127);
    }
  }
  ~Job() {
    if (pid_ > 0) ::kill(pid_, SIGKILL);
  }
  /// The ranks' processes.
  std::vector<pid_t> ranks() const {
    std::vector<pid_t> all;
    std::ifstream file(fmt::format("/proc/{}/task/{}/children", pid_, pid_));
    for (pid_t p; file >> p;) {
      std::ifstream name(fmt::format("/proc/{}/comm", p));
      std::string comm;
      if (name >> comm && comm == "krait") all.push_back(p);
    }
    return all;
  }
  bool wait_for(const std::function<bool()>& condition, int pause_ms = 5) const {
    const auto start = Clock::now();
    while (!condition()) {
      if (Clock::now() - start > std::chrono::seconds(60)) return false;
      std::this_thread::sleep_for(std::chrono::milliseconds(pause_ms));
    }
    return true;
  }
  /// The exit status; the job must end within 30 s.
  int wait() {
    const auto start = Clock::now();
    int status = 0;
    while (::waitpid(pid_, &status, WNOHANG) == 0) {
      if (Clock::now() - start > std::chrono::seconds(30)) {
        ::kill(pid_, SIGKILL);
        FAIL("the job hangs");
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    pid_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }
  std::string err() const { return train::read_file(err_); }
  std::string out() const { return train::read_file(out_); }

 private:
  pid_t pid_ = -1;
  std::string err_, out_;
};

size_t lines_of(const std::string& run) {
  std::ifstream file(run + "/metrics.jsonl");
  size_t n = 0;
  for (std::string line; std::getline(file, line);) ++n;
  return n;
}

bool writes_checkpoint(const std::string& run) {
  std::error_code gone;
  for (fs::directory_iterator at(run + "/checkpoints", gone), end; !gone && at != end; at.increment(gone))
    if (at->path().filename().string().starts_with(".writing-")) return true;
  return false;
}

size_t count(const std::string& text, const std::string& what) {
  size_t n = 0;
  for (size_t at = text.find(what); at != std::string::npos; at = text.find(what, at + 1)) ++n;
  return n;
}

// Of steps alone: a run that ended early was evaluated there.
std::vector<std::string> step_losses(const std::string& run) {
  std::vector<std::string> all = losses(run);
  std::erase_if(all, [](const std::string& line) { return count(line, " ") < 3; });
  return all;
}

void check_resumed(const std::string& run, const std::string& settings, const std::string& whole) {
  const Outcome again = train_on(2, fmt::format("{} --run-dir {} {} --resume", kConfig, run, settings));
  INFO(again.out << again.err);
  REQUIRE(again.status == 0);
  CHECK(step_losses(run).size() == 40);
  CHECK(step_losses(run) == step_losses(whole));
}

// A limit on the size of files, in blocks of 512 bytes, stands for the full disk, on one rank alone; MPI needs larger ones
// only for shared memory.
std::string below_limit(const TemporaryDirectory& tmp, int rank, int blocks) {
  write_text(tmp / "limited.sh",
             fmt::format("#!/bin/sh\n[ \"$OMPI_COMM_WORLD_RANK\" = {} ] && ulimit -f {}\nexec \"$@\"\n", rank, blocks));
  fs::permissions(tmp / "limited.sh", fs::perms::owner_all);
  return fmt::format("--mca btl self,tcp '{}'", tmp / "limited.sh");
}

}  // namespace

TEST_CASE("a killed or stalled rank ends the job with one message; resumed, it has the losses of a run that was left alone") {
  if (!has_mpi()) return;
  const TemporaryDirectory tmp;
  const std::string store = document_store(tmp), settings = options(store);
  REQUIRE(train_on(2, fmt::format("{} --run-dir {} {}", kConfig, tmp / "whole", settings)).status == 0);

  enum class Fault { killed, all_killed, stalled };
  for (const Fault fault : {Fault::killed, Fault::all_killed, Fault::stalled}) {
    const bool all = fault == Fault::all_killed, stalls = fault == Fault::stalled;
    const std::string run = tmp / (all ? "all" : stalls ? "stalled" : "one");
    const std::string more = settings + (all ? " checkpoint.interval=1 checkpoint.async=false" : "");
    Job job(2, fmt::format("{} --run-dir {} {}", kConfig, run, more), tmp, stalls ? "-x KRAIT_COMM_TIMEOUT=2" : "");
    REQUIRE(job.wait_for([&] { return lines_of(run) >= 7; }));
    const std::vector<pid_t> ranks = job.ranks();
    REQUIRE(ranks.size() == 2);
    if (all) CHECK(job.wait_for([&] { return writes_checkpoint(run); }, 0));  // in the midst of one
    ::kill(ranks[1], stalls ? SIGSTOP : SIGKILL);
    if (all) ::kill(ranks[0], SIGKILL);
    const int status = job.wait();
    INFO(job.out() << job.err());
    CHECK(status != 0);
    CHECK(count(job.err(), "signal 9 (Killed)") + count(job.err(), "error: ") == 1);
    if (stalls) CHECK(contains(job.err(), "has not ended after 2"));
    check_resumed(run, settings, tmp / "whole");
  }
}

TEST_CASE("SIGTERM to one rank: all stop after the same step and leave a checkpoint") {
  if (!has_mpi()) return;
  const TemporaryDirectory tmp;
  const std::string store = document_store(tmp), run = tmp / "run";
  Job job(2, fmt::format("{} --run-dir {} {}", kConfig, run, options(store, "train.steps=100000 checkpoint.interval=0")), tmp);
  REQUIRE(job.wait_for([&] { return lines_of(run) >= 3; }));
  const std::vector<pid_t> ranks = job.ranks();
  REQUIRE(ranks.size() == 2);
  ::kill(ranks[1], SIGTERM);
  const int status = job.wait();
  INFO(job.out() << job.err());
  CHECK(status == 0);
  const auto summary = nlohmann::json::parse(train::read_file(run + "/summary.json"));
  CHECK(summary["status"] == "interrupted");
  CHECK(fs::exists(fmt::format("{}/checkpoints/step-{:08d}/manifest.json", run, summary["steps"].get<int64_t>())));
}

TEST_CASE("SIGTERM to one rank in an evaluation: all stop after the same batch, and none of it is logged") {
  if (!has_mpi()) return;
  const TemporaryDirectory tmp;
  const std::string store = document_store(tmp), run = tmp / "run", whole = tmp / "whole";
  // Three ranks, a number of batches that they do not share evenly.
  const std::string settings = options(store, "train.steps=2 train.tokens_per_step=144 checkpoint.interval=0 eval.interval=1 eval.split=train "
                                              "eval.max_tokens=1201 eval.stride=1 eval.micro_batch_size=2");
  REQUIRE(train_on(3, fmt::format("{} --run-dir {} {}", kConfig, whole, settings)).status == 0);
  Job job(3, fmt::format("{} --run-dir {} {}", kConfig, run, settings), tmp);
  REQUIRE(job.wait_for([&] { return lines_of(run) >= 1; }));
  const std::vector<pid_t> ranks = job.ranks();
  REQUIRE(ranks.size() == 3);
  ::kill(ranks[2], SIGTERM);
  const int status = job.wait();
  INFO(job.out() << job.err());
  CHECK(status == 0);
  CHECK(lines_of(run) == 1);
  CHECK(nlohmann::json::parse(train::read_file(run + "/summary.json"))["status"] == "interrupted");
  const Outcome again = train_on(3, fmt::format("{} --run-dir {} {} --resume", kConfig, run, settings));
  INFO(again.out << again.err);
  REQUIRE(again.status == 0);
  CHECK(losses(run) == losses(whole));
}

TEST_CASE("a disk that is full for one rank ends the job with one message; the checkpoints before it stay whole") {
  if (!has_mpi()) return;
  const TemporaryDirectory tmp;
  const std::string store = document_store(tmp), run = tmp / "run", settings = options(store, "checkpoint.interval=0 lr_scheduler.type=constant");
  REQUIRE(train_on(2, fmt::format("{} --run-dir {} {}", kConfig, tmp / "whole", settings)).status == 0);
  REQUIRE(train_on(2, fmt::format("{} --run-dir {} {} train.steps=4", kConfig, run, settings)).status == 0);
  Job job(2, fmt::format("{} --run-dir {} {} --resume", kConfig, run, settings), tmp, below_limit(tmp, 1, 512));
  const int status = job.wait();
  const std::string err = job.err();
  INFO(job.out() << err);
  CHECK(status == 1);
  CHECK(count(err, "error: ") == 1);
  CHECK(contains(err, "the checkpoint of step 40 could not be written"));
  CHECK(krait_command("info " + run + " --verify").status == 0);
  check_resumed(run, settings, tmp / "whole");
}

TEST_CASE("where the rank that leads cannot write its logs, all ranks save the step and the job ends with one message") {
  if (!has_mpi()) return;
  const TemporaryDirectory tmp;
  const std::string store = document_store(tmp), run = tmp / "run", settings = options(store, "checkpoint.interval=0 lr_scheduler.type=constant");
  REQUIRE(train_on(2, fmt::format("{} --run-dir {} {} train.steps=4", kConfig, run, settings)).status == 0);
  const std::string before = train::read_file(run + "/metrics.jsonl");
  constexpr int kBlocks = 1 << 16;
  fill_metrics(run, kBlocks * 512);
  Job job(2, fmt::format("{} --run-dir {} {} --resume", kConfig, run, settings), tmp, below_limit(tmp, 0, kBlocks));
  const int status = job.wait();
  const std::string err = job.err();
  INFO(job.out() << err);
  CHECK(status == 1);
  CHECK(count(err, "error: ") == 1);
  CHECK(contains(err, "step 5 is saved in " + run + "/checkpoints; once that is mended, continue with --resume"));
  write_text(run + "/metrics.jsonl", before);
  CHECK(contains(train_on(2, fmt::format("{} --run-dir {} {} --resume", kConfig, run, settings)).out, "resumed after step 5"));
}
