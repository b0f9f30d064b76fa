#include "train/bench.h"

#include <algorithm>
#include <cctype>
#include <chrono>
#include <ctime>
#include <nlohmann/json.hpp>
#include <sstream>

#include "core/device_timer.h"
#include "core/parallel.h"
#include "train/build_info.h"
#include "train/progress.h"

namespace krait::train::bench {

const char* name_of(Unit unit) {
  constexpr const char* kNames[] = {"none", "bf16", "tf32", "fp32"};
  return kNames[static_cast<size_t>(unit)];
}

double Ceilings::rate(Unit unit) const {
  double best = 0;
  for (const auto& [name, value] : product)
    if (unit != Unit::none && name.starts_with(name_of(unit))) best = std::max(best, value);
  return best;
}

namespace {

double memory_ms(const Row& r, const Ceilings& c) { return c.copy > 0 ? 1e3 * r.work.bytes / c.copy : 0.0; }
double product_ms(const Row& r, const Ceilings& c) {
  const double rate = c.rate(r.unit);
  return rate > 0 ? 1e3 * r.work.flops / rate : 0.0;
}

std::string today() {
  const std::time_t now = std::chrono::system_clock::to_time_t(std::chrono::system_clock::now());
  char text[32];
  std::tm utc{};
  gmtime_r(&now, &utc);
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &utc);
  return text;
}

std::string lower(std::string s) {
  std::transform(s.begin(), s.end(), s.begin(), [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return s;
}

nlohmann::ordered_json to_json_row(const Row& r, const Ceilings& c) {
  nlohmann::ordered_json j;
  j["name"] = r.name;
  if (!r.problem.empty()) {
    j["problem"] = r.problem;
    return j;
  }
  j["median_ms"] = r.time.median_ms;
  j["p10_ms"] = r.time.p10_ms;
  j["p90_ms"] = r.time.p90_ms;
  j["laps"] = r.time.laps;
  j["method"] = r.time.method;
  j["extra_bytes"] = r.time.extra_bytes;
  if (r.work.bytes > 0) j["bytes"] = r.work.bytes;
  if (r.work.flops > 0) j["flops"] = r.work.flops;
  if (const double floor = r.floor_ms(c); floor > 0) {
    j["floor_ms"] = floor;
    j["bound"] = r.bound(c);
    j["percent_of_ceiling"] = 100 * floor / r.time.median_ms;
  }
  if (r.goal_ms > 0) j["goal_ms"] = r.goal_ms;
  if (!r.check.against.empty())
    j["check"] = {{"against", r.check.against}, {"error", r.check.error}, {"tolerance", r.check.tolerance}, {"ok", r.check.ok}};
  for (const auto& [name, value] : r.values) j[name] = value;
  return j;
}

}  // namespace

double Row::floor_ms(const Ceilings& c) const { return std::max(memory_ms(*this, c), product_ms(*this, c)); }

std::string Row::bound(const Ceilings& c) const {
  if (floor_ms(c) == 0) return "";
  return memory_ms(*this, c) >= product_ms(*this, c) ? "memory" : fmt::format("{} products", name_of(unit));
}

std::string to_json(const Report& report) {
  const DeviceInfo info = device_info(report.device);
  const CudaVersions versions = cuda_versions();
  nlohmann::ordered_json j;
  j["kind"] = report.kind;
  j["krait"] = fmt::format("{} (git {})", kVersion, git_revision());
  j["date"] = today();
  j["device"] = info.name;
  j["device_bytes"] = info.total_bytes;
  if (report.device.is_cpu()) j["threads"] = num_threads();
  if (report.device.is_cuda()) {
    j["multiprocessors"] = info.multiprocessors;
    j["cuda"] = versions.runtime;
    j["driver"] = versions.driver;
  }
  j["ceilings"] = nlohmann::ordered_json::object();
  if (report.ceilings.copy > 0) j["ceilings"]["copy_bytes_per_s"] = report.ceilings.copy;
  for (const auto& [name, rate] : report.ceilings.product) j["ceilings"][name + " flops_per_s"] = rate;
  j["rows"] = nlohmann::ordered_json::array();
  for (const Row& r : report.rows) j["rows"].push_back(to_json_row(r, report.ceilings));
  return j.dump(1) + "\n";
}

Baseline baseline_from_json(const std::string& text, const std::string& source) {
  const auto j = nlohmann::json::parse(text, nullptr, false);
  KRAIT_CHECK(j.is_object() && j.contains("rows") && j["rows"].is_array() && j.contains("device") && j["device"].is_string() &&
                  j.contains("kind") && j["kind"].is_string(),
              "{}: not a report of krait bench\n       make one with krait bench kernels --json FILE", source);
  Baseline b;
  b.kind = j["kind"];
  b.device = j["device"];
  for (const auto& row : j["rows"])
    if (row.is_object() && row.contains("name") && row["name"].is_string() && row.contains("median_ms") &&
        row["median_ms"].is_number())
      b.median_ms[row["name"]] = row["median_ms"];
  return b;
}

std::vector<std::string> regressions(const Report& report, const Baseline& baseline, double margin) {
  const std::string device = device_info(report.device).name;
  KRAIT_CHECK(baseline.kind == report.kind, "the baseline is of krait bench {}, this is krait bench {}", baseline.kind,
              report.kind);
  KRAIT_CHECK(baseline.device == device, "the baseline was measured on {}, this is {}", baseline.device, device);
  std::vector<std::string> lines;
  for (const Row& r : report.rows) {
    const auto it = baseline.median_ms.find(r.name);
    if (it == baseline.median_ms.end()) continue;
    if (!r.problem.empty())
      lines.push_back(fmt::format("{}: {:.4g} ms in the baseline, no measurement now", r.name, it->second));
    else if (r.time.p10_ms > it->second * (1 + margin))
      lines.push_back(fmt::format("{}: {:.4g} ms, {:.0f} % slower than the baseline's {:.4g} ms", r.name, r.time.median_ms,
                                  100 * (r.time.median_ms / it->second - 1), it->second));
  }
  return lines;
}

std::string table_head(const std::string& kind) {
  return fmt::format("{:<64} {:>10} {:>21} {:>6}  {:<16} {:>9}  {}", kind, "median ms", "p10 .. p90", "% of", "bound by",
                     "goal ms", "check");
}

std::string table_line(const Row& r, const Ceilings& c) {
  if (!r.problem.empty()) return fmt::format("{:<64} {}", r.name, r.problem);
  const double floor = r.floor_ms(c);
  std::string line = fmt::format("{:<64} {:>10.4g} {:>21} {:>6}  {:<16} {:>9}  {}", r.name, r.time.median_ms,
                                 fmt::format("{:.4g} .. {:.4g}", r.time.p10_ms, r.time.p90_ms),
                                 floor > 0 ? fmt::format("{:.0f}", 100 * floor / r.time.median_ms) : "", r.bound(c),
                                 r.goal_ms > 0 ? fmt::format("{:.4g} {}", r.goal_ms, r.time.median_ms <= r.goal_ms ? '+' : '-') : "",
                                 r.check.against.empty() ? "" : fmt::format("{} {:.1e}", r.check.ok ? "ok" : "WRONG", r.check.error));
  for (const auto& [name, value] : r.values) {
    if (name == "reserved_bytes" || name == "parameters" || (name == "allocations_while_timed" && value == 0)) continue;
    line += name.ends_with("_bytes") ? fmt::format("  {} {}", name, human_bytes(static_cast<int64_t>(value)))
                                     : fmt::format("  {} {:.5g}", name, value);
  }
  return line;
}

bool matches(const std::string& name, const std::string& filter) {
  std::istringstream words(lower(filter));
  const std::string text = lower(name);
  for (std::string word; words >> word;)
    if (text.find(word) == std::string::npos) return false;
  return true;
}

}  // namespace krait::train::bench
