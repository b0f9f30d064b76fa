#include <cmath>
#include <cstdlib>

#include "tests/testing/catch.h"
#include "tests/train/krait_command.h"
#include "train/checkpoint.h"
#include "train/cli.h"
#include "train/launcher.h"
#include "train/progress.h"
#include "train/run_directory.h"
#include "train/signals.h"

using namespace krait;
using namespace krait::train;
using krait::testing::krait_command;
using krait::testing::Outcome;
using krait::testing::TemporaryDirectory;
using krait::testing::write_text;

namespace {

class Environment {
 public:
  Environment(std::string name, const std::string& value) : name_(std::move(name)) { ::setenv(name_.c_str(), value.c_str(), 1); }
  ~Environment() { ::unsetenv(name_.c_str()); }

 private:
  std::string name_;
};

}  // namespace

TEST_CASE("krait: version and help succeed, on standard output") {
  const Outcome version = krait_command("--version");
  CHECK(version.status == 0);
  CHECK(version.out.starts_with("krait 0."));
  const Outcome help = krait_command("info --help");
  CHECK(help.status == 0);
  CHECK(contains(help.out, "--verify"));
}

TEST_CASE("krait: what is printed and lost is an error, but not where a reader has enough") {
  const TemporaryDirectory tmp;
  const auto status_of = [&](const std::string& redirected) {
    const int status = std::system(fmt::format("({{ '{}' plan --show-hardware; echo $? >&3; }} {}) 3> '{}' 2> '{}'", krait::testing::krait_program(),
                                               redirected, tmp / "status", tmp / "err").c_str());
    REQUIRE(WIFEXITED(status));
    return read_file(tmp / "status");
  };
  CHECK(status_of("> /dev/full") == "1\n");
  CHECK(read_file(tmp / "err") == "error: standard output: cannot be written: No space left on device\n");
  CHECK(status_of(">&-") == "1\n");
  CHECK(contains(read_file(tmp / "err"), "standard output: cannot be written: "));
  status_of("| head -n 1 > /dev/null");
  CHECK(read_file(tmp / "err").empty());
}

TEST_CASE("krait: a bad command line exits with 2, one error, and the nearest name") {
  const Outcome unknown = krait_command("inof");
  CHECK(unknown.status == 2);
  CHECK(unknown.out.empty());
  CHECK(contains(unknown.err, "error: krait: unknown command 'inof'; did you mean info?\n       commands: "));
  CHECK(krait_command("").status == 2);
  const Outcome option = krait_command("info --verfy");
  CHECK(option.status == 2);
  CHECK(contains(option.err, "error: krait info: "));
  CHECK(contains(option.err, "--verfy"));
  CHECK(contains(option.err, "\n       try krait info --help\n"));
  CHECK(contains(krait_command("train a.yaml --steps 3").err, "--steps\n       try krait train --help; settings of the config are given as key.path=value\n"));
  const Outcome verify = krait_command("info --verify");
  CHECK(verify.status == 2);
  CHECK(verify.err == "error: --verify: of which run?\n       try krait info RUN_DIR --verify\n");
  CHECK(krait_command("info /no/such/run").status == 2);
  const auto message = [](const std::string& arguments) {
    const Outcome out = krait_command(arguments);
    CHECK(out.status == 2);
    return out.err;
  };
  CHECK(contains(message("data prepare a.txt -o a.h5 --vocab-size -3"), "--vocab-size: found -3, expected a number > 0\n"));
  for (const char* command : {"data prepare a.txt -o a.h5", "generate runs/x"})
    CHECK(contains(message(fmt::format("{} --seed -1", command)), "--seed: found -1, expected a number from 0 to "));
  CHECK(contains(message("data prepare a.txt -o a.h5 --valid 1.5"), "--valid: found 1.5, expected a number from 0 to 1\n"));
  CHECK(contains(message("data prepare a.txt -o a.h5 --tokenizer bite"),
                 "--tokenizer: found bite, expected one of byte, char, sentencepiece, ids; did you mean byte?\n"));
}

TEST_CASE("krait: out of memory, a command names what its users can lower") {
  CHECK(contains(cli::memory_advice("train"), "train.micro_batch_size"));
  CHECK(contains(cli::memory_advice("generate"), "--max-tokens"));
  CHECK(contains(cli::memory_advice("eval"), "eval.micro_batch_size"));
}

TEST_CASE("krait info: build, libraries, devices") {
  const Outcome info = krait_command("info");
  CHECK(info.status == 0);
  for (const char* word : {"krait ", "compiler ", "hdf5 ", "blas ", "cpu ", "threads", "cuda"}) CHECK(contains(info.out, word));
}

TEST_CASE("krait info RUN_DIR: config, last metrics, checkpoints; --verify finds damage and exits with 1") {
  const TemporaryDirectory tmp;
  const std::string run = tmp / "run";
  RunDirectory::create(run, "x", false).write_config("name: x\nmodel: {d_model: 8, layers: [attention]}\n");
  write_text(run + "/metrics.jsonl", "{\"step\":1,\"loss\":2}\n{\"step\":1,\"split\":\"valid\",\"nll\":2}\n");
  CheckpointWriter writer(run + "/checkpoints", {.async = false});
  for (const int64_t step : {1, 2}) writer.save(step, {{"w", ones({100}, DType::f32, kCpu)}}, "{}", step == 1);

  Outcome info = krait_command("info " + run + " --verify");
  CHECK(info.status == 0);
  CHECK(info.err.empty());
  for (const char* word : {"d_model 8", "layers [attention]", "{\"step\":1,\"loss\":2}", "step-00000001", "best", "checksums match"}) {
    CHECK(contains(info.out, word));
  }
  const std::string shard = run + "/checkpoints/step-00000002/shard-0000-of-0001.h5";
  std::string bytes = read_file(shard);
  bytes[bytes.size() - 1] = static_cast<char>(bytes[bytes.size() - 1] ^ 1);
  write_text(shard, bytes);
  CHECK(krait_command("info " + run).status == 0);
  info = krait_command("info " + run + " --verify");
  CHECK(info.status == 1);
  CHECK(contains(info.out, shard + ": damaged checkpoint: checksum"));
  CHECK(info.err == "error: " + run + "/checkpoints: 1 of 2 checkpoints damaged\n");
}

TEST_CASE("krait data: prepares a text, inspects the store, and refuses what is none") {
  const TemporaryDirectory tmp;
  std::string text;
  for (int i = 0; i < 200; ++i) text += fmt::format("line {} of a small text\n", i);
  write_text(tmp / "a.txt", text);
  const std::string store = tmp / "a.h5";
  const Outcome made = krait_command("data prepare " + (tmp / "a.txt") + " -o " + store + " --tokenizer char -q");
  CHECK(made.status == 0);
  CHECK(contains(made.out, "train"));
  CHECK(krait_command("data prepare " + (tmp / "a.txt") + " -o " + store + " -q").status != 0);  // never overwritten
  const Outcome inspected = krait_command("data inspect " + store);
  CHECK(inspected.status == 0);
  CHECK(contains(inspected.out, "valid"));
  const int lost = std::system(fmt::format("'{}' data inspect {} > /dev/full 2> '{}'", krait::testing::krait_program(), store, tmp / "err").c_str());
  CHECK((WIFEXITED(lost) && WEXITSTATUS(lost) == 1));
  CHECK(contains(read_file(tmp / "err"), "standard output: cannot be written: "));
  const Outcome foreign = krait_command("data inspect " + (tmp / "a.txt"));
  CHECK(foreign.status == 1);
  CHECK(contains(foreign.err, "error: " + (tmp / "a.txt")));
  CHECK(krait_command("data prepare " + (tmp / "none.txt") + " -o " + (tmp / "b.h5")).status != 0);
  CHECK_FALSE(std::filesystem::exists(tmp / "b.h5"));
  const Outcome unknown = krait_command("data prepar x");
  CHECK(unknown.status == 2);
  CHECK(contains(unknown.err, "error: krait data: unknown command 'prepar'; did you mean prepare?"));
}

TEST_CASE("launchers: what started this process is found; more than one rank is refused") {
  CHECK(detect_launch().world_size == 1);
  require_single_rank(detect_launch());
  {
    const Environment size("OMPI_COMM_WORLD_SIZE", "4"), rank("OMPI_COMM_WORLD_RANK", "3");
    CHECK(detect_launch().rank == 3);
    CHECK(error_of([] { require_single_rank(detect_launch()); }) ==
          "mpirun (Open MPI) started 4 ranks, but this command uses one\n       try one process, without the launcher");
  }
  {
    const Environment batch("SLURM_NTASKS", "8");  // a batch script: one process
    CHECK(detect_launch().world_size == 1);
    const Environment step("SLURM_STEP_NUM_TASKS", "8"), rank("SLURM_PROCID", "1");
    CHECK(detect_launch().world_size == 8);
  }
  {
    const Environment size("WORLD_SIZE", "2");
    CHECK(error_of([] { detect_launch(); }) == "environment: WORLD_SIZE=2 without RANK");
    const Environment rank("RANK", "1");
    CHECK(detect_launch().local_rank == -1);
    const Environment local_rank("LOCAL_RANK", "1");
    CHECK(detect_launch().local_rank == 1);
  }
  const Environment size("WORLD_SIZE", "two");
  CHECK(error_of([] { detect_launch(); }) == "environment: WORLD_SIZE: found 'two', expected a number >= 0");
}

TEST_CASE("signals: the first one sets a flag, and the old handlers come back") {
  {
    const StopSignals signals;
    CHECK(stop_requested() == 0);
    ::raise(SIGTERM);
    CHECK(stop_requested() == SIGTERM);
  }
  {  // a terminal that is closed
    const StopSignals signals;
    ::raise(SIGHUP);
    ::raise(SIGHUP);
    CHECK(stop_requested() == SIGHUP);
  }
  ::signal(SIGHUP, SIG_IGN);
  {
    const StopSignals below_nohup;
    ::raise(SIGHUP);
    CHECK(stop_requested() == 0);
  }
  ::signal(SIGHUP, SIG_DFL);
  struct sigaction now {};
  REQUIRE(::sigaction(SIGTERM, nullptr, &now) == 0);
  const StopSignals again;
  CHECK(stop_requested() == 0);
}

TEST_CASE("progress: numbers for people") {
  CHECK(human_count(12.4) == "12");
  CHECK(human_count(12345) == "12.3 k");
  CHECK(human_count(999.7) == "1.0 k");
  CHECK(human_count(2.5e6) == "2.5 M");
  CHECK(human_count(3e12) == "3000 G");
  CHECK(human_ppl(20.126) == "20.13");
  CHECK(human_ppl(999999.5, 4) == "999999.5000");
  CHECK(human_ppl(1.25304e135, 3) == "1.253e+135");
  CHECK(human_ppl(HUGE_VAL) == "inf");
  CHECK(human_bytes(512) == "512 B");
  CHECK(human_bytes(int64_t{3} << 29) == "1.5 GiB");
  CHECK(human_time(59.6) == "1:00");
  CHECK(human_time(3723) == "1:02:03");
  StepMetrics m{.step = 10, .loss = 2.0, .tokens_per_s = 12345, .mem_bytes = 1 << 20};
  CHECK(progress_line(m, 100, 65) == "step 10/100  loss 2.0000  ppl 7.39  12.3 k tokens/s  MFU n/a  mem 1.0 MiB  ETA 1:05");
  m.mfu = 0.456;
  CHECK(contains(progress_line(m, 100, 65), "MFU 45.6 %"));
}

TEST_CASE("progress: a long evaluation says how far it is, now and then where there is no terminal") {
  const TemporaryDirectory tmp;
  std::FILE* out = std::fopen((tmp / "out").c_str(), "w");
  REQUIRE(out);
  const auto evaluate = [&](double pause) {
    Progress progress(10, 0, out, true, pause);
    for (const double share : {0.0, 0.25, 0.5, 1.0}) progress.evaluating("valid", share);
  };
  evaluate(60);
  CHECK(read_file(tmp / "out").empty());
  evaluate(0);
  std::fclose(out);
  CHECK(read_file(tmp / "out") == "evaluating valid: 25 %  ETA 0:00\nevaluating valid: 50 %  ETA 0:00\n");
}

TEST_CASE("progress: plain lines where there is no terminal") {
  const TemporaryDirectory tmp;
  std::FILE* out = std::fopen((tmp / "out").c_str(), "w");
  REQUIRE(out);
  {
    Progress progress(10, 0, out);
    progress.step({.step = 5, .loss = 1});
    progress.evaluation({.step = 5, .split = "valid", .nll = 1.0, .bpb = 1.5});
    progress.note("checkpoint written");
  }
  std::fclose(out);
  const std::string text = read_file(tmp / "out");
  CHECK(text.starts_with("step 5/10  loss 1.0000"));
  CHECK(contains(text, "\nstep 5  valid: nll 1.0000  ppl 2.72  bits/byte 1.5000\ncheckpoint written\n"));
  CHECK_FALSE(contains(text, "\r"));
}
