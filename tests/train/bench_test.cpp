#include <nlohmann/json.hpp>

#include "tests/testing/catch.h"
#include "tests/train/krait_command.h"
#include "train/bench.h"
#include "train/bench_kernels.h"

using namespace krait;
using namespace krait::train;
using namespace krait::train::bench;
using krait::testing::krait_command;
using krait::testing::Outcome;
using krait::testing::TemporaryDirectory;
using krait::testing::write_text;

namespace {

Row timed(const std::string& name, double ms) {
  Row r;
  r.name = name;
  r.time = summarize({ms, ms, ms});
  return r;
}

}  // namespace

TEST_CASE("bench: quantiles of laps lie between them") {
  const Timing t = summarize({5, 1, 3, 2, 4});
  CHECK(t.median_ms == 3);
  CHECK(t.p10_ms == 1.4);
  CHECK(t.p90_ms == 4.6);
  CHECK(t.laps == 5);
  CHECK(summarize({7}).p90_ms == 7);
}

TEST_CASE("bench: the floor is the slower of memory and products") {
  Ceilings c;
  c.copy = 1e12;
  c.product = {{"bf16 4096", 4e14}, {"bf16 8192", 5e14}};
  Row r = timed("x", 4);
  r.work = {2e9, 1e12};  // 2 ms of memory, 2 ms at 5e14
  r.unit = Unit::bf16;
  CHECK(r.floor_ms(c) == 2);
  r.work.flops = 2e12;
  CHECK(r.floor_ms(c) == 4);
  CHECK(r.bound(c) == "bf16 products");
  r.unit = Unit::none;
  CHECK(r.floor_ms(c) == 2);
  CHECK(r.bound(c) == "memory");
}

TEST_CASE("bench: a filter wants all its words, in any case") {
  CHECK(matches("attention B8 H16 L4096 D64 bf16 fwd", "attention D64"));
  CHECK(matches("attention B8", "ATTENTION"));
  CHECK(matches("attention B8", ""));
  CHECK_FALSE(matches("attention B8", "attention D64"));
}

TEST_CASE("bench: a regression beyond the margin is named, noise and faster rows are not") {
  Report report;
  report.kind = "kernels";
  for (const auto& [name, ms] : std::map<std::string, double>{{"a", 1.0}, {"b", 1.3}, {"c", 0.5}, {"new", 9}})
    report.rows.push_back(timed(name, ms));
  Baseline baseline = baseline_from_json(to_json(report), "x.json");
  CHECK(baseline.median_ms.at("b") == 1.3);
  CHECK(regressions(report, baseline, 0.1).empty());
  baseline.median_ms = {{"a", 0.95}, {"b", 1.0}, {"c", 1.0}};
  const auto lines = regressions(report, baseline, 0.1);
  REQUIRE(lines.size() == 1);
  CHECK(lines[0] == "b: 1.3 ms, 30 % slower than the baseline's 1 ms");
  baseline.device = "another machine";
  CHECK(contains(error_of([&] { regressions(report, baseline, 0.1); }), "the baseline was measured on another machine"));
  CHECK(contains(error_of([] { baseline_from_json("[1]", "x.json"); }), "x.json: not a report of krait bench"));
}

TEST_CASE("bench kernels: every kernel equals the CPU in fp64 at its check's sizes") {
  for (const KernelBench& b : kernel_benches()) {
    if (b.cpu.empty()) continue;
    for (const bool backward : {false, true}) {
      if (!(backward ? b.backward_row : b.forward_row)) continue;
      const Check c = check_kernel(b, kCpu, backward);
      INFO(row_name(b, b.cpu[0], backward) << ": error " << c.error << ", tolerance " << c.tolerance);
      CHECK(c.ok);
    }
  }
}

TEST_CASE("bench kernels: the checks hold on a GPU in the rows' dtypes", "[cuda]") {
  for (const KernelBench& b : kernel_benches()) {
    if (b.cuda.empty()) continue;
    for (const bool backward : {false, true}) {
      if (!(backward ? b.backward_row : b.forward_row)) continue;
      const Check c = check_kernel(b, cuda_device(), backward);
      INFO(row_name(b, b.cuda[0], backward) << ": error " << c.error << ", tolerance " << c.tolerance);
      CHECK(c.ok);
    }
  }
}

TEST_CASE("bench: names of rows are unique") {
  std::map<std::string, int> seen;
  for (const KernelBench& b : kernel_benches())
    for (const auto* cases : {&b.cuda, &b.cpu})
      for (const auto& c : *cases)
        for (const bool backward : {false, true})
          if (backward ? b.backward_row : b.forward_row) ++seen[row_name(b, c, backward)];
  for (const auto& [name, count] : seen) {
    INFO(name);
    CHECK(count == 1);
  }
}

TEST_CASE("krait bench kernels: a filter, a report, and the comparison with a baseline") {
  const TemporaryDirectory tmp;
  const std::string json = tmp / "report.json";
  const Outcome run = krait_command("bench kernels --device cpu --filter 'rms_norm fwd' --time 0.01 --json " + json);
  CHECK(run.status == 0);
  CHECK(contains(run.out, "ceilings: copy "));
  CHECK(contains(run.out, "rms_norm R4096 C768 fp32 fwd"));
  CHECK_FALSE(contains(run.out, "layer_norm"));
  const auto j = nlohmann::json::parse(read_file(json));
  for (const char* field : {"kind", "krait", "date", "device", "threads"}) CHECK(j.contains(field));
  CHECK(j["kind"] == "kernels");
  CHECK(j["ceilings"]["copy_bytes_per_s"] > 1e8);
  REQUIRE(j["rows"].size() == 4);  // rms_norm and add_rms_norm, fwd and fwd+bwd
  for (const char* field : {"name", "median_ms", "p10_ms", "p90_ms", "laps", "method", "extra_bytes", "bytes", "floor_ms", "bound", "percent_of_ceiling"})
    CHECK(j["rows"][0].contains(field));
  CHECK(j["rows"][0]["check"]["ok"] == true);

  auto faster = j;
  for (auto& row : faster["rows"]) row["median_ms"] = 1e-6;
  write_text(tmp / "fast.json", faster.dump());
  const Outcome slower = krait_command("bench kernels --device cpu --filter 'rms_norm fwd+bwd' --time 0.01 --baseline " + (tmp / "fast.json"));
  CHECK(slower.status == 1);
  CHECK(contains(slower.out, "2 of 2 rows slower than "));
  CHECK(contains(slower.out, "  add_rms_norm R4096 C768 fp32 fwd+bwd: "));
}

TEST_CASE("krait bench: bad arguments end with 2 and say what would do") {
  CHECK(krait_command("bench").status == 2);
  CHECK(contains(krait_command("bench kernel").err, "unknown command 'kernel'; did you mean kernels?"));
  const Outcome none = krait_command("bench kernels --device cpu --filter nonsense");
  CHECK(none.status == 2);
  CHECK(contains(none.err, "--filter nonsense: no row has these words\n       rows: selective_scan, "));
  CHECK(krait_command("bench kernels --time 0").status == 2);
  CHECK(krait_command("bench kernels --device tpu").status == 2);
  const TemporaryDirectory tmp;
  write_text(tmp / "x.json", "{}");
  const Outcome bad = krait_command("bench kernels --device cpu --filter rms_norm --baseline " + (tmp / "x.json"));
  CHECK(bad.status == 1);
  CHECK(contains(bad.err, "x.json: not a report of krait bench"));
}

TEST_CASE("krait bench train: steps of a model in a process of its own") {
  const TemporaryDirectory tmp;
  const std::string json = tmp / "report.json";
  const Outcome run = krait_command("bench train --device cpu --filter kan-small --time 0.02 --json " + json);
  INFO(run.out << run.err);
  CHECK(run.status == 0);
  const auto j = nlohmann::json::parse(read_file(json));
  REQUIRE(j["rows"].size() == 1);
  for (const char* field : {"median_ms", "samples_per_s", "peak_bytes", "first_step_s", "mfu", "parameters", "check"})
    CHECK(j["rows"][0].contains(field));
  CHECK(contains(krait_command("bench train --device cpu --list").out, "char-gpt B12 T64\n"));
}

TEST_CASE("krait bench lengths: time and memory of a layer at one length") {
  const Outcome run = krait_command("bench lengths --device cpu --filter 'mamba2 L2k' --time 0.02");
  CHECK(run.status == 0);
  CHECK(contains(run.out, "mamba2 d64 L2k fp32"));
  CHECK(contains(run.out, "ns_per_token"));
}
