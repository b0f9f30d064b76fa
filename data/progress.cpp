#include "data/progress.h"

#include <fmt/core.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <utility>

namespace krait::data {
namespace {

// Not fmt::print, which throws: no work is given up because nobody can see how far it is.
void print(const std::string& text) { std::fputs(text.c_str(), stderr); }

}  // namespace

Progress::Progress(std::string label, int64_t total_bytes, bool quiet)
    : label_(std::move(label)),
      total_(total_bytes),
      quiet_(quiet),
      terminal_(::isatty(STDERR_FILENO) == 1),
      start_(Clock::now()),
      shown_(start_) {}

void Progress::advance(int64_t bytes) {
  done_ += bytes;
  const auto interval = terminal_ ? std::chrono::milliseconds(100) : std::chrono::milliseconds(10000);
  if (quiet_ || Clock::now() - shown_ < interval) return;
  shown_ = Clock::now();
  show(false);
}

void Progress::finish() {
  if (!quiet_) show(true);
}

void Progress::show(bool last) {
  const double seconds = std::chrono::duration<double>(Clock::now() - start_).count();
  const double share = total_ > 0 ? std::min(1.0, static_cast<double>(done_) / static_cast<double>(total_)) : 1.0;
  const std::string rate =
      seconds > 0 ? human_bytes(static_cast<int64_t>(static_cast<double>(done_) / seconds)) + "/s" : "";
  if (!terminal_) {
    print(fmt::format("{:<10} {:>3.0f}%  {}  {}  {:.1f} s\n", label_, share * 100, human_bytes(done_), rate, seconds));
    return;
  }
  constexpr int kWidth = 30;
  const auto filled = static_cast<size_t>(share * kWidth);
  const std::string bar = std::string(filled, '=') + std::string(kWidth - filled, ' ');
  const std::string left = last || share <= 0 ? "" : fmt::format("  {:.0f} s left", seconds * (1 - share) / share);
  print(fmt::format("\r{:<10} [{}] {:>3.0f}%  {}  {}{}\x1b[K{}", label_, bar, share * 100, human_bytes(done_), rate, left,
                    last ? "\n" : ""));
  std::fflush(stderr);
}

std::string human_bytes(int64_t bytes) {
  static constexpr const char* kUnits[] = {"kB", "MB", "GB", "TB"};
  if (bytes < 1000) return fmt::format("{} B", bytes);
  double value = static_cast<double>(bytes) / 1000;
  size_t unit = 0;
  for (; value >= 999.95 && unit < 3; ++unit) value /= 1000;
  return fmt::format("{:.1f} {}", value, kUnits[unit]);
}

std::string with_commas(int64_t value) {
  std::string out = std::to_string(value);
  for (auto at = static_cast<int64_t>(out.size()) - 3; at > (value < 0); at -= 3)
    out.insert(static_cast<size_t>(at), ",");
  return out;
}

}  // namespace krait::data
