#include "train/run_directory.h"

#include <unistd.h>

#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>

#include "tests/testing/catch.h"
#include "tests/train/temporary_directory.h"
#include "train/metrics.h"
#include "train/yaml.h"

using namespace krait;
using namespace krait::train;
using krait::testing::TemporaryDirectory;
using krait::testing::write_text;

TEST_CASE("run directory: a new one is made, with the parents") {
  const TemporaryDirectory tmp;
  const RunDirectory run = RunDirectory::create(tmp / "a/b", "x", false);
  CHECK_FALSE(run.has_run());
  CHECK(std::filesystem::is_directory(tmp / "a/b"));
  run.write_config("name: x\n");
  CHECK(read_file(tmp / "a/b/config.yaml") == "name: x\n");
}

TEST_CASE("run directory: what holds something is never written over") {
  const TemporaryDirectory tmp;
  { RunDirectory::create(tmp / "a", "x", false).write_config("name: x\n"); }
  CHECK(error_of([&] { RunDirectory::create(tmp / "a", "x", false); }) ==
        "--run-dir: " + (tmp / "a") + " already holds a run\n       try --resume to continue it, or another directory");
  CHECK(RunDirectory::create(tmp / "a", "x", true).has_run());
  std::filesystem::create_directory(tmp / "b");
  write_text(tmp / "b/thesis.tex", "x");
  for (const bool resume : {false, true}) {
    CHECK(contains(error_of([&] { RunDirectory::create(tmp / "b", "x", resume); }), "holds other files and no run"));
  }
  CHECK(read_file(tmp / "b/thesis.tex") == "x");
  CHECK(std::distance(std::filesystem::directory_iterator(tmp / "b"), {}) == 1);
  CHECK(contains(error_of([&] { RunDirectory::create(tmp / "b/thesis.tex", "x", false); }), "is not a directory"));
  CHECK(contains(error_of([&] { RunDirectory::create("", "x", true); }), "--resume: which run?"));
}

TEST_CASE("run directory: killed before its config was written, it can be used again") {
  const TemporaryDirectory tmp;
  { RunDirectory::create(tmp / "a", "x", false); }
  REQUIRE(std::filesystem::exists(tmp / "a/.lock"));
  { CHECK_FALSE(RunDirectory::create(tmp / "a", "x", true).has_run()); }
  CHECK_FALSE(RunDirectory::create(tmp / "a", "x", false).has_run());
}

TEST_CASE("run directory: two processes cannot train in one") {
  const TemporaryDirectory tmp;
  const RunDirectory run = RunDirectory::create(tmp / "a", "x", false);
  CHECK(error_of([&] { RunDirectory::create(tmp / "a", "x", true); }) ==
        fmt::format("{}/a: another process (pid {}) is training in this directory\n       try another --run-dir, or wait for it",
                    tmp.path(), ::getpid()));
}

TEST_CASE("run directory: reading one that is none") {
  const TemporaryDirectory tmp;
  CHECK(error_of([&] { RunDirectory::open(tmp / "no"); }) == (tmp / "no") + ": no such run directory");
  write_text(tmp / "a.yaml", "name: x\n");
  CHECK(error_of([&] { RunDirectory::open(tmp / "a.yaml"); }) == (tmp / "a.yaml") + ": is a file, expected the directory of a run");
  CHECK(error_of([&] { RunDirectory::open(tmp.path()); }) == tmp.path() + ": holds no run (no config.yaml)");
  std::filesystem::create_directory(tmp / "other");
  write_text(tmp / "other/config.yaml", "name: x\n");
  std::filesystem::permissions(tmp / "other", std::filesystem::perms::none);
  const bool all_may = ::geteuid() == 0;  // its owner's rights do not bind the superuser
  if (all_may) {
    std::filesystem::permissions(tmp.path(), std::filesystem::perms::all);
    REQUIRE(::seteuid(65534) == 0);
  }
  const std::string opened = error_of([&] { RunDirectory::open(tmp / "other"); });
  const std::string resumed = error_of([&] { RunDirectory::create(tmp / "other", "x", true); });
  if (all_may) REQUIRE(::seteuid(0) == 0);
  std::filesystem::permissions(tmp / "other", std::filesystem::perms::owner_all);
  CHECK(opened == (tmp / "other") + "/config.yaml: cannot be read: Permission denied");
  CHECK(resumed == (tmp / "other") + ": cannot be read: Permission denied");
}

TEST_CASE("config differences are listed by path") {
  const ConfigNode a = parse_yaml("a: {b: 1, c: x}\nd: [1, 2]\n", "a"), b = parse_yaml("a: {b: 2, c: x}\nd: [1, 3]\ne: {f: 1}\n", "b");
  CHECK(config_differences(a, b) == std::vector<std::string>{"a.b: 1 -> 2", "d: [1, 2] -> [1, 3]", "e: (none) -> {f: 1}"});
  CHECK(config_differences(a, a).empty());
}

TEST_CASE("metrics: a line has the fields in order, and numbers that read back the same") {
  StepMetrics m{.step = 10, .tokens = 7680, .loss = 0.1 + 0.2, .lr = 6e-4, .grad_norm = 1.0 / 3, .tokens_per_s = 12345.678,
                .mfu = {}, .mem_bytes = 1 << 20, .time_s = 0.5};
  CHECK(to_json(m).starts_with(R"({"step":10,"tokens":7680,"loss":0.30000000000000004,"ppl":)"));
  auto json = nlohmann::ordered_json::parse(to_json(m));
  std::string keys;
  for (const auto& [key, value] : json.items()) keys += key + " ";
  CHECK(keys == "step tokens loss ppl lr grad_norm tokens_per_s mfu mem_bytes time_s ");
  CHECK(json["loss"].get<double>() == m.loss);
  CHECK(json["grad_norm"].get<double>() == m.grad_norm);
  CHECK(json["mfu"].is_null());
  m.loss = std::numeric_limits<double>::quiet_NaN();
  CHECK(nlohmann::json::parse(to_json(m))["loss"].is_null());

  const EvalMetrics e{.step = 10, .tokens = 7680, .split = "va\"lid", .nll = 2.5, .bpb = 1.25, .accuracy = {}, .time_s = 1};
  json = nlohmann::ordered_json::parse(to_json(e));
  CHECK(json["split"] == "va\"lid");
  CHECK(json["bpb"] == 1.25);
  CHECK_FALSE(json.contains("accuracy"));
}

TEST_CASE("metrics: resuming drops later lines and a torn one, keeps the rest byte for byte") {
  const TemporaryDirectory tmp;
  const std::string path = tmp / "metrics.jsonl";
  std::string first;
  {
    MetricsLog log(path, -1);
    for (int64_t step = 1; step <= 3; ++step) {
      log.write(StepMetrics{.step = step, .loss = 1.0 / static_cast<double>(step)});
      log.write(EvalMetrics{.step = step, .split = "valid", .nll = 1});
      if (step == 2) first = read_file(path);
    }
  }
  const std::string whole = read_file(path);
  write_text(path, whole + "{\"step\":4,\"lo");
  {
    MetricsLog log(path, 2);
    CHECK(read_file(path) == first);
    log.write(StepMetrics{.step = 3, .loss = 1.0 / 3});
    log.write(EvalMetrics{.step = 3, .split = "valid", .nll = 1});
  }
  CHECK(read_file(path) == whole);
  { MetricsLog fresh(path, -1); }
  CHECK(read_file(path).empty());
}

TEST_CASE("metrics: the summary is JSON with the final and the best evaluation") {
  Summary s{.name = "x", .status = "finished", .steps = 5};
  s.best_eval = EvalMetrics{.step = 3, .split = "valid", .nll = 1.5};
  const auto json = nlohmann::json::parse(to_json(s));
  CHECK(json["best_eval"]["nll"] == 1.5);
  CHECK(json["final_eval"].is_null());
  CHECK(json.contains("git_revision"));
}
