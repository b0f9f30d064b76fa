// The whole path as a user walks it: text, token store, training, checkpoints, evaluation, generation.
#include <fcntl.h>

#include <cmath>
#include <csignal>
#include <functional>
#include <nlohmann/json.hpp>
#include <thread>

#include "core/device.h"
#include "tests/train/workplace.h"

using namespace krait;
using namespace krait::testing;
using nlohmann::json;
namespace fs = std::filesystem;

namespace {

void check_run_repeats_and_resumes(const Workplace& w) {
  const Outcome first = w.train("a");
  INFO(first.out << first.err);
  REQUIRE(first.status == 0);
  REQUIRE(w.train("b").status == 0);
  const auto whole = losses(w.tmp / "a");
  CHECK(whole.size() == 33);  // 30 steps and 3 evaluations
  CHECK(losses(w.tmp / "b") == whole);

  // Stopped half-way through a longer schedule: same config, fewer steps done.
  const Outcome other = w.train("c", "checkpoint.async=false");
  REQUIRE(other.status == 0);
  CHECK(losses(w.tmp / "c") == whole);
  fs::remove_all(w.tmp / "c/checkpoints/step-00000030");
  fs::remove_all(w.tmp / "c/checkpoints/step-00000020");
  const Outcome resumed = w.train("c", "--resume");
  INFO(resumed.out << resumed.err);
  REQUIRE(resumed.status == 0);
  CHECK(contains(resumed.out, "resumed after step 10"));
  CHECK(losses(w.tmp / "c") == whole);

  // Killed without warning at some instant.
  for (const int milliseconds : {150, 400, 800}) {
    const std::string run = w.tmp / fmt::format("k{}", milliseconds);
    const pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      if (!std::freopen("/dev/null", "w", stdout)) ::_exit(1);
      const std::string program = krait_program();
      ::execl(program.c_str(), program.c_str(), "train", w.config.c_str(), "--run-dir", run.c_str(), nullptr);
      ::_exit(1);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
    ::kill(child, SIGKILL);
    int status = 0;
    ::waitpid(child, &status, 0);
    const Outcome again = krait_command(fmt::format("train {} --run-dir {} --resume", w.config, run));
    INFO(again.out << again.err);
    REQUIRE(again.status == 0);
    CHECK(losses(run) == whole);
  }
}

}  // namespace

TEST_CASE("training learns, and leaves the run directory that DESIGN.md names") {
  const Workplace w;
  const Outcome out = w.train("run", "train.steps=60 lr_scheduler.warmup_steps=5");
  INFO(out.out << out.err);
  REQUIRE(out.status == 0);
  CHECK(contains(out.out, "kernel: attention: "));
  CHECK(contains(out.out, "x 2 micro-batches"));
  const std::string run = w.tmp / "run";
  for (const char* name : {"config.yaml", "metrics.jsonl", "summary.json", "checkpoints/step-00000060/manifest.json", "tensorboard"})
    CHECK(fs::exists(run + "/" + name));
  const auto lines = metrics(run);
  for (const char* key : {"step", "tokens", "loss", "ppl", "lr", "grad_norm", "tokens_per_s", "mfu", "mem_bytes", "time_s"})
    CHECK(lines.front().contains(key));
  CHECK(lines.front()["loss"].get<double>() > 2.9);
  CHECK(lines.back()["nll"].get<double>() < 2.2);
  CHECK(lines.back()["bpb"].get<double>() == Approx(lines.back()["nll"].get<double>() / std::log(2.0)));
  const json summary = json::parse(train::read_file(run + "/summary.json"));
  CHECK(summary["status"] == "finished");

  const Outcome eval = krait_command("eval " + run + " --json --stride 16");
  INFO(eval.err);
  REQUIRE(eval.status == 0);
  const json result = json::parse(eval.out);
  CHECK(result["nll"].get<double>() < lines.back()["nll"].get<double>() + 0.02);  // more context per token
  CHECK(contains(result["convention"].get<std::string>(), "stride 16"));
  const Outcome nowhere = krait_command("eval " + run + " --split nowhere");
  CHECK(nowhere.status == 2);
  CHECK(contains(nowhere.err, "eval.split: found nowhere, but"));

  const Outcome text = krait_command("generate " + run + " --prompt 'the ' --max-tokens 40 --seed 7");
  REQUIRE(text.status == 0);
  CHECK(text.out.starts_with("the "));
  CHECK(text.out.size() == 4 + 40 + 1);
  CHECK(krait_command("generate " + run + " --prompt 'the ' --max-tokens 40 --seed 7").out == text.out);
  CHECK(krait_command("generate " + run + " --prompt 'the ' --max-tokens 40 --seed 8").out != text.out);
  // A run that asks for a device which this machine lacks can be moved to one that it has, as for eval.
  const std::string config = train::read_file(run + "/config.yaml");
  std::string elsewhere = config;
  write_text(run + "/config.yaml", elsewhere.replace(elsewhere.find("device: cpu"), 11, "device: cuda"));
  CHECK(krait_command("generate " + run + " runtime.device=cpu --prompt 'the ' --max-tokens 40 --seed 7").out == text.out);
  CHECK(contains(krait_command("generate " + run + " runtime.devize=cpu").err, "unknown key; did you mean device?"));
  write_text(run + "/config.yaml", config);

  // The resolved config is complete: it runs again and gives the same.
  REQUIRE(krait_command(fmt::format("train {}/config.yaml --run-dir {}", run, w.tmp / "again")).status == 0);
  CHECK(losses(w.tmp / "again") == losses(run));
}

TEST_CASE("two runs give the same losses; resume after a stop or a kill changes nothing") {
  check_run_repeats_and_resumes(Workplace());
}

TEST_CASE("SIGTERM leaves a checkpoint and an orderly end") {
  const Workplace w;
  const std::string run = w.tmp / "run";
  const int status = std::system(
      fmt::format("'{}' train {} --run-dir {} train.steps=100000 > {} 2>&1 & pid=$!; for i in $(seq 600); do "
                  "kill -0 $pid 2> /dev/null || break; test -s {}/metrics.jsonl && break; sleep 0.05; done; kill -TERM $pid; wait $pid",
                  krait_program(), w.config, run, w.tmp / "log", run).c_str());
  REQUIRE(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
  const json summary = json::parse(train::read_file(run + "/summary.json"));
  CHECK(summary["status"] == "interrupted");
  CHECK(contains(train::read_file(w.tmp / "log"), fmt::format("\ncontinue with: krait train '{0}/config.yaml' --run-dir '{0}' --resume\n", run)));
  const int64_t steps = summary["steps"];
  CHECK(fs::exists(fmt::format("{}/checkpoints/step-{:08d}/manifest.json", run, steps)));
}

namespace {

/// A process of krait, sent `signal` once `condition` holds. Its status as waitpid gives it.
int interrupted(const std::vector<std::string>& arguments, int signal, const std::function<bool()>& condition, const std::string& log) {
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    if (!std::freopen(log.c_str(), "w", stdout) || !std::freopen((log + ".err").c_str(), "w", stderr)) ::_exit(1);
    std::string program = krait_program();
    std::vector<char*> argv{program.data()};
    for (const std::string& a : arguments) argv.push_back(const_cast<char*>(a.c_str()));
    argv.push_back(nullptr);
    ::execv(program.c_str(), argv.data());
    ::_exit(1);
  }
  int status = 0;
  for (int i = 0; i < 6000 && !condition(); ++i) {
    if (::waitpid(child, &status, WNOHANG) == child) FAIL("ended before it was told to: " << train::read_file(log) << train::read_file(log + ".err"));
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  ::kill(child, signal);
  REQUIRE(::waitpid(child, &status, 0) == child);
  return status;
}

json summary_of(const std::string& run) { return json::parse(train::read_file(run + "/summary.json")); }

// Without what a clock, a resume or a memory gauge may change.
json lasting(json summary) {
  for (const char* key : {"wall_time_s", "tokens_per_s", "peak_mem_bytes"}) summary.erase(key);
  for (const char* key : {"final_eval", "best_eval"}) summary[key].erase("time_s");
  return summary;
}

}  // namespace

TEST_CASE("a stop in the midst of an evaluation waits for a batch, and resumed the run is as if it had been left alone") {
  const Workplace w;
  // An evaluation of about a second, in 4,000 batches.
  const std::vector<std::string> slow{"train.steps=4", "lr_scheduler.warmup_steps=1", "checkpoint.interval=0", "eval.interval=2",
                                      "eval.split=train", "eval.stride=1", "eval.micro_batch_size=1", "eval.max_tokens=4000"};
  std::string settings;
  for (const std::string& s : slow) settings += s + " ";
  REQUIRE(w.train("whole", settings).status == 0);
  const std::string run = w.tmp / "run", whole = w.tmp / "whole";
  const auto evaluations = [&] {
    size_t n = 0;
    for (const json& m : metrics(run)) n += m.contains("split");
    return n;
  };
  const auto logged = [&](int64_t step) {
    return [&run, step] {
      std::ifstream file(run + "/metrics.jsonl");
      for (std::string line; std::getline(file, line);)
        if (line.starts_with(fmt::format("{{\"step\":{},", step))) return true;
      return false;
    };
  };
  const auto stop_at = [&](int64_t step, int signal, std::vector<std::string> more) {
    std::vector<std::string> arguments{"train", w.config, "--run-dir", run};
    arguments.insert(arguments.end(), slow.begin(), slow.end());
    arguments.insert(arguments.end(), more.begin(), more.end());
    const int status = interrupted(arguments, signal, logged(step), w.tmp / "log");
    INFO(train::read_file(w.tmp / "log") << train::read_file(w.tmp / "log.err"));
    REQUIRE(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 0);
    const json summary = summary_of(run);
    CHECK(summary["status"] == "interrupted");
    CHECK(summary["steps"] == step);
    CHECK(fs::exists(fmt::format("{}/checkpoints/step-{:08d}/manifest.json", run, step)));
  };
  stop_at(2, SIGINT, {});
  CHECK(evaluations() == 0);
  CHECK(summary_of(run)["best_eval"].is_null());
  CHECK(!fs::exists(run + "/checkpoints/best"));
  stop_at(4, SIGTERM, {"--resume"});
  CHECK(evaluations() == 1);
  CHECK(fs::read_symlink(run + "/checkpoints/best") == "step-00000002");
  const Outcome resumed = w.train("run", settings + "--resume");
  INFO(resumed.out << resumed.err);
  REQUIRE(resumed.status == 0);
  CHECK(losses(run) == losses(whole));
  CHECK(lasting(summary_of(run)) == lasting(summary_of(whole)));
  CHECK(fs::read_symlink(run + "/checkpoints/best") == fs::read_symlink(whole + "/checkpoints/best"));

  // eval alone has nothing to leave behind.
  const auto start = std::chrono::steady_clock::now();
  const auto evaluating = [&] { return std::chrono::steady_clock::now() - start > std::chrono::milliseconds(300); };
  const int status = interrupted({"eval", run}, SIGINT, evaluating, w.tmp / "log");
  CHECK((WIFSIGNALED(status) && WTERMSIG(status) == SIGINT));
  CHECK(train::read_file(w.tmp / "log").empty());
}

TEST_CASE("--resume of a run that ended before its summary was written finishes what is missing") {
  const Workplace w;
  REQUIRE(w.train("run").status == 0);
  const std::string run = w.tmp / "run", file = run + "/summary.json", log = run + "/metrics.jsonl";
  const json before = summary_of(run);
  const std::string lines = train::read_file(log);
  const auto resumed = [&] {
    const Outcome out = w.train("run", "--resume");
    INFO(out.out << out.err);
    REQUIRE(out.status == 0);
    CHECK(train::read_file(log) == lines);
    return out.out;
  };
  CHECK(contains(resumed(), "all 30 steps are done; raise train.steps to go on"));
  CHECK(summary_of(run) == before);

  fs::remove(file);  // killed behind the last checkpoint
  CHECK(contains(resumed(), "all 30 steps are done; what is missing"));
  CHECK(lasting(summary_of(run)) == lasting(before));
  CHECK(summary_of(run)["wall_time_s"] == before["wall_time_s"]);
  CHECK(summary_of(run)["peak_mem_bytes"].get<int64_t>() > 0);
  CHECK(summary_of(run)["tokens_per_s"].get<double>() > 0);

  json old = before;  // of an earlier stop
  old["status"] = "interrupted";
  old["steps"] = 20;
  write_text(file, old.dump());
  resumed();
  CHECK(lasting(summary_of(run)) == lasting(before));

  fs::remove(file);  // and its last evaluation is not in the log
  write_text(log, lines.substr(0, lines.rfind("\n", lines.size() - 2) + 1));
  resumed();
  CHECK(lasting(summary_of(run)) == lasting(before));
}

TEST_CASE("a run outlives the reader of its output") {
  const Workplace w;
  const int status = std::system(fmt::format("('{}' train {} --run-dir {}; echo $? > {}) 2>&1 | head -n 1 > {}", krait_program(), w.config,
                                             w.tmp / "run", w.tmp / "status", w.tmp / "log").c_str());
  REQUIRE(WIFEXITED(status));
  CHECK(train::read_file(w.tmp / "status") == "0\n");
  CHECK(json::parse(train::read_file(w.tmp / "run/summary.json"))["status"] == "finished");
}

TEST_CASE("closed standard streams: what would be printed does not end up in a file of the run") {
  const Workplace w;
  const auto closed = [&](const std::string& arguments) {
    const int status = std::system(fmt::format("'{}' {} <&- >&- 2>&-", krait_program(), arguments).c_str());
    REQUIRE(WIFEXITED(status));
    return WEXITSTATUS(status);
  };
  CHECK(closed(fmt::format("train {} --run-dir {} train.steps=10", w.config, w.tmp / "run")) == 0);
  REQUIRE(w.train("other", "train.steps=10").status == 0);
  CHECK(losses(w.tmp / "run") == losses(w.tmp / "other"));
  CHECK(fs::file_size(w.tmp / "run/.lock") < 20);  // "pid 12345"
  CHECK(closed(fmt::format("data prepare {} -o {}", w.tmp / "text.txt", w.tmp / "closed.h5")) == 0);
  CHECK(krait_command("data inspect " + (w.tmp / "closed.h5")).status == 0);
}

TEST_CASE("on a terminal training and eval show how far an evaluation is, and leave nothing of it there") {
  const Workplace w;
  const int terminal = ::posix_openpt(O_RDWR | O_NOCTTY);
  REQUIRE(terminal >= 0);
  REQUIRE((::grantpt(terminal) == 0 && ::unlockpt(terminal) == 0));
  const int kept_open = ::open(::ptsname(terminal), O_RDWR | O_NOCTTY);
  const auto shown = [&](const std::string& arguments, const std::string& streams) {
    const int status = std::system(fmt::format("'{}' {} {} {}", krait_program(), arguments, streams, ::ptsname(terminal)).c_str());
    REQUIRE(WIFEXITED(status));
    REQUIRE(WEXITSTATUS(status) == 0);
    std::string text(1 << 16, ' ');
    text.resize(static_cast<size_t>(std::max<ssize_t>(::read(terminal, text.data(), text.size()), 0)));
    return text;
  };
  const std::string cleared = "\r\x1b[K", run = w.tmp / "run";
  const std::string trained = shown(fmt::format("train {} --run-dir {} train.steps=2 lr_scheduler.warmup_steps=1", w.config, run), "2> /dev/null >");
  CHECK(contains(trained, "evaluating valid: "));
  CHECK(contains(trained, cleared + "step 2  valid: nll "));
  const std::string evaluated = shown("eval " + run, "> /dev/null 2>");
  CHECK(evaluated.starts_with(cleared + "evaluating valid: "));
  CHECK(evaluated.ends_with(cleared));
  ::close(kept_open);
  ::close(terminal);
}

TEST_CASE("eval says when it has not seen the whole split") {
  const Workplace w;
  const std::string run = w.tmp / "run";
  REQUIRE(w.train("run", "train.steps=10").status == 0);
  const Outcome part = krait_command("eval " + run + " eval.max_tokens=100");
  CHECK(contains(part.out, "only the first 100 of "));
  CHECK_FALSE(contains(part.out, "word perplexity"));
  const Outcome whole = krait_command("eval " + run);
  CHECK_FALSE(contains(whole.out, "only the first"));
  CHECK(contains(whole.out, "; word perplexity over words and line ends\n"));
  const json j = json::parse(krait_command("eval " + run + " eval.max_tokens=100 --json").out);
  CHECK(j["tokens"] == 100);
  CHECK(j["split_tokens"].get<int64_t>() > 100);
  CHECK_FALSE(json::parse(krait_command("eval " + run + " --json").out).contains("split_tokens"));
  CHECK(krait_command("eval " + run + " --data " + (w.tmp / "nowhere.h5")).err == "error: --data: no such file: " + (w.tmp / "nowhere.h5") + "\n");
}

TEST_CASE("bad input: one clear error, a non-zero exit, nothing written") {
  const Workplace w;
  struct Case {
    std::string overrides, message;
    int status = 2;
  };
  const std::vector<Case> cases{
      {"optimizer.weigth_decay=0.1", "unknown key; did you mean weight_decay?"},
      {"optimizer.lr=fast", "found string 'fast', expected a number"},
      {"model.attention.n_heads=5", "5 heads do not divide the width 32"},
      {"train.tokens_per_step=300", "300 is not a multiple of 128"},
      {"data.path=nowhere.h5", "no such file"},
      {"data.context=100000 train.tokens_per_step=400000", "100000 tokens need 100001 in a row"},
      {"eval.split=holdout", "found holdout, but"},
      {"eval.context=30000", "30000 tokens need 30001 in a row, but"},
      {"data.state=carry", "layer attention has no state of constant size to carry"},
      {"data.state=carry model.layers=[s4]", "s4 trains with a carried state in its diagonal form alone"},
      {"model.type=classifier model.n_classes=3", "data.type tokens needs a language_model"},
      {"parallelism.tensor=2147483648 parallelism.sequence=8589934592", "found 2147483648, expected an integer in [1, 1048576]"},
      {"parallelism.tensor=2", "tensor 2 x sequence 1 = 2 ranks do not divide the job's: this process runs alone"},
      {"runtime.threads=1000000", "found 1000000, but this process may use"},
      {"model.n_layers=500 model.d_model=65536", ", state of adamw "},
      {"data.context=2048 train.tokens_per_step=0 train.micro_batch_size=8000000", "(values 131 KiB, gradients 131 KiB, state of adamw 263 KiB, inputs of 2 layers 3.8 TiB, the head's input and gradient 3.8 TiB, logits "},
      {"model.vocab_size=3", "3 is less than the"}};
  for (const Case& c : cases) {
    INFO(c.overrides);
    const Outcome out = w.train("never", c.overrides);
    INFO(out.err);
    CHECK(out.status == c.status);
    CHECK(contains(out.err, c.message));
    CHECK(out.err.starts_with("error: "));
    CHECK_FALSE(fs::exists(w.tmp / "never"));
  }
  // A truncated and a foreign data file.
  const std::string bytes = train::read_file(w.tmp / "tokens.h5");
  write_text(w.tmp / "cut.h5", bytes.substr(0, bytes.size() / 2));
  write_text(w.tmp / "foreign.h5", "not HDF5 at all");
  for (const char* name : {"cut.h5", "foreign.h5"}) {
    const Outcome out = w.train("never", "data.path=" + (w.tmp / name));
    INFO(out.err);
    CHECK(out.status == 1);
    CHECK(out.err.starts_with("error: "));
    CHECK(contains(out.err, name));
    CHECK_FALSE(fs::exists(w.tmp / "never"));
  }
}

TEST_CASE("a run directory with a run in it is left alone unless --resume is given") {
  const Workplace w;
  REQUIRE(w.train("run", "train.steps=10").status == 0);
  const std::string before = train::read_file(w.tmp / "run/metrics.jsonl");
  const Outcome done = w.train("run", "train.steps=10 --resume");
  CHECK(done.status == 0);
  CHECK(contains(done.out, "all 10 steps are done"));
  const Outcome out = w.train("run", "train.steps=10");
  CHECK(out.status == 2);
  CHECK(contains(out.err, "--resume"));
  CHECK(train::read_file(w.tmp / "run/metrics.jsonl") == before);
}

TEST_CASE("where every checkpoint is damaged, --resume refuses instead of starting anew, and leaves all as it is") {
  const Workplace w;
  const std::string run = w.tmp / "run";
  REQUIRE(w.train("run").status == 0);
  for (const auto& at : fs::directory_iterator(run + "/checkpoints")) write_text(at.path() / "manifest.json", "{");
  const std::string before = train::read_file(run + "/metrics.jsonl");
  const Outcome out = w.train("run", "train.steps=40 --resume");
  CHECK(out.status == 1);
  CHECK(contains(out.err, run + "/checkpoints: every checkpoint is damaged\n       try to restore one; or remove them all"));
  CHECK(train::read_file(run + "/metrics.jsonl") == before);
  const std::string eval = krait_command("eval " + run).err, best = "warning: " + run + "/checkpoints/step-00000030/";
  CHECK(contains(eval, "every checkpoint is damaged; restore one"));
  CHECK(eval.find(best) == eval.rfind(best));  // told once, though it is the newest and the best
}

TEST_CASE("where the checkpoints cannot be read, --resume refuses instead of starting anew, and leaves all as it is") {
  const Workplace w;
  const std::string run = w.tmp / "run", checkpoints = run + "/checkpoints";
  REQUIRE(w.train("run", "train.steps=10").status == 0);
  const std::string log = train::read_file(run + "/metrics.jsonl");
  fs::rename(checkpoints, w.tmp / "elsewhere");
  const auto refused = [&](const std::string& message) {
    const Outcome out = w.train("run", "--resume");
    INFO(out.out << out.err);
    CHECK(out.status == 1);
    CHECK(contains(out.err, "error: " + checkpoints + ": cannot be read: " + message));
    CHECK(train::read_file(run + "/metrics.jsonl") == log);
  };
  fs::create_directory_symlink(w.tmp / "not mounted", checkpoints);
  refused("No such file or directory (it is a link)");
  fs::remove(checkpoints);
  write_text(checkpoints, "");
  refused("Not a directory");
  fs::remove(checkpoints);
  fs::create_directory_symlink(w.tmp / "elsewhere", checkpoints);
  const Outcome again = w.train("run", "--resume");
  CHECK(again.status == 0);
  CHECK(contains(again.out, "resumed after step 10"));
}

TEST_CASE("a run that diverged can be resumed, and what is not a number is never the best") {
  const Workplace w;
  const std::string options = "optimizer.lr=1e39 optimizer.grad_clip=0 lr_scheduler.warmup_steps=0 eval.interval=1 logging.interval=10 ";
  const Outcome first = w.train("run", options + "train.steps=3");
  INFO(first.out << first.err);
  REQUIRE(first.status == 0);
  CHECK(json::parse(train::read_file(w.tmp / "run/summary.json"))["final_eval"]["nll"].is_null());
  CHECK_FALSE(fs::exists(fs::symlink_status(w.tmp / "run/checkpoints/best")));
  const Outcome more = w.train("run", options + "train.steps=4 --resume");
  INFO(more.out << more.err);
  CHECK(more.status == 0);
  CHECK(contains(more.out, "resumed after step 3"));
}

TEST_CASE("a run does not go on with the ids of another tokenizer") {
  const Workplace w;
  REQUIRE(w.train("run", "train.steps=5").status == 0);
  std::string text = sample_text(400);
  for (char& c : text) c = c == 'y' ? 'z' : c;  // as many characters, other ones
  write_text(w.tmp / "other.txt", text);
  REQUIRE(krait_command(fmt::format("data prepare {} -o {} --tokenizer char -q", w.tmp / "other.txt", w.tmp / "other.h5")).status == 0);
  const Outcome out = w.train("run", "train.steps=6 --resume data.path=" + (w.tmp / "other.h5"));
  INFO(out.err);
  CHECK(out.status == 1);
  CHECK(contains(out.err, "step-00000005: was trained with another tokenizer (char, "));
  CHECK(contains(out.err, "try data prepared with --tokenizer-from"));
  CHECK(w.train("run", "train.steps=6 --resume").status == 0);
}

TEST_CASE("a full disk ends the run with one error; the checkpoints before it stay whole") {
  const Workplace w;
  // A limit on file sizes stands for the full disk: the shard does not fit, everything else does.
  const TemporaryDirectory logs;
  REQUIRE(w.train("run", "train.steps=10").status == 0);
  const int status = std::system(fmt::format("ulimit -f 64; '{}' train {} --run-dir {} --resume train.steps=20000 checkpoint.interval=200 "
                                             "eval.interval=0 logging.interval=10 > {} 2> {}", krait_program(), w.config, w.tmp / "run",
                                             logs / "out", logs / "err").c_str());
  REQUIRE(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 1);
  // That of step 200 could not be written: no need to train up to the next one to say so.
  CHECK(metrics(w.tmp / "run").back()["step"].get<int64_t>() < 400);
  const std::string err = train::read_file(logs / "err");
  INFO(err);
  CHECK(contains(err, "error: "));
  CHECK(krait_command("info " + (w.tmp / "run") + " --verify").status == 0);
  CHECK(krait_command("eval " + (w.tmp / "run")).status == 0);
}

TEST_CASE("logs that cannot be written end the run with one error, after a checkpoint where there is room for it") {
  const Workplace w;
  const std::string run = w.tmp / "run", settings = "checkpoint.interval=0 lr_scheduler.type=constant ";
  REQUIRE(w.train("whole", settings).status == 0);
  REQUIRE(w.train("run", settings + "train.steps=10").status == 0);
  const std::string before = train::read_file(run + "/metrics.jsonl");
  const auto resume_below = [&](size_t limit) {
    fill_metrics(run, limit);
    const std::string full = train::read_file(run + "/metrics.jsonl");
    const TemporaryDirectory logs;
    const int status = std::system(fmt::format("ulimit -f {}; '{}' train {} {} --run-dir {} --resume > {} 2> {}", limit / 512, krait_program(),
                                               w.config, settings, run, logs / "out", logs / "err").c_str());
    REQUIRE(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 1);
    CHECK(train::read_file(run + "/metrics.jsonl") == full);
    write_text(run + "/metrics.jsonl", before);
    return train::read_file(logs / "err");
  };
  const std::string error = fmt::format("error: {}/metrics.jsonl: cannot be written: File too large\n       ", run);
  const std::string neither = resume_below(1 << 15);
  CHECK(neither.starts_with(error + "the checkpoint of step 11 could not be written: "));
  CHECK(contains(neither, "earlier checkpoints are untouched"));
  CHECK(resume_below(1 << 21) ==
        error + fmt::format("step 11 is saved in {}/checkpoints; once that is mended, continue with --resume\n", run));
  const Outcome more = w.train("run", settings + "--resume");
  INFO(more.err);
  REQUIRE(more.status == 0);
  CHECK(contains(more.out, "resumed after step 11"));
  auto whole = losses(w.tmp / "whole");
  std::erase_if(whole, [](const std::string& line) { return line.starts_with("11 "); });  // the line that had no room
  CHECK(losses(run) == whole);
}

TEST_CASE("ids of another program: trained on, evaluated per token, generated") {
  const Workplace w;
  std::string bytes;
  for (const char c : sample_text(400)) bytes += {static_cast<char>(c - ' ' >= 0 ? c - ' ' : 95), '\1'};  // ids from 256 on
  write_text(w.tmp / "ids.bin", bytes);
  const Outcome made = krait_command(fmt::format("data prepare {} -o {} --tokenizer ids --format uint16 --vocab-size 400 -q", w.tmp / "ids.bin", w.tmp / "ids.h5"));
  INFO(made.err);
  REQUIRE(made.status == 0);
  const Outcome trained = w.train("run", "data.path=" + (w.tmp / "ids.h5"));
  INFO(trained.err);
  REQUIRE(trained.status == 0);
  CHECK_FALSE(metrics(w.tmp / "run").back().contains("bpb"));
  const std::string run = w.tmp / "run";
  const json result = json::parse(krait_command("eval " + run + " --json").out);
  CHECK(result["ppl"].get<double>() < 60);
  CHECK_FALSE(result.contains("bpb"));
  CHECK_FALSE(result.contains("word_ppl"));
  std::string numbers;
  for (int i = 0; i < 40; ++i) numbers += fmt::format("{}{}", 320 + i, i % 10 == 9 ? '\n' : ' ');
  write_text(w.tmp / "ids.txt", numbers);
  CHECK(json::parse(krait_command(fmt::format("eval {} --data {} --json", run, w.tmp / "ids.txt")).out)["tokens"] == 39);
  write_text(w.tmp / "bad.txt", "328 400");
  CHECK(contains(krait_command(fmt::format("eval {} --data {}", run, w.tmp / "bad.txt")).err, "bad.txt: byte 4: found '400', expected ids from 0 to 399"));
  CHECK(contains(krait_command(fmt::format("eval {} --data {}", run, w.tmp / "ids.bin")).err, "expected ids from 0 to 399 as decimal numbers"));
  const Outcome text = krait_command("generate " + run + " --prompt '328 329 ' --max-tokens 3");
  CHECK(text.out.starts_with("328 329 "));
  CHECK(std::count(text.out.begin(), text.out.end(), ' ') == 5);
  CHECK(contains(krait_command("generate " + run + " --max-tokens 3").err, "give another --prompt"));
}

TEST_CASE("packed documents train and evaluate") {
  const Workplace w;
  std::string jsonl;
  const std::string text = sample_text(300);
  for (size_t at = 0, n = 10; at + n < text.size(); at += n, n = 10 + (at * 7) % 50)
    jsonl += json{{"text", text.substr(at, n)}}.dump() + "\n";
  write_text(w.tmp / "docs.jsonl", jsonl);
  REQUIRE(krait_command(fmt::format("data prepare {} -o {} --tokenizer byte -q", w.tmp / "docs.jsonl", w.tmp / "docs.h5")).status == 0);
  const Outcome out = w.train("run", fmt::format("data.path={} data.documents=pack", w.tmp / "docs.h5"));
  INFO(out.out << out.err);
  REQUIRE(out.status == 0);
  const Outcome eval = krait_command("eval " + (w.tmp / "run"));
  CHECK(contains(eval.out, "documents apart"));
  CHECK(contains(eval.out, "bits per byte"));
  CHECK_FALSE(contains(eval.out, "word perplexity"));  // the words include those that begin a document
}

TEST_CASE("text that the vocabulary cannot spell has no bits per byte") {
  const Workplace w;
  write_text(w.tmp / "other.txt", sample_text(20) + "\u6F22\u5B57\n");
  REQUIRE(krait_command(fmt::format("data prepare {} -o {} --tokenizer sentencepiece --no-byte-fallback --vocab-size 60 -q",
                                    w.tmp / "text.txt", w.tmp / "pieces.h5")).status == 0);
  REQUIRE(w.train("run", fmt::format("data.path={} train.steps=5", w.tmp / "pieces.h5")).status == 0);
  const Outcome known = krait_command("eval " + (w.tmp / "run")), other = krait_command(fmt::format("eval {} --data {}", w.tmp / "run", w.tmp / "other.txt"));
  REQUIRE(other.status == 0);
  CHECK(contains(known.out, "bits per byte "));
  CHECK_FALSE(contains(other.out, "bits per byte "));
  CHECK(contains(other.out, "no bits per byte: 1 predicted tokens are unknown characters"));  // two of them are one token
}

TEST_CASE("a vocabulary beyond the tokenizer's generates text of the tokenizer") {
  const Workplace w;
  REQUIRE(w.train("run", "train.steps=5 model.vocab_size=500").status == 0);
  for (const char* how : {"--temperature 1", "--temperature 0", "--top-p 0.9"}) {
    const Outcome text = krait_command(fmt::format("generate {} --prompt 'the ' --max-tokens 40 {}", w.tmp / "run", how));
    INFO(text.err);
    CHECK(text.status == 0);
    CHECK(text.out.size() == 4 + 40 + 1);
  }
}

TEST_CASE("cuda: bf16 runs repeat, resume after kill, and graphs change no loss", "[cuda]") {
  const Workplace w("cuda", "bf16");
  check_run_repeats_and_resumes(w);
  REQUIRE(w.train("plain", "runtime.cuda_graphs=false").status == 0);
  CHECK(losses(w.tmp / "plain") == losses(w.tmp / "a"));
}

TEST_CASE("cuda: fp32 training follows the cpu's losses", "[cuda]") {
  const Workplace cpu("cpu"), gpu("cuda");
  REQUIRE(cpu.train("run").status == 0);
  REQUIRE(gpu.train("run").status == 0);
  const auto a = metrics(cpu.tmp / "run"), b = metrics(gpu.tmp / "run");
  REQUIRE(a.size() == b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    const char* key = a[i].contains("split") ? "nll" : "loss";
    CHECK(b[i][key].get<double>() == Approx(a[i][key].get<double>()).epsilon(2e-3));
  }
}
