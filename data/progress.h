#pragma once
#include <chrono>
#include <cstdint>
#include <string>

namespace krait::data {

/// Progress of one pass over bytes, on stderr: a live bar on a terminal, else a plain line every ten seconds and at
/// the end.
class Progress {
 public:
  Progress(std::string label, int64_t total_bytes, bool quiet);
  void advance(int64_t bytes);
  void finish();

 private:
  void show(bool last);
  using Clock = std::chrono::steady_clock;
  std::string label_;
  int64_t total_, done_ = 0;
  bool quiet_, terminal_;
  Clock::time_point start_, shown_;
};

/// "1.2 MB", "34.5 GB" (powers of 1000), and "1,234,567".
std::string human_bytes(int64_t bytes);
std::string with_commas(int64_t value);

}  // namespace krait::data
