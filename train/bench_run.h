#pragma once
#include "train/bench.h"
#include "train/commands.h"

namespace krait::train::bench {

/// What the runs share: the table that grows on standard output, the JSON, the comparison.
class Output {
 public:
  Output(const BenchCommand& command, std::string kind, Device device);
  /// Measures the machine's ceilings and prints them.
  void measure_ceilings();
  void add(const Row& row);
  void note(const std::string& line);
  const Report& report() const { return report_; }
  /// Writes the JSON, compares with the baseline, names what is wrong or slower. The exit status.
  int finish();

 private:
  BenchCommand command_;
  Report report_;
};

Device bench_device(const BenchCommand& command);
/// Which of the names match the filter, in order; an error that shows some when none does. --list: prints them.
std::vector<size_t> select_rows(const std::vector<std::string>& names, const BenchCommand& command);

int bench_kernels(const BenchCommand& command);
int bench_train(const BenchCommand& command);
int bench_decode(const BenchCommand& command);
int bench_lengths(const BenchCommand& command);

}  // namespace krait::train::bench
