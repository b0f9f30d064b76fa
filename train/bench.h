#pragma once
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "train/bench_timing.h"

/// `krait bench`: how fast the kernels, whole training steps and decoding are on the machine at hand, against the
/// ceilings that the same run measures on it.
namespace krait::train::bench {

/// What limits a row's arithmetic.
enum class Unit : uint8_t { none, bf16, tf32, fp32 };
const char* name_of(Unit unit);

/// What the machine reaches with plain library calls: FLOP/s of matrix products, bytes/s of a copy (read + written).
struct Ceilings {
  double copy = 0;
  std::map<std::string, double> product;  // "bf16 4096", "bf16 8192", "tf32 8192", "fp32 4096"
  /// The best rate measured for the unit; 0 for none.
  double rate(Unit unit) const;
};
Ceilings measure_ceilings(Device device, double seconds);

/// What a piece of work must do at least.
struct Work {
  double bytes = 0;  // moved through memory: each input read once, each output written once
  double flops = 0;
};

/// Whether the results are right, found out before the timing.
struct Check {
  std::string against;  // what, at which size; empty: not checked
  double error = 0, tolerance = 0;
  bool ok = true;
};

/// One measurement.
struct Row {
  std::string name;    // unique: "selective_scan B32 D1536 L2048 N16 bf16 fwd+bwd"
  Timing time;
  Work work;
  Unit unit = Unit::none;
  double goal_ms = 0;  // 0: none
  Check check;
  std::string problem;                   // why there is no measurement; empty: there is
  std::map<std::string, double> values;  // what else is reported: tokens_per_s, mfu, peak_bytes, ...

  /// The time in which the machine's ceilings would allow it, milliseconds; 0: not known.
  double floor_ms(const Ceilings& c) const;
  /// "memory", "bf16 products", ...: which ceiling makes that floor.
  std::string bound(const Ceilings& c) const;
};

struct Report {
  std::string kind;  // kernels | train | decode | lengths
  Device device;
  Ceilings ceilings;
  std::vector<Row> rows;
};
std::string to_json(const Report& report);
/// Rows of a report that was written by to_json. `source` stands in messages.
struct Baseline {
  std::string kind, device;
  std::map<std::string, double> median_ms;
};
Baseline baseline_from_json(const std::string& text, const std::string& source);

/// One line per row that is slower than its baseline by more than `margin` (0.1: a tenth) even at its p10; rows
/// without a baseline are left out. A baseline of another device or kind is an error.
std::vector<std::string> regressions(const Report& report, const Baseline& baseline, double margin);

/// One line of a table while the run goes on, and its head.
std::string table_head(const std::string& kind);
std::string table_line(const Row& row, const Ceilings& ceilings);

/// Whether the name contains all words of the filter (words are separated by spaces; case does not matter).
bool matches(const std::string& name, const std::string& filter);

}  // namespace krait::train::bench
