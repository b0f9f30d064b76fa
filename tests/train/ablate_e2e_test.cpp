// krait ablate as a user runs it: a grid, a variant that fails, a rerun, an interrupt.
#include <csignal>
#include <set>
#include <thread>

#include "tests/train/workplace.h"
#include "train/ablation.h"
#include "train/ablation_report.h"
#include "train/run_directory.h"

using namespace krait;
using namespace krait::testing;
namespace fs = std::filesystem;

namespace {

std::string ablation_of(const Workplace& w, const std::string& vary, const std::string& more = "") {
  const std::string file = w.tmp / "grid.yaml";
  write_text(file, fmt::format("name: grid\nbase: tiny.yaml\nset: {{train.steps: 12, eval.interval: 4, model.n_layers: 1}}\n"
                               "vary: {{{}}}\nmetric: nll\n{}",
                               vary, more));
  return file;
}

size_t count(const std::string& text, const std::string& what) {
  size_t n = 0;
  for (size_t at = text.find(what); at != std::string::npos; at = text.find(what, at + 1)) ++n;
  return n;
}

}  // namespace

TEST_CASE("ablate trains the grid, reports mean and spread, and tests its claim") {
  const Workplace w;
  const std::string file =
      ablation_of(w, "optimizer.lr: [1e-2, 1e-9], seed: [1, 2]",
                  "claim: {text: Learning beats standing still., key: optimizer.lr, better: 1e-2, than: [1e-9], margin: 0.1}\n");
  const Outcome out = krait_command(fmt::format("ablate {} --run-dir {} --jobs 2", file, w.tmp / "out"));
  INFO(out.out << out.err);
  REQUIRE(out.status == 0);
  CHECK(contains(out.out, ": holds"));
  const std::string csv = train::read_file(w.tmp / "out/results.csv");
  CHECK(count(csv, "\n") == 5);
  CHECK(count(csv, ",finished,") == 4);
  CHECK(contains(csv, "lr=1e-9,seed=2"));
  const std::string html = train::read_file(w.tmp / "out/report.html");
  for (const char* part : {"<svg", "polyline", "Holds.", "Learning beats standing still.", "2 of 2", "±", "optimizer.lr: 0.003 -&gt; 0.01"})
    CHECK(contains(html, part));
  CHECK_FALSE(contains(html, "http"));  // nothing is loaded from elsewhere

  // A second call finds everything done and gives the same results.
  const Outcome again = krait_command(fmt::format("ablate {} --run-dir {}", file, w.tmp / "out"));
  REQUIRE(again.status == 0);
  CHECK(count(again.out, "finished before") == 4);
  CHECK(train::read_file(w.tmp / "out/results.csv") == csv);
  // With other settings the old runs are not taken for new ones.
  write_text(w.config, train::read_file(w.config) + "parallelism: {zero: 1}\n");
  const Outcome other = krait_command(fmt::format("ablate {} --run-dir {}", file, w.tmp / "out"));
  CHECK(other.status == 2);
  CHECK(contains(other.err, "was run with another config (parallelism.zero: 0 -> 1)"));
}

TEST_CASE("one failed variant does not stop the others") {
  const Workplace w;
  const std::string file = ablation_of(w, fmt::format("data.path: [{}, {}]", w.tmp / "tokens.h5", w.tmp / "missing.h5"));
  const Outcome out = krait_command(fmt::format("ablate {} --run-dir {} --jobs 1", file, w.tmp / "out"));
  INFO(out.out << out.err);
  CHECK(out.status == 1);
  CHECK(contains(out.err, "1 of 2 runs failed"));
  const std::string csv = train::read_file(w.tmp / "out/results.csv");
  CHECK(count(csv, ",finished,") == 1);
  CHECK(contains(csv, "no such file"));
  CHECK(contains(train::read_file(w.tmp / "out/report.html"), "Runs without a result"));
}

TEST_CASE("an interrupted ablation goes on where it stopped") {
  const Workplace w;
  const std::string file = ablation_of(w, "seed: [1, 2, 3]");
  std::string text = train::read_file(file);
  write_text(file, text.replace(text.find("train.steps: 12"), 15, "train.steps: 150"));
  const std::string options = fmt::format("ablate {} --run-dir {} --jobs 1", file, w.tmp / "out");
  // As soon as the first run has logged a step.
  const int status = std::system(fmt::format("'{}' {} > {} 2>&1 & pid=$!; for i in $(seq 600); do "
                                             "kill -0 $pid 2> /dev/null || break; "
                                             "cat {}/runs/*/metrics.jsonl 2> /dev/null | grep -q . && break; sleep 0.05; done; "
                                             "kill -INT $pid; wait $pid",
                                             krait_program(), options, w.tmp / "log", w.tmp / "out").c_str());
  REQUIRE(WIFEXITED(status));
  const std::string log = train::read_file(w.tmp / "log");
  INFO(log);
  CHECK(WEXITSTATUS(status) == 1);
  CHECK(contains(log, "the same command goes on where it stopped"));
  const Outcome rest = krait_command(options);
  INFO(rest.out << rest.err);
  CHECK(rest.status == 0);
  CHECK(count(train::read_file(w.tmp / "out/results.csv"), ",finished,") == 3);
}

TEST_CASE("two ablations do not share a directory at the same time") {
  const Workplace w;
  fs::create_directories(w.tmp / "out");
  const train::FileDescriptor first = train::lock_directory(w.tmp / "out", "running an ablation");
  const Outcome out = krait_command(fmt::format("ablate {} --run-dir {}", ablation_of(w, "seed: [1, 2]"), w.tmp / "out"));
  CHECK(out.status == 1);
  CHECK(out.err == fmt::format("error: {}: another process (pid {}) is running an ablation in this directory\n"
                               "       try another --run-dir, or wait for it\n", w.tmp / "out", ::getpid()));
  CHECK_FALSE(fs::exists(w.tmp / "out/results.csv"));
}

TEST_CASE("a claim stays open until all of its runs have a result") {
  const Workplace w;
  const train::Ablation ablation = train::load_ablation(ablation_of(
      w, "optimizer.lr: [1e-2, 1e-9], seed: [1, 2]", "claim: {text: t, key: optimizer.lr, better: 1e-2, than: [1e-9], margin: 0.1}\n"));
  std::vector<train::VariantResult> results(4);
  const auto check = [&] {
    const auto checks = train::check_claim(ablation, train::group_results(ablation, results));
    REQUIRE(checks.size() == 1);
    return checks[0];
  };
  CHECK(check().text == "1e-2 against 1e-9: open, 0 of 4 runs have a result");
  for (size_t i = 0; i < 3; ++i) results[i].metric = i < 2 ? 1.0 : 2.0;
  CHECK(contains(check().text, "better by 1.0000, 0.1000 needed: open, 3 of 4 runs have a result"));
  CHECK_FALSE(check().holds);
  CHECK(contains(train::report_html(ablation, results, "krait ablate"), ">Open.<"));
  results[3].metric = 2.0;
  CHECK(check().holds);
  CHECK(contains(train::report_html(ablation, results, "krait ablate"), ">Holds.<"));
}

TEST_CASE("a wrong ablation file is refused before anything runs") {
  const Workplace w;
  struct Case {
    std::string vary, more, message;
  };
  const std::vector<Case> cases{{"optimizer.weigth_decay: [0, 1]", "", "did you mean weight_decay?"},
                                {"seed: 1", "", "expected a list of values to try"},
                                {"seed: [1, 2, 1]", "", "vary.seed[2]: 1 is there twice"},
                                {"seed: [1]", "metrc: nll\n", "did you mean metric?"},
                                {"seed: [1]", "claim: {text: t, key: optimizer.lr, better: 1, than: 2}\n", "optimizer.lr is not varied"},
                                {"optimizer.lr: [1e-3, 1e-2]", "claim: {text: t, key: optimizer.lr, better: 1e-3, than: 5}\n",
                                 "'5' is not among the values"}};
  for (const Case& c : cases) {
    const Outcome out = krait_command(fmt::format("ablate {} --run-dir {}", ablation_of(w, c.vary, c.more), w.tmp / "never"));
    INFO(out.err);
    CHECK(out.status == 2);
    CHECK(contains(out.err, c.message));
    CHECK_FALSE(fs::exists(w.tmp / "never"));
  }
}

TEST_CASE("every variant has a directory of its own, whatever its values") {
  const Workplace w;
  fs::create_directories(w.tmp / "other");
  fs::copy_file(w.config, w.tmp / "other/tiny.yaml");
  const std::string file = ablation_of(w, "parallelism.data: [-1, 1], base: [tiny.yaml, other/tiny.yaml]");
  const train::Ablation ablation = train::load_ablation(file);
  std::set<std::string> names, groups;
  for (const train::Variant& v : ablation.variants) {
    INFO(v.name);
    CHECK_FALSE(contains(v.name, "/"));
    names.insert(v.name);
    groups.insert(v.group());
  }
  CHECK(names.size() == 4);
  CHECK(groups.size() == 4);
}
